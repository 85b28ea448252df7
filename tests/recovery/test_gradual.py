"""Pruning while training: against explicit gates, hfprune.score, and the masked model."""

import copy
import logging
import sys
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import hfprune
from hfprune.errors import BudgetError, HfpruneError, UnsupportedModelError
from hfprune.importance.gates import gated, masked, outlet_of
from hfprune.planning.budget import Budget
from hfprune.recovery.distillation import DistillationArguments, distill
from hfprune.recovery.gradual import GradualPruning
from hfprune.recovery.schedule import Schedule, cubic
from hfprune.structure.anatomy import Anatomy
from tests import tiny
from tests.launching import leave, succeed, together
from tests.trained import collate, examples

HEADS = {
    "bert": "AutoModelForSequenceClassification",
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "mixtral": "AutoModelForCausalLM",
}


WIDTH = 100  # neurons so many and small that a budget is met within a percent


def model_of(family, dtype=torch.float32):
    """A random model without dropout; the same at every call."""
    torch.manual_seed(0)
    config = tiny.config(family)
    for name in ("intermediate_size", "d_ff"):
        if name in config.to_dict():
            setattr(config, name, WIDTH)
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    made = getattr(transformers, HEADS[family]).from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1) * 0.5)
    return made.to(dtype)


def arguments(folder, cls=TrainingArguments, **changes):
    settings = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return cls(**settings)


class Spy(TrainerCallback):
    """Calls a function after every step, and one when training ends."""

    def __init__(self, step=None, end=None):
        self.step, self.end = step, end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.step:
            self.step(state.global_step, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.end:
            self.end(model)


def train(model, rows, folder, *callbacks, resume=None, **changes):
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=rows,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def shares(importance):
    total = sum(values.sum() for values in importance.values())
    return {name: values / total for name, values in importance.items()}


def assert_close(left, right, rtol=1e-5, atol=1e-8):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=name)


# The schedule ---------------------------------------------------------------------------------


def test_the_schedule_is_the_cubic_of_zhu_and_gupta():
    schedule = Schedule(begin=0.1, end=0.7, every=5)
    due = [step for step in range(1, 101) if schedule.due(step, 100)]
    assert due == [*range(15, 70, 5), 70]
    budget = Budget.parse("macs=40%, params=55%")
    assert [limit.amount for limit in schedule.at(10, 100, budget).limits] == [1.0, 1.0]
    for step in due:
        kept = [limit.amount for limit in schedule.at(step, 100, budget).limits]
        for share, final in zip(kept, (0.4, 0.55), strict=True):
            # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 of the sparsity s, s_i = 0
            sparsity, begin, length = 1 - final, 10, 60
            expected = sparsity + (0 - sparsity) * (1 - (step - begin) / length) ** 3
            assert share == pytest.approx(1 - expected, abs=1e-12)
    assert cubic(0, 1.0, 0.4) == 1.0 and cubic(1, 1.0, 0.4) == cubic(2, 1.0, 0.4) == 0.4


def test_plans_are_made_when_due_and_within_their_share(tmp_path, caplog):
    callback = GradualPruning("params=50%", schedule=Schedule(0.0, 0.7, 2))
    kept = {}

    def look(step, model):
        if callback.plan:
            kept[step] = callback.plan.params_share

    with caplog.at_level(logging.INFO, "hfprune"):
        train(model_of("bert"), examples("bert", 40), tmp_path, callback, Spy(look))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"Step {step}" for step in (2, 4, 6, 7)
    ]
    for step in (2, 4, 6, 7):
        share = cubic(step / 7, 1.0, 0.5)
        assert share - 0.03 <= kept[step] <= share + 1e-9
    assert kept[10] == kept[7] and 0.495 <= kept[7] <= 0.5


