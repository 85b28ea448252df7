"""Energy from counters that are files, as the kernel's are; and what a machine is called."""

import os
import threading
import time

import pytest
import torch

from hfprune.evaluation import hardware
from hfprune.evaluation.hardware import energy_per_example, machine

LARGEST = 1_000_000_000


class Counters:
    """A powercap folder whose packages draw a known power, until it is stopped."""

    def __init__(self, folder, watts):
        self.zones = []
        for number, (name, power) in enumerate(watts.items()):
            zone = folder / f"intel-rapl:{number}"
            zone.mkdir()
            (zone / "name").write_text(f"{name}\n")
            (zone / "max_energy_range_uj").write_text(f"{LARGEST}\n")
            self.zones.append((zone / "energy_uj", power))
        self.start = time.perf_counter()
        self.write()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def write(self):
        elapsed = time.perf_counter() - self.start
        for path, watts in self.zones:
            # They begin near the end of their range: every one starts anew soon.
            count = int(LARGEST - 50_000 * watts + elapsed * watts * 1e6) % LARGEST
            temporary = path.with_suffix(".tmp")
            temporary.write_text(f"{count}\n")
            os.replace(temporary, path)

    def run(self):
        while not self.stopped.wait(0.002):
            self.write()


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
def counters(tmp_path, monkeypatch):
    made = []

    def make(**watts):
        monkeypatch.setattr(hardware, "POWERCAP", tmp_path)
        monkeypatch.setattr(hardware, "ENERGY_SECONDS", 0.1)
        monkeypatch.setattr(hardware, "ENERGY_TURNS", 2)
        made.append(Counters(tmp_path, watts))
        made[-1].thread.start()
        return made[-1]

    yield make
    for counter in made:
        counter.stopped.set()
        counter.thread.join()


def test_energy_is_power_times_time_of_all_packages(counters):
    counters(**{"package-0": 30, "package-1": 10, "psys": 500})
    models = {"slow": Sleeper(0.02), "fast": Sleeper(0.005)}
    joules = energy_per_example(models, BATCH)
    # 40 W for the time of a batch, shared among its 4 examples; the machine may be slower.
    assert 0.9 * 40 * 0.02 / 4 < joules["slow"] < 3 * 40 * 0.02 / 4
    assert 0.9 * 40 * 0.005 / 4 < joules["fast"] < joules["slow"]


def test_energy_is_never_made_up(counters, tmp_path):
    models = {"one": Sleeper(0.001)}
    made = counters(**{"package-0": 30})
    made.stopped.set()
    made.thread.join()
    assert energy_per_example(models, BATCH) == {}  # a counter that stands still
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert energy_per_example(models, BATCH) == {}  # one that cannot be read
    (tmp_path / "intel-rapl:0" / "name").write_text("dram")
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
