"""What a cached teacher teaches is what it says when asked."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertForQuestionAnswering

from hfprune.errors import DataError, RecipeError
from hfprune.recovery.losses import Counted
from hfprune.recovery.teacher_cache import ROW, Numbered, TeacherCache, numbered
from tests.launching import leave, succeed, together
from tests.recovery.test_distillation import (
    VOCABULARY,
    assert_close,
    bert,
    collate,
    examples,
    llama,
    pair,
    t5,
    trainer_of,
    vit,
    weights,
)

LOGITS_ONLY = {"hidden_weight": 0.0, "logits_weight": 1.0, "task_weight": 0.5}


def distilled(make, folder, cache=None, teacher=None, rows=None, **changes):
    """A student's weights after two steps, and how often the teacher was asked."""
    student, own = pair(make)
    teacher = teacher or own
    asked = []
    hook = teacher.register_forward_hook(lambda *call: asked.append(1))
    settings = {"max_steps": 2, "train_sampling_strategy": "random", **LOGITS_ONLY, **changes}
    trainer = trainer_of(
        student, teacher, folder, rows or examples(make), teacher_cache=cache, **settings
    )
    trainer.train()
    hook.remove()
    return weights(student), len(asked)


@pytest.mark.parametrize(
    ("make", "top_k"),
    [
        (bert, None),
        (llama, VOCABULARY),
        pytest.param(llama, None, marks=pytest.mark.slow),
        pytest.param(t5, VOCABULARY, marks=pytest.mark.slow),
        pytest.param(vit, None, marks=pytest.mark.slow),
    ],
)
def test_with_all_logits_the_training_is_the_same(make, top_k, tmp_path):
    expected, _ = distilled(make, tmp_path / "live")
    cache = TeacherCache(tmp_path / "cache", top_k)
    found, asked = distilled(make, tmp_path / "cached", cache)
    assert asked == 1  # 16 rows in one batch
    assert_close(found, expected, rtol=1e-4, atol=1e-6)
    again, asked = distilled(make, tmp_path / "again", TeacherCache(tmp_path / "cache", top_k))
    assert asked == 0
    assert_close(again, found, rtol=0, atol=0)


def opened(make, folder, top_k=None, per_part=1024, rows=16):
    """A filled cache, one batch of it, and the teacher's own logits there."""
    from accelerate import Accelerator

    _, teacher = pair(make)
    teacher.eval()
    cache = TeacherCache(folder, top_k)
    dataset = Numbered(examples(make, rows))
    count = partial(Counted.of, shifted=make is llama)
    with torch.no_grad():
        cache.prepare(
            teacher,
            dataset,
            numbered(collate),
            lambda batch: teacher(**batch).logits,
            count=count,
            accelerator=Accelerator(cpu=True),
            per_part=per_part,
        )
        batch = numbered(collate)([dataset[n] for n in (9, 2, 14)])
        row = batch.pop(ROW)
        counted = count(batch).predictions
        return cache, row, counted, teacher(**batch).logits


def test_rows_are_found_in_any_order_and_in_any_part(tmp_path):
    for per_part in (1, 5, 100):
        cache, rows, counted, expected = opened(llama, tmp_path, per_part=per_part)
        found = cache.logits(rows, counted)
        torch.testing.assert_close(found[counted], expected[counted], rtol=1e-5, atol=1e-6)
        assert not found[~counted].any()


def test_the_best_are_exact_and_the_rest_share_their_mass(tmp_path):
    cache, rows, counted, expected = opened(llama, tmp_path, top_k=5)
    found, wanted = (t[counted].softmax(-1) for t in (cache.logits(rows, counted), expected))
    best = wanted.topk(5)
    torch.testing.assert_close(found.gather(1, best.indices), best.values, rtol=1e-4, atol=1e-6)
    rest = torch.ones_like(wanted).scatter(1, best.indices, 0).bool()
    even = (1 - best.values.sum(1)) / (VOCABULARY - 5)
    torch.testing.assert_close(found[rest].view(len(found), -1), even[:, None].expand(-1, 35))


