"""Measurements against models whose cost is known."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hfprune.errors import CheckpointError, DataError, HfpruneError
from hfprune.evaluation import measure
from hfprune.evaluation.measure import (
    Measurement,
    energy_per_example,
    file_bytes,
    measure_side_by_side,
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
    peak = peak_memory(folder, batch_of(32))
    assert weights + activation <= peak < weights + 2 * activation + 12 * MIB


def test_a_process_that_fails_says_why(saved, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho OSError: no config >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(HfpruneError, match="could not be measured: OSError: no config"):
        peak_memory(saved[1], batch_of(1))


def test_folder_figures_are_part_of_the_measurement(saved, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(measure, "peak_memory", lambda *given: 123 if given[0] == folder else None)
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
    again = Measurement.from_dict(json.loads(json.dumps(measured["dense"].to_dict())))
    assert again == measured["dense"]


def test_file_bytes_counts_every_shard_and_nothing_else(tmp_path):
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 5), ("x.json", 99)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert file_bytes(tmp_path) == 15
    with pytest.raises(CheckpointError, match="safetensors"):
        file_bytes(tmp_path / "empty")


@pytest.fixture
def meter(monkeypatch):
    """A stand-in for codecarbon's reader of the hardware counters: 1e-6 kWh, that is 3.6 J."""
    state = SimpleNamespace(readable=True, kwh=1e-6)

    class Rapl:
        def start(self):
            pass

        def get_cpu_details(self, duration):
            return {"Processor Energy Delta_0(kWh)": state.kwh, "Processor Power Delta_0(kWh)": 9.0}

    cpu, units = ModuleType("codecarbon.core.cpu"), ModuleType("codecarbon.core.units")
    cpu.IntelRAPL, cpu.is_rapl_available = Rapl, lambda: state.readable
    units.Time = lambda seconds: seconds
    for module in (ModuleType("codecarbon"), ModuleType("codecarbon.core"), cpu, units):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(measure, "ENERGY_SECONDS", 0.05)
    return state


def test_energy_is_shared_among_the_examples_run(meter):
    diary = []
    joules = energy_per_example(Sleeper("one", 0.01, diary), batch_of(4))
    assert joules == pytest.approx(3.6 / (4 * (len(diary) - 1)))  # the first pass is a warm-up


@pytest.mark.parametrize("state", [{"readable": False}, {"kwh": 0.0}])
def test_energy_is_never_made_up(meter, state):
    vars(meter).update(state)
    assert energy_per_example(Sleeper("one", 0.01, []), batch_of(4)) is None


def test_without_codecarbon_there_is_no_energy(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setitem(sys.modules, "codecarbon.core.cpu", None)
    assert energy_per_example(Sleeper("one", 0, []), batch_of(1)) is None
