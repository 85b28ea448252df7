"""Energy from counters that are files, as the kernel's are; and what a machine is called."""

import os
import time

import pytest
import torch
from counters import counting

from hfprune.evaluation import hardware
from hfprune.evaluation.hardware import energy_per_example, machine, metered


class Sleeper(torch.nn.Module):
    """Takes a known time for a batch."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids):
        time.sleep(self.seconds)


BATCH = {"input_ids": torch.ones(4, 8, dtype=torch.long), "labels": torch.zeros(4)}


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Where the counters are."""
    monkeypatch.setattr(hardware, "POWERCAP", tmp_path)
    monkeypatch.setattr(hardware, "ENERGY_SECONDS", 0.1)
    monkeypatch.setattr(hardware, "ENERGY_TURNS", 2)
    return tmp_path


def test_energy_is_power_times_time_of_all_packages(powercap):
    models = {"slow": Sleeper(0.02), "fast": Sleeper(0.005)}
    with counting(powercap, **{"package-0": 30, "package-1": 10, "psys": 500}):
        joules = energy_per_example(models, BATCH)
    # 40 W for the time of a batch, shared among its 4 examples; the machine may be slower.
    assert 0.9 * 40 * 0.02 / 4 < joules["slow"] < 3 * 40 * 0.02 / 4
    assert 0.9 * 40 * 0.005 / 4 < joules["fast"] < joules["slow"]


def test_work_of_any_length_is_metered(powercap, monkeypatch):
    """The counters begin anew several times meanwhile."""
    monkeypatch.setattr(hardware, "ENERGY_PAUSE", 0.02)
    with counting(powercap, largest=12_000_000, **{"package-0": 30}):
        start = time.perf_counter()
        with metered() as meter:
            time.sleep(1.5)
            joules = meter.joules()
        elapsed = time.perf_counter() - start
    assert 0.9 * 30 * 1.5 < joules <= 1.1 * 30 * elapsed


def test_a_counter_that_was_lost_meanwhile_is_no_measurement(powercap):
    with counting(powercap, **{"package-0": 30}) as made, metered() as meter:
        assert meter.joules() is not None
        made.stop()
        (powercap / "intel-rapl:0" / "energy_uj").rename(powercap / "away")
        assert meter.joules() is None
        (powercap / "away").rename(powercap / "intel-rapl:0" / "energy_uj")
        assert meter.joules() is None


def test_energy_is_never_made_up(powercap):
    models = {"one": Sleeper(0.001)}
    with counting(powercap, **{"package-0": 30}):
        pass
    assert energy_per_example(models, BATCH) == {}  # a counter that stands still
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert energy_per_example(models, BATCH) == {}  # one that cannot be read
    (powercap / "intel-rapl:0" / "name").write_text("dram")
    assert energy_per_example(models, BATCH) == {}  # none of a package


def test_without_counters_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "POWERCAP", tmp_path / "nowhere")
    start = time.perf_counter()
    assert energy_per_example({"one": Sleeper(1)}, BATCH) == {}
    assert time.perf_counter() - start < 0.5


def test_a_machine_tells_its_name_and_versions():
    found = machine()
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["cores"] == str(os.cpu_count())
    assert all(found.values())
    assert next(iter(found)) == "CPU"
