"""What a machine says of itself: its parts and versions, and the energy that it draws."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune.evaluation.evaluate import inference, model_inputs

if TYPE_CHECKING:
    import torch

ENERGY_TURNS, ENERGY_SECONDS = 5, 1.0
"""How often, and how long each time, a model runs while its energy is read; the counters tick in
milliseconds.
"""

ENERGY_PAUSE = 60.0
"""Seconds between two looks at the counters during long work."""

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the energy counters of Intel's and AMD's processors (RAPL)."""


def machine() -> dict[str, str]:
    """What this process runs on: hardware, system and versions, as a report names them."""
    import psutil
    import torch
    import transformers

    from hfprune.planning.latency import processor

    return {
        "CPU": processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hfprune": version("hfprune"),
    }


def energy_per_example(
    models: Mapping[str, torch.nn.Module], batch: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Joules that the processors draw per example, by model; of all that runs on them meanwhile.

    Read from the hardware's own counters (RAPL, which on most systems only root may read) while the
    models take turns in running the batch; close other programs first. Memory is in it only where
    the package counts it. Empty where no counter can be read, and for models that are not on the
    CPU: a processor's nominal power would be an estimate.
    """
    meter = EnergyMeter()
    if meter.joules() is None or any(next(m.parameters()).is_cuda for m in models.values()):
        return {}
    spent, examples = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    for _ in range(ENERGY_TURNS):
        for name, model in models.items():
            with inference(model) as device:
                inputs = model_inputs(batch, device)
                model(**inputs)
                meter.restart()
                start = time.perf_counter()
                while time.perf_counter() - start < ENERGY_SECONDS:
                    model(**inputs)
                    examples[name] += len(next(iter(batch.values())))
                joules = meter.joules()
            if joules is None:
                return {}
            spent[name] += joules
    # A virtual machine may show counters that stand still.
    return {name: spent[name] / examples[name] for name in models if spent[name] > 0}


class EnergyMeter:
    """What all processor packages draw, by their counters, from the moment they are first read."""

    def __init__(self) -> None:
        zones = sorted(POWERCAP.glob("intel-rapl:*"))
        self._packages = [z for z in zones if _read(z / "name").startswith("package")]
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        with self._lock:
            self._before = [_read(zone / "energy_uj") for zone in self._packages]
            self._microjoules, self._readable = 0, bool(self._packages)

    def joules(self) -> float | None:
        """Joules drawn since; None if a counter could not be read, or if there is none.

        A counter begins anew at its largest value, after an hour or less of hard work: ask in time.
        """
        with self._lock:
            for index, zone in enumerate(self._packages):
                before, after = self._before[index], _read(zone / "energy_uj")
                if not (before and after):
                    self._readable = False
                    break
                drawn = int(after) - int(before)
                if drawn < 0:
                    drawn += int(_read(zone / "max_energy_range_uj"))
                self._microjoules += drawn
                self._before[index] = after
            return self._microjoules / 1e6 if self._readable else None


@contextmanager
def metered() -> Iterator[EnergyMeter]:
    """A meter for work of any length: a thread asks it in time."""
    meter, done = EnergyMeter(), threading.Event()

    def ask() -> None:
        while not done.wait(ENERGY_PAUSE):
            meter.joules()

    thread = threading.Thread(target=ask, daemon=True)
    if meter.joules() is not None:
        thread.start()
    try:
        yield meter
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def _read(path: Path) -> str:
    """A file's text without spaces at its ends; nothing if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
