"""Training under FSDP2 and DeepSpeed, really sharded on two CPU processes, against training in one
process.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import hfprune
from hfprune.errors import HfpruneError, RecipeError
from hfprune.recovery.distillation import DistillationArguments, distill
from hfprune.recovery.gradual import GradualPruning
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut
from tests import tiny
from tests.launching import DEEPSPEED, FSDP, leave, succeed, together
from tests.trained import At, collate, examples

peft = pytest.importorskip("peft")

HEADS = {"bert": "AutoModelForSequenceClassification", "gemma3_text": "AutoModelForCausalLM"}
FAMILIES = list(HEADS)  # gemma's head is tied to its embeddings


def pair(family):
    """A student with uneven layers, some of them emptied, and the model it was cut from."""
    teacher = tiny.model(family, HEADS[family])
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return copy_and_cut(teacher, tiny.selection(Anatomy.of(teacher))), teacher


def with_deepspeed():
    return "ACCELERATE_USE_DEEPSPEED" in os.environ


def refuse_whole_moments(model, optimizer):
    """Under DeepSpeed this process holds about half of the optimizer's state."""
    inner = optimizer.optimizer.optimizer  # in DeepSpeed's, in Accelerate's
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(state["exp_avg"].numel() for state in inner.state.values())
    assert 0.4 * whole < held < 0.6 * whole


class SeesShards(TrainerCallback):
    """Every step, this process holds about half of the weights and of the optimizer's state; under
    DeepSpeed, of the state alone.
    """

    def __init__(self, whole):
        self.whole, self.steps = whole, 0

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.steps += 1
        if with_deepspeed():
            refuse_whole_moments(model, optimizer)
            return
        parameters = list(model.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        assert sum(p.to_local().numel() for p in parameters) < 0.7 * self.whole
        moments = [s["exp_avg"] for s in optimizer.state.values()]
        assert moments and all(isinstance(m, DTensor) for m in moments)


def run(family, folder, *callbacks, resume=False, lora=None):
    """(student, log, result) of a distillation of 6 steps, saved and judged at every other one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    student, teacher = pair(family)
    args = DistillationArguments(
        output_dir=str(folder),
        max_steps=6,
        learning_rate=3e-3,
        adam_epsilon=1e-4,  # keys' biases have gradients of rounding errors alone
        weight_decay=0.1,
        max_grad_norm=1.0,
        per_device_train_batch_size=4 // count,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        metric_for_best_model="doubt",
        greater_is_better=True,  # so that the best checkpoint is not the last
    )
    sees = SeesShards(sum(p.numel() for p in student.parameters()))
    keeps = Keeps()
    rows = examples(family, 32)
    result = distill(
        student, teacher, rows, rows[:8], args=args, data_collator=collate, resume=resume,
        compute_metrics=held_out, callbacks=[*callbacks, keeps, *([sees] if count > 1 else [])],
        lora=lora,
    )  # fmt: skip
    assert count == 1 or sees.steps
    return student, keeps.log, result


def stopped(family, folder):
    """The same, interrupted at step 5; what it has saved is of step 4."""

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(family, folder, At(5, stop))


def held_out(prediction):
    """The mean loss of the right class or token."""
    shares = torch.as_tensor(prediction.predictions).log_softmax(-1)
    labels = torch.as_tensor(prediction.label_ids).unsqueeze(-1)
    return {"doubt": -float(shares.gather(-1, labels).mean())}


class Keeps(TrainerCallback):
    """Keeps the log of a training."""

    def on_train_end(self, args, state, control, **kwargs):
        self.log = list(state.log_history)


def two_process_main(folder):
    """What each of the two processes of the test below runs."""
    for family in FAMILIES:
        student, log, result = run(family, folder / family / "sharded")
        stopped(family, folder / family / "begun-sharded")
        run(family, folder / family / "begun-alone", resume=True)
        if os.environ["RANK"] == "0":
            student.save_pretrained(folder / family / "saved")
            found = {"log": log, "kept": result.metrics["kept_step"], "loss": result.training_loss}
            (folder / family / "found.json").write_text(json.dumps(found))
    refused(folder / "refused")


SMOKE = """
import sys

from hfprune.recovery.distillation import DistillationArguments, distill
from tests.recovery.test_sharding import SeesShards, pair
from tests.launching import leave
from tests.trained import collate, examples

student, teacher = pair("bert")
before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
sees = SeesShards(sum(p.numel() for p in student.parameters()))
args = DistillationArguments(sys.argv[1], max_steps=1, per_device_train_batch_size=2, use_cpu=True)
distill(student, teacher, examples("bert", 4), args=args, data_collator=collate, callbacks=[sees])
after = student.state_dict()
print(sees.steps, len(before), sum(not after[name].equal(before[name]) for name in before))
leave()
"""


@pytest.mark.slow
def test_a_student_is_sharded_and_comes_back_whole(tmp_path):
    for out in succeed(together(SMOKE, tmp_path, **FSDP)):
        steps, tensors, moved = map(int, out.splitlines()[-1].split())
        assert steps == 1 and tensors / 2 < moved < tensors, "emptied layers stay"


def refused(folder):
    """What cannot be sharded says so before a step is made."""
    with pytest.raises(HfpruneError, match=r"sharded by FSDP|without DeepSpeed"):
        run("bert", folder, GradualPruning("macs=60%"))
    config = peft.LoraConfig(target_modules=["query"])
    with pytest.raises(RecipeError, match="adapters are not sharded here"):
        run("bert", folder, lora=config)
    assert not list(folder.rglob("checkpoint-[1-9]*"))


def last_state(folder):
    """Weights and the optimizer's moments in the last checkpoint."""
    found = load_file(folder / "checkpoint-6/model.safetensors")
    moments = torch.load(folder / "checkpoint-6/optimizer.pt", weights_only=True)["state"]
    return found | {f"{n} of {i}": t for i, values in moments.items() for n, t in values.items()}


def close(found, expected):
    assert found.keys() >= expected.keys()
    for name in found.keys() - expected.keys():  # DeepSpeed has moments of all that is trained
        assert name.startswith(("exp_avg", "step")) and (name[0] == "s" or not found[name].any())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name, rtol=1e-3, atol=1e-5)