def test_other_data_or_another_teacher_has_a_cache_of_its_own(tmp_path):
    cache = tmp_path / "cache"
    teacher = pair(bert)[1]
    rows = examples(bert)

    def asked(**changes):
        made = TeacherCache(cache, changes.pop("top_k", None))
        return distilled(bert, tmp_path / "run", made, **{"teacher": teacher, **changes})[1]

    assert asked() == 1 and asked() == 0
    rows[3]["input_ids"][0] += 1
    assert asked(rows=rows) == 1
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-3
    assert asked() == 1
    assert asked(top_k=2) == 1
    assert len(list(cache.iterdir())) == 4


def test_a_making_that_was_cut_off_goes_on(tmp_path):
    opened(bert, tmp_path / "whole", per_part=4)
    (whole,) = (tmp_path / "whole").iterdir()
    half = tmp_path / "half" / f"{whole.name}.tmp"
    half.mkdir(parents=True)
    for name in ("part-00000.safetensors", "part-00002.safetensors"):
        (half / name).write_bytes((whole / name).read_bytes())
    (half / "part-00001.partial").write_bytes(b"cut off")
    before = (half / "part-00000.safetensors").stat().st_mtime_ns
    cache, rows, counted, expected = opened(bert, tmp_path / "half", per_part=4)
    torch.testing.assert_close(cache.logits(rows, counted), expected)
    done = tmp_path / "half" / whole.name
    assert (done / "part-00000.safetensors").stat().st_mtime_ns == before
    assert json.loads((done / "cache.json").read_text()) == {"parts": 4, "per_part": 4}
    assert not half.exists()


def test_what_a_cache_cannot_serve_is_refused(tmp_path):
    student, teacher = pair(bert)
    cache, rows = TeacherCache(tmp_path), examples(bert)
    with pytest.raises(RecipeError, match="hidden_weight to 0"):
        trainer_of(student, teacher, tmp_path, rows, teacher_cache=cache)
    with pytest.raises(RecipeError, match="whose rows have numbers"):
        trainer_of(student, teacher, tmp_path, iter(rows), teacher_cache=cache, **LOGITS_ONLY)
    with pytest.raises(RecipeError, match="top_k is 0"):
        TeacherCache(tmp_path, 0)

    def questions(width):
        return bert(BertForQuestionAnswering, width, num_labels=2)

    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    with pytest.raises(DataError, match="returns start_logits, end_logits and no logits"):
        distilled(questions, tmp_path, cache, rows=rows, task_weight=0.0)
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in examples(llama, 4)]
    with pytest.raises(DataError, match="does not fit what the batch counts"):
        distilled(llama, tmp_path, cache, rows=unlabelled, task_weight=0.0)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_collator_that_draws_is_refused(tmp_path):
    draws = numbered(lambda rows: {"input_ids": torch.rand(len(rows), 4)})
    with pytest.raises(RecipeError, match="draws anew for every batch"):
        TeacherCache(tmp_path).prepare(
            None, Numbered([{}] * 4), draws, None, count=None, accelerator=None
        )


def test_a_data_set_that_draws_is_refused(tmp_path):
    class Augmented(list):
        def __getitem__(self, index):
            image = super().__getitem__(index)
            return image | {"pixel_values": image["pixel_values"] + torch.randn(3, 8, 8)}

    cache = TeacherCache(tmp_path / "cache")
    with pytest.raises(RecipeError, match="data set or its collator draws anew"):
        distilled(vit, tmp_path, cache, rows=Augmented(examples(vit)))


def test_a_batch_that_counts_otherwise_is_refused(tmp_path):
    cache, rows, counted, _ = opened(llama, tmp_path)
    with pytest.raises(DataError, match=r"counts 0 predictions of row 9, the teacher's cache"):
        cache.logits(rows, torch.zeros_like(counted))


def two_process_main(folder):
    found, _ = distilled(
        llama, f"{folder}/run", TeacherCache(f"{folder}/cache"), rows=examples(llama, 40),
        per_device_train_batch_size=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.mark.slow
def test_two_processes_share_the_making(tmp_path):
    succeed(together(Path(__file__), tmp_path))
    expected, _ = distilled(
        llama, tmp_path / "one", rows=examples(llama, 40), train_sampling_strategy="sequential"
    )
    assert_close(torch.load(tmp_path / "found.pt"), expected, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    two_process_main(sys.argv[1])
    leave()
