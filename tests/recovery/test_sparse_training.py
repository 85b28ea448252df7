"""Zeros that stay zero while a stock Trainer trains, and a share of them that rises as told."""

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfprune.errors import HfpruneError, UnsupportedModelError
from hfprune.importance.sparsity import Sparsity, sparsify
from hfprune.recovery.schedule import Schedule
from hfprune.recovery.sparse_training import GradualSparsity, KeepSparse


class Watch(TrainerCallback):
    """The share of zeros at the beginning of every step, and whether a zero ever came back."""

    def __init__(self, result=None):
        self.zeros, self.came_back = [], False
        self._before = {}

    def on_step_begin(self, args, state, control, **kwargs):
        weights = {n: p.detach() for n, p in kwargs["model"].named_parameters() if "_proj" in n}
        gone = {name: weight == 0 for name, weight in weights.items()}
        for name, before in self._before.items():
            self.came_back |= bool((before & ~gone[name]).any())
        self._before = gone
        count = sum(g.sum().item() for g in gone.values())
        self.zeros.append(count / sum(g.numel() for g in gone.values()))


def train(model, folder, *callbacks, steps=20, judge=None, **options):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCABULARY, (16, 8), generator=generator)
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        **options,
    }
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows[:2],
        compute_metrics=judge,
        callbacks=list(callbacks),
    )
    return trainer


@pytest.mark.parametrize("found", [False, True])
def test_zeros_stay_zero_under_momentum_and_weight_decay(tmp_path, found):
    model = tiny.model("llama")
    result = sparsify(model, 0.5, n_m="2:4")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    watch = Watch()
    train(model, tmp_path, KeepSparse() if found else KeepSparse(result), watch).train()
    assert not watch.came_back and set(watch.zeros) == {0.5}
    for path, mask in result.masks.items():
        weight = model.get_submodule(path).weight
        assert weight.ne(0).equal(mask)
        assert not weight.equal(before[f"{path}.weight"])  # and the others learn


def test_without_the_callback_they_do_not(tmp_path):
    model = tiny.model("llama")
    sparsify(model, 0.5)
    watch = Watch()
    train(model, tmp_path, watch, steps=2).train()
    assert watch.came_back


def test_masks_of_another_model_are_refused_before_a_step(tmp_path):
    model = tiny.model("llama")
    result = sparsify(tiny.model("bert"), 0.5)
    with pytest.raises(HfpruneError, match="another model"):
        train(model, tmp_path, KeepSparse(result)).train()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_are_refused_because_they_begin_with_zeros(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.model("llama")
    sparsify(model, 0.5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for refused in (train(adapted, tmp_path, KeepSparse()).train, lambda: sparsify(adapted)):
        with pytest.raises(UnsupportedModelError, match="has PEFT adapters inside: merge them"):
            refused()


def test_the_share_of_zeros_rises_by_the_cube(tmp_path):
    model, watch = tiny.model("llama"), Watch()
    gradual = GradualSparsity(0.8, schedule=Schedule(begin=0.1, end=0.6, every=4))
    train(model, tmp_path, gradual, watch).train()
    # Plans after steps 6, 10 and 12 of 20; the watch looks before each step.
    rises = {6: 4, 10: 8, 12: 10}
    shares = [0.0] * 6
    for step in range(6, 20):
        progress = rises[max(s for s in rises if s <= step)] / 10
        shares.append(0.8 * (1 - (1 - progress) ** 3))
    assert watch.zeros == pytest.approx(shares, abs=1e-3)
    assert not watch.came_back
    assert gradual.sparsity.zeros / gradual.sparsity.weights == pytest.approx(0.8, abs=1e-3)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    def gradual():
        return GradualSparsity(0.8, schedule=Schedule(every=4))

    whole = tiny.model("llama")
    saving = {"save_strategy": "steps", "save_steps": 7}  # between two rises
    train(whole, tmp_path, gradual(), **saving).train()
    resumed = tiny.model("llama")
    watch = Watch()
    trainer = train(resumed, tmp_path, gradual(), watch, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert watch.zeros[0] == pytest.approx(0.8 * (1 - (1 - 4 / 14) ** 3), abs=1e-3)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert one.eq(0).equal(other.eq(0))
        torch.testing.assert_close(one, other)


def test_only_checkpoints_with_all_zeros_compete(tmp_path):
    model, qualities = tiny.model("llama"), iter([0.9, 0.8, 0.3, 0.4, 0.2])
    gradual = GradualSparsity(0.8, schedule=Schedule(end=0.5, every=2))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "quality"}
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = train(
        model, tmp_path, gradual, steps=10, judge=lambda _: {"quality": next(qualities)},
        **best, **often,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 8
    zeros = Sparsity.of(model)
    assert zeros.zeros / zeros.weights == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("target", [0, 1, 80])
def test_a_target_that_is_no_share(target):
    with pytest.raises(HfpruneError, match=f"target is {target}"):
        GradualSparsity(target)