def curve(log, key):
    return [entry[key] for entry in log if key in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [FSDP, DEEPSPEED, DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}],
    ids=["fsdp2", "zero2", "zero1"],
)
def test_sharded_training_is_that_of_one_process(way, tmp_path):
    if way is not FSDP:
        pytest.importorskip("deepspeed")
    alone = {}
    for family in FAMILIES:
        alone[family] = run(family, tmp_path / family / "alone")
        stopped(family, tmp_path / family / "begun-alone")
    succeed(together(Path(__file__), tmp_path, timeout=300, **way))
    kept = []
    for family in FAMILIES:
        folder = tmp_path / family
        student, log, result = alone[family]
        found = json.loads((folder / "found.json").read_text())
        for key in ("loss", "loss_task", "loss_logits", "loss_hidden", "grad_norm", "eval_doubt"):
            assert curve(found["log"], key) == pytest.approx(curve(log, key), rel=1e-4) and log, key
        assert found["loss"] == pytest.approx(result.training_loss, rel=1e-4)
        assert found["kept"] == result.metrics["kept_step"]
        close(hfprune.from_pretrained(folder / "saved").state_dict(), student.state_dict())
        run(family, folder / "begun-sharded", resume=True)
        expected = last_state(folder / "alone")
        for name in ("sharded", "begun-alone", "begun-sharded"):
            close(last_state(folder / name), expected)
        files = [{f.name for f in (folder / w / "checkpoint-6").iterdir()} for w in ("alone", name)]
        assert files[0] == files[1], "a checkpoint does not show that it was sharded"
        kept.append(found["kept"])
    assert kept == [2, 0]  # a checkpoint, and the start


if __name__ == "__main__":
    two_process_main(Path(sys.argv[1]))
    leave()