# The importance -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        ("bert", "taylor"),
        ("llama", "fisher"),
        pytest.param("t5", "activation", marks=pytest.mark.slow),
        pytest.param("mixtral", "fisher", marks=pytest.mark.slow),
    ],
)
def test_importance_from_training_is_that_of_scoring(family, criterion, tmp_path):
    """On the same batch, with weights that do not move; whatever the accumulation."""
    rows = examples(family, 8)
    expected = hfprune.score(model_of(family), [collate(rows)], [criterion]).by(criterion)
    for accumulation in (1, 2):
        callback = GradualPruning("params=99%", criterion=criterion, schedule=Schedule(0, 1, 1))
        train(
            model_of(family),
            rows,
            tmp_path,
            callback,
            learning_rate=0.0,
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        assert_close(callback.importance, shares(expected))


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_closed_units_show_what_they_would_give(checkpointing, tmp_path):
    """The gate gradients of a partly closed model, against gates that really are parameters."""
    rows = examples("llama", 1)
    model = model_of("llama")
    anatomy = Anatomy.of(model)
    callback = GradualPruning(
        "params=50%", criterion="taylor", smoothing=0.0, schedule=Schedule(0, 0.5, 1)
    )
    gates = {}

    def look(step, model):
        if step == 1:  # the next step's gradients are of these gates
            keep = callback.plan.keep
            for group in anatomy:
                gate = torch.zeros(group.units)
                gate[list(keep[group.name])] = 1
                gates[group.name] = gate.requires_grad_()

    train(
        model,
        rows * 4,
        tmp_path,
        callback,
        Spy(look),
        learning_rate=0.0,
        max_steps=4,
        per_device_train_batch_size=1,
        activation_checkpointing=checkpointing,
    )
    dense = model_of("llama")
    with gated(dense, gates):
        dense(**collate(rows)).loss.backward()
    closed = torch.cat([gate.grad[gate == 0] for gate in gates.values()])
    assert len(closed) > 10 and (closed != 0).float().mean() > 0.9
    expected = {name: gate.grad.double().abs() for name, gate in gates.items()}
    assert_close(callback.importance, shares(expected), rtol=1e-4)


def test_a_unit_that_was_closed_and_matters_comes_back(tmp_path):
    """Neuron 0 fires for one token only, which the first half of the training does not show."""
    seen, late = 10, 20
    model = model_of("bert")
    anatomy = Anatomy.of(model)
    layer = model.bert.encoder.layer[0]
    name = next(group.name for group in anatomy if group.kind == "neuron" and not group.layer)
    rows = {
        token: {
            "input_ids": torch.full((4,), token),
            "attention_mask": torch.ones(4, dtype=torch.long),
            "labels": torch.tensor(0),
        }
        for token in (seen, late)
    }
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
        inputs = {}
        hook = layer.intermediate.register_forward_pre_hook(
            lambda module, args: inputs.setdefault("now", args[0][0, 0])
        )
        states = []
        for token in (seen, late):
            inputs.clear()
            model(**collate([rows[token]]))
            states.append(inputs["now"])
        hook.remove()
        direction = states[1] - states[0]
        dense = layer.intermediate.dense
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()
        dense.weight[0] = 20 * direction / direction.square().sum()
        dense.bias[0] = -(dense.weight[0] @ (states[0] + states[1])) / 2
        fired = torch.stack(states) @ dense.weight[0] + dense.bias[0]
        torch.testing.assert_close(fired, torch.tensor([-10.0, 10.0]), rtol=1e-3, atol=1e-3)
    callback = GradualPruning("params=70%", schedule=Schedule(0, 0.8, 2), smoothing=0.5)
    open_at = {}

    def look(step, model):
        if callback.plan:
            open_at[step] = 0 in callback.plan.keep[name]

    train(
        model,
        [rows[seen]] * 4 * 8 + [rows[late]] * 4 * 12,
        tmp_path,
        callback,
        Spy(look),
        max_steps=20,
        learning_rate=1e-5,
    )
    assert not any(open_at[step] for step in range(2, 9))
    assert all(open_at[step] for step in range(12, 21))


# The end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "budget"),
    [
        ("bert", "macs=60%"),
        ("llama", "params=50%"),
        pytest.param("t5", "macs=50%", marks=pytest.mark.slow),
    ],
)
def test_the_pruned_model_is_the_masked_one_within_the_budget(family, budget, tmp_path):
    model = model_of(family, torch.float64)
    dense, batch = Anatomy.of(model), collate(examples(family, 4))
    callback = GradualPruning(budget, schedule=Schedule(0, 0.6, 2), tokens=7)
    before = {}

    def end(model):
        with torch.no_grad():
            before["gated"] = model.eval()(**batch).logits
        before["weights"] = copy.deepcopy(model.state_dict())

    train(model, examples(family, 40), tmp_path, Spy(end=end), callback)
    with torch.no_grad():
        after = model.eval()(**batch).logits
        whole = model_of(family, torch.float64)
        whole.load_state_dict(before["weights"])
        with masked(whole, callback.plan.keep):
            torch.testing.assert_close(after, whole(**batch).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after, before["gated"], rtol=1e-10, atol=1e-10)
    plan = callback.plan
    spent = plan.macs_share if budget.startswith("macs") else plan.params_share
    asked = Budget.parse(budget).limits[0].amount
    assert asked * 0.99 <= spent <= asked + 1e-9
    assert Anatomy.of(model).outside_params == dense.outside_params
    assert not any(outlet_of(model, group)._forward_pre_hooks for group in Anatomy.of(model))
    model.config.use_cache = True  # the stock Trainer has switched it off
    model.float().save_pretrained(tmp_path / "saved")  # verified by itself
    again = hfprune.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_a_uniform_plan_leaves_a_stock_model(tmp_path):
    model = model_of("llama")
    stock = type(model)
    constraints = hfprune.Constraints(uniform=True, tolerance=0.2)
    callback = GradualPruning("params=50%", constraints=constraints, schedule=Schedule(0, 0.5, 2))
    train(model, examples("llama"), tmp_path, callback)
    assert type(model) is stock and callback.plan.uniform


