"""Measurements against models whose cost is known."""

import json
import sys
import time

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from hfprune.errors import CheckpointError, DataError, HfpruneError
from hfprune.evaluation import measure
from hfprune.evaluation.measure import (
    Latency,
    Measurement,
    check_length,
    file_bytes,
    measure_side_by_side,
    of_length,
    peak_memory,
)

MIB = 2**20


class Sleeper(torch.nn.Module):
    """Sleeps for a known time and writes its name into a shared diary."""

    def __init__(self, name, seconds, diary):
        super().__init__()
        self.name, self.seconds, self.diary = name, seconds, diary
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids):
        self.diary.append((self.name, len(input_ids), torch.get_num_threads()))
        time.sleep(self.seconds)


def batch_of(size, tokens=8):
    return {"input_ids": torch.ones(size, tokens, dtype=torch.long), "labels": torch.zeros(size)}


def test_models_take_turns_and_the_slower_one_is_slower():
    diary = []
    models = {"dense": Sleeper("dense", 0.006, diary), "pruned": Sleeper("pruned", 0.002, diary)}
    measured = measure_side_by_side(models, {1: batch_of(1), 4: batch_of(4)}, repeats=5)
    turns = 5 + measure.WARM_UP
    names = [(name, size) for name, size, _ in diary]
    assert names == [("dense", 1), ("pruned", 1)] * turns + [("dense", 4), ("pruned", 4)] * turns
    for size in (1, 4):
        dense, pruned = measured["dense"].latency[size], measured["pruned"].latency[size]
        assert pruned.median >= 0.002
        assert dense.median >= 0.006
        assert dense.median > pruned.median
        assert dense.low <= dense.median <= dense.high
        assert dense.repeats == 5


def test_threads_are_set_for_the_runs_and_restored():
    before, diary = torch.get_num_threads(), []
    wanted = before + 1
    measured = measure_side_by_side(
        {"one": Sleeper("one", 0, diary)}, {1: batch_of(1)}, repeats=1, threads=wanted
    )
    assert {threads for *_, threads in diary} == {wanted}
    assert measured["one"].threads == wanted
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": {}}, "0 models"),
        ({"batches": {}}, "0 batches"),
        ({"repeats": 0}, "0 repeats"),
        ({"batches": {32: batch_of(4)}}, "size 32 holds 4"),
        ({"folders": {"typo": "."}}, "typo"),
    ],
)
def test_nothing_to_measure_is_refused(arguments, message):
    given = {"models": {"one": Sleeper("one", 0, [])}, "batches": {1: batch_of(1)}}
    with pytest.raises(DataError, match=message):
        measure_side_by_side(**(given | arguments))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A BERT whose weights are nearly all one matrix of 16 MiB that every batch reads whole."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32768,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config).eval()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights_and_the_activations(saved):
    model, folder = saved
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # One FFN activation: 32 sentences, 8 tokens, 32768 neurons of 4 bytes. Two are alive at once,
    # before and after GELU; torch itself, some 200 MiB, must not be in the figure.
    activation = 32 * 8 * 32768 * 4
    for peak in peak_memory([folder, folder], batch_of(32)):  # the first leaves nothing behind
        assert weights + activation <= peak < weights + 2 * activation + 12 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_inputs_that_are_one_tensor_are_handed_over(saved):
    batch = batch_of(2)
    batch["token_type_ids"] = batch["position_ids"] = torch.zeros(2, 8, dtype=torch.long)
    assert peak_memory([saved[1]], batch)[0] > 0


