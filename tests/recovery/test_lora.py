"""Recovery by adapters: what is trained, what is merged, and what comes back from disk."""

import sys

import pytest
import torch

import hfprune
from hfprune.errors import RecipeError
from hfprune.recovery.distillation import DistillationArguments, distill
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut
from tests import tiny
from tests.trained import At, collate, examples

peft = pytest.importorskip("peft")

TARGETS = {"bert": ["query", "dense"], "llama": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def pair(family):
    """A student with uneven layers, some of them emptied, and the model it was cut from."""
    head = "AutoModelForSequenceClassification" if family == "bert" else "AutoModelForCausalLM"
    teacher = tiny.model(family, head)
    return copy_and_cut(teacher, tiny.selection(Anatomy.of(teacher))), teacher


def run(family, folder, config=None, student=None, callbacks=(), resume=False, judge=None):
    made, teacher = pair(family)
    student = student or made
    args = DistillationArguments(
        output_dir=str(folder),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        metric_for_best_model="accuracy" if judge else None,
    )
    rows = examples(family)
    config = config or peft.LoraConfig(r=4, target_modules=TARGETS[family])
    distill(
        student, teacher, rows, rows[:4] if judge else None, args=args, data_collator=collate,
        compute_metrics=judge, lora=config, callbacks=list(callbacks), resume=resume,
    )  # fmt: skip
    return student


def logits(model, family):
    with torch.no_grad():
        return model.eval()(**collate(examples(family, 4))).logits


def same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=name, **tolerance)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_merged_student_is_the_adapted_one_and_comes_back(family, tmp_path):
    student, _ = pair(family)
    cls, before = type(student), {k: v.clone() for k, v in student.state_dict().items()}
    trained, found = [], []

    def look(model):
        trained.extend(name for name, p in model.named_parameters() if p.requires_grad)
        found.append(logits(model, family))

    run(family, tmp_path, student=student, callbacks=[At(6, look)])
    assert trained and all("lora_" in name for name in trained)
    torch.testing.assert_close(logits(student, family), found[0], rtol=1e-4, atol=1e-5)
    after = student.state_dict()
    assert type(student) is cls and after.keys() == before.keys()
    assert all(parameter.requires_grad for parameter in student.parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(any(part in name for part in TARGETS[family]) for name in moved)
    assert not hasattr(student, "peft_config")
    student.save_pretrained(tmp_path / "saved")  # verified by itself
    again = hfprune.from_pretrained(tmp_path / "saved")
    same(again.state_dict(), after, rtol=0, atol=0)


@pytest.mark.parametrize("best", [0, 4])
def test_the_best_adapters_are_merged(best, tmp_path):
    """Also when the best are those of the start, which change nothing."""
    student, _ = pair("bert")
    before, adapted = logits(student, "bert"), []
    values = iter([0.1 + (step == best) for step in (0, 2, 4, 6)])
    run(
        "bert",
        tmp_path,
        student=student,
        callbacks=[At(4, lambda model: adapted.append(logits(model, "bert")))],
        judge=lambda prediction: {"accuracy": next(values)},
    )
    wanted = adapted[0] if best else before
    torch.testing.assert_close(logits(student, "bert"), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, adapted[0], atol=1e-3)


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path):
    def stop(model):
        raise KeyboardInterrupt

    straight = run("bert", tmp_path / "straight")
    student, _ = pair("bert")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        run("bert", tmp_path / "stopped", student=student, callbacks=[At(3, stop)])
    same(student.state_dict(), before, rtol=0, atol=0)  # as it was, without adapters
    assert all(parameter.requires_grad for parameter in student.parameters())
    resumed = run("bert", tmp_path / "stopped", student=student, resume=True)
    same(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_what_was_frozen_stays_frozen(tmp_path):
    student, _ = pair("bert")
    student.get_input_embeddings().weight.requires_grad_(False)
    run("bert", tmp_path, student=student)
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["bert.embeddings.word_embeddings.weight"]


def test_biases_that_trained_are_as_before_after_an_exception(tmp_path):
    student, _ = pair("bert")
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def stop(model):
        raise KeyboardInterrupt

    config = peft.LoraConfig(target_modules=["query"], bias="all", modules_to_save=["classifier"])
    with pytest.raises(KeyboardInterrupt):
        run("bert", tmp_path, config, student, callbacks=[At(2, stop)])
    same(student.state_dict(), before, rtol=0, atol=0)


def test_a_config_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="lora does not fit the student"):
        run("bert", tmp_path, peft.LoraConfig(target_modules=["nowhere"]))
    with pytest.raises(RecipeError, match=r"lora is a dict; give a peft\.LoraConfig"):
        run("bert", tmp_path, {"r": 4})


def test_without_peft_the_error_says_what_to_install(tmp_path, monkeypatch):
    config = peft.LoraConfig()
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it is an error now
    with pytest.raises(RecipeError, match=r"pip install 'hfprune\[lora\]'"):
        run("bert", tmp_path, config)