# Distillation and resuming --------------------------------------------------------------------


def distilled(folder, *callbacks, resume=False, judge=None, **changes):
    callback = GradualPruning("macs=60%", schedule=Schedule(0, 0.6, 2))
    student, teacher = model_of("bert"), model_of("bert")
    rows = examples("bert", 40)
    args = arguments(folder, DistillationArguments, save_strategy="steps", save_steps=3, **changes)
    output = distill(
        student,
        teacher,
        rows,
        rows[:8] if judge else None,
        args=args,
        data_collator=collate,
        compute_metrics=judge,
        callbacks=[callback, *callbacks],
        resume=resume,
    )
    return student, callback, output


@pytest.mark.parametrize("killed_at", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_plan_and_weights(killed_at, tmp_path):
    straight, expected, _ = distilled(tmp_path / "straight", optim="adamw_torch")

    def kill(step, model):
        if step == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "stopped", Spy(kill), optim="adamw_torch")
    again, found, _ = distilled(tmp_path / "stopped", resume=True, optim="adamw_torch")
    assert found.plan == expected.plan
    assert_close(again.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_only_checkpoints_of_the_final_structure_compete(tmp_path):
    """The larger models before have the better metric, and are not what is asked for."""
    values = iter([0.9, 0.8, 0.5, 0.7, 0.6])  # before training, after steps 3, 6, 9, 10
    student, callback, output = distilled(
        tmp_path, judge=lambda prediction: {"accuracy": next(values)},
        metric_for_best_model="accuracy",
    )  # fmt: skip
    assert output.metrics["kept_step"] == 9
    kept = hfprune.from_pretrained(tmp_path / "checkpoint-9")
    batch = collate(examples("bert", 4))
    with torch.no_grad(), masked(kept, callback.plan.keep):
        expected = kept(**batch).logits
    torch.testing.assert_close(student.eval()(**batch).logits, expected)
    assert student.config.use_cache == model_of("bert").config.use_cache


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "params=5M"}, "give shares"),
        ({"criterion": "fischer"}, "Did you mean 'fisher'"),
        ({"criterion": "reconstruction"}, "give fisher or taylor"),
        ({"smoothing": 1.0}, "smoothing is 1"),
        ({"constraints": hfprune.Constraints(layers=2)}, "not layers"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(HfpruneError, match=message):
        GradualPruning(**{"budget": "macs=50%", **arguments})


@pytest.mark.parametrize("times", [{"begin": 0.7, "end": 0.7}, {"end": 1.5}, {"every": 0}])
def test_a_schedule_out_of_range_is_refused(times):
    with pytest.raises(HfpruneError, match="0 <= begin < end <= 1"):
        Schedule(**times)


def test_what_cannot_end_well_is_refused_before_the_first_step(tmp_path):
    model, rows = model_of("bert"), examples("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError, match="least is"):
        train(model, rows, tmp_path, GradualPruning("macs=1%"))
    protected = hfprune.Constraints(protect=("encoder.layer.7",))
    with pytest.raises(HfpruneError, match=r"encoder\.layer\.7"):
        train(model, rows, tmp_path, GradualPruning("macs=50%", constraints=protected))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_run_that_ends_early_or_starts_twice_is_an_error(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model, rows = model_of("bert"), examples("bert", 40)
    with pytest.raises(HfpruneError, match="ended after step 3, before the last plan at step 7"):
        train(model, rows, tmp_path, GradualPruning("macs=50%"), Stop())
    assert not any(module._forward_pre_hooks for module in model.modules())
    callback = GradualPruning("macs=50%", schedule=Schedule(0, 0.7, 2))

    def kill(step, model):
        if step == 5:
            raise KeyboardInterrupt

    fresh, other = model_of("bert"), GradualPruning("macs=50%", schedule=Schedule(0, 0.7, 2))
    with pytest.raises(KeyboardInterrupt):
        train(model_of("bert"), rows, tmp_path, callback, Spy(kill))
    model = model_of("bert")
    trainer = train(model, rows, tmp_path, callback)  # the same again, from the start
    train(fresh, rows, tmp_path, other)
    assert callback.plan == other.plan
    assert_close(model.state_dict(), fresh.state_dict(), rtol=0, atol=0)
    with pytest.raises(HfpruneError, match="make a new Trainer"):
        trainer.train()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=rows, data_collator=collate
    )
    trainer.train()  # another one trains what is left


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    rows, saving = examples("bert", 40), {"save_strategy": "steps", "save_steps": 5}
    train(model_of("bert"), rows, tmp_path / "plain", **saving)
    checkpoint = str(tmp_path / "plain/checkpoint-5")
    with pytest.raises(HfpruneError, match="without gradual pruning"):
        train(model_of("bert"), rows, tmp_path, GradualPruning("macs=50%"), resume=checkpoint)
    train(model_of("bert"), rows, tmp_path / "half", GradualPruning("macs=50%"), **saving)
    checkpoint = str(tmp_path / "half/checkpoint-5")
    with pytest.raises(HfpruneError, match="not by"):
        train(model_of("bert"), rows, tmp_path, GradualPruning("macs=60%"), resume=checkpoint)
    for change in ({"constraints": hfprune.Constraints(round_to=8)}, {"tokens": 7}):
        other = GradualPruning("macs=50%", **change)
        with pytest.raises(HfpruneError, match="constraints, tokens"):
            train(model_of("bert"), rows, tmp_path, other, resume=checkpoint)


def test_two_forward_passes_for_one_backward_are_refused(tmp_path):
    class Twice(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).loss + model(**inputs).loss

    rows, callback = examples("bert"), GradualPruning("macs=50%")
    trainer = Twice(
        model_of("bert"),
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[callback],
    )
    with pytest.raises(HfpruneError, match="forward twice before one backward"):
        trainer.train()


def test_a_model_that_is_not_all_in_memory_is_refused(tmp_path):
    model = accelerate.cpu_offload(model_of("bert"), torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        GradualPruning("macs=50%").on_train_begin(
            arguments(tmp_path), TrainerState(), TrainerControl(), model=model
        )


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    model = peft.get_peft_model(model_of("bert"), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(UnsupportedModelError, match="PEFT"):
        train(model, examples("bert"), tmp_path, GradualPruning("macs=50%"))


# Processes ------------------------------------------------------------------------------------


def run_in_processes(folder, batch_size):
    callback = GradualPruning("macs=60%", schedule=Schedule(0, 0.6, 2))
    model = model_of("bert")
    trainer = train(
        model, examples("bert", 64), folder, callback, per_device_train_batch_size=batch_size
    )
    if trainer.is_world_process_zero():
        callback.plan.save(f"{folder}/plan.json")
        model.save_pretrained(f"{folder}/model")


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(tmp_path):
    succeed(together(Path(__file__), tmp_path / "two"))
    run_in_processes(tmp_path / "one", 4)
    one, two = (hfprune.PruningPlan.load(tmp_path / n / "plan.json") for n in ("one", "two"))
    assert one.keep == two.keep
    models = [hfprune.from_pretrained(tmp_path / n / "model") for n in ("one", "two")]
    assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    run_in_processes(sys.argv[1], 2)
    leave()