def test_a_process_that_fails_says_why(saved, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho OSError: no config >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(HfpruneError, match="could not be measured: OSError: no config"):
        peak_memory([saved[1]], batch_of(1))


def test_the_folder_that_fails_is_named(tmp_path):
    save_file(batch_of(1), tmp_path / "inputs")
    with pytest.raises(HfpruneError, match=f"{tmp_path}: .*config.json"):
        measure._peaks_in_this_process("cpu", str(tmp_path / "inputs"), str(tmp_path))


def test_folder_figures_are_part_of_the_measurement(saved, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(
        measure, "peak_memory", lambda given, *_: [123 if f == folder else None for f in given]
    )
    measured = measure_side_by_side(
        {"dense": model, "other": model},
        {1: batch_of(1), 2: batch_of(2)},
        folders={"dense": folder},
        repeats=2,
    )
    assert measured["dense"].peak_memory == 123
    assert measured["dense"].file_bytes == (folder / "model.safetensors").stat().st_size
    assert measured["other"].peak_memory is None
    assert measured["other"].file_bytes is None
    assert measured["dense"].latency_by_length == {}
    again = Measurement.from_dict(json.loads(json.dumps(measured["dense"].to_dict())))
    assert again == measured["dense"]


def test_file_bytes_counts_every_shard_and_nothing_else(tmp_path):
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 5), ("x.json", 99)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert file_bytes(tmp_path) == 15
    with pytest.raises(CheckpointError, match="safetensors"):
        file_bytes(tmp_path / "empty")


def test_lengths_are_timed_at_every_batch_size():
    seen = []

    class Reader(Sleeper):
        def forward(self, input_ids, attention_mask):
            seen.append((self.name, tuple(input_ids.shape), int(attention_mask.sum())))
            time.sleep(1e-5 * input_ids.numel())

    def padded(size):
        batch = batch_of(size)
        return batch | {"attention_mask": torch.ones(size, 8).triu().long()}

    models = {name: Reader(name, 0, []) for name in ("dense", "pruned")}
    batches = {1: padded(1), 4: padded(4)}
    measured = measure_side_by_side(models, batches, lengths=(16, 200), repeats=2)
    for name in models:
        line = measured[name].latency_by_length
        assert {size: list(lengths) for size, lengths in line.items()} == {
            1: [16, 200],
            4: [16, 200],
        }
        assert line[4][200].median > line[4][16].median >= 4 * 16 * 1e-5
        assert measured[name].latency.keys() == {1, 4}
        again = Measurement.from_dict(json.loads(json.dumps(measured[name].to_dict())))
        assert again == measured[name]
    timed = [run for run in seen if run[1] == (4, 200)]
    assert timed == [("dense", (4, 200), 800), ("pruned", (4, 200), 800)] * (2 + measure.WARM_UP)


def test_a_batch_of_a_length_repeats_its_own_tokens():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([0, 1]),
    }
    batch["decoder_input_ids"] = torch.tensor([[1, 5, 6], [1, 8, 9]])
    made = of_length(batch, 7)
    assert made["input_ids"].tolist() == [[5, 6, 5, 6, 5, 6, 7], [8, 8, 8, 8, 8, 8, 9]]
    assert made["attention_mask"].tolist() == [[1] * 7] * 2
    assert made["labels"] is batch["labels"]
    assert made["decoder_input_ids"] is batch["decoder_input_ids"]
    assert of_length(batch, 2)["input_ids"].tolist() == [[5, 7], [8, 9]]
    assert of_length(batch, 1)["input_ids"].tolist() == [[7], [9]]
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    left = {"input_ids": batch["input_ids"].flip(1), "attention_mask": mask}
    assert of_length(left, 3)["input_ids"].tolist() == [[7, 7, 7], [9, 9, 8]]
    pair = {"input_ids": torch.tensor([[5, 2, 2, 6, 2]])}  # as bart has them
    assert of_length(pair, 6)["input_ids"].tolist() == [[5, 6, 5, 6, 5, 2]]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_classifiers_that_read_a_texts_end_are_measured_at_a_length(family):
    model = tiny.model(family, "AutoModelForSequenceClassification")
    ids = torch.randint(5, 20, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, end in enumerate((2, 3, 5, 6)):
        mask[row, : end + 1] = 1
        ids[row, end], ids[row, end + 1 :] = model.config.eos_token_id, model.config.pad_token_id
    batch = {"input_ids": ids, "attention_mask": mask}
    measured = measure_side_by_side({"one": model}, {4: batch}, lengths=(3, 12), repeats=1)
    assert measured["one"].latency_by_length[4].keys() == {3, 12}


def test_a_length_that_a_model_does_not_run_at_is_refused_at_once(saved):
    model, _ = saved
    check_length(model, batch_of(2), 16)
    diary = []
    with pytest.raises(DataError, match=r"17 tokens .*max_position_embeddings is 16"):
        measure_side_by_side(
            {"fine": Sleeper("fine", 0, diary), "dense": model}, {2: batch_of(2)}, lengths=(4, 17)
        )
    assert len(diary) <= 1  # tried, not timed


def test_a_measurement_from_before_lengths_is_read():
    plain = Measurement("cpu", 2, {1: Latency(0.2, 0.1, 0.3, 5)})
    values = plain.to_dict()
    del values["latency_by_length"]
    assert Measurement.from_dict(json.loads(json.dumps(values))) == plain
