"""What models cost where they run: latency, peak memory, weight files and energy, side by side.

Everything here is measured, and what cannot be measured on this machine is None. Parameters and
MACs, which are counted and not measured, live in `hfprune.structure.cost`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfprune.errors import CheckpointError, DataError, HfpruneError
from hfprune.evaluation.evaluate import inference, model_inputs

if TYPE_CHECKING:
    import torch

WARM_UP = 3
"""Untimed runs of each model before the timed ones."""

ENERGY_SECONDS = 5.0
"""How long a model runs while its energy is read: counters tick in milliseconds."""

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of one forward pass over a whole batch.

    Attributes:
        median: Half of the runs were faster.
        low: First quartile.
        high: Third quartile.
        repeats: How many timed runs.
    """

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Measurement:
    """What one model cost on one device.

    Attributes:
        device: Where the model ran, such as `cpu` or `cuda:0`.
        threads: CPU threads of an operation.
        latency: By batch size.
        peak_memory: Bytes that loading the model and one pass over the largest batch need at
            their peak, see `peak_memory`; None without a folder or where it cannot be read.
        file_bytes: Bytes of the saved weights; None without a folder.
        energy_per_example: Joules, see `energy_per_example`; None where it cannot be read.
    """

    device: str
    threads: int
    latency: dict[int, Latency]
    peak_memory: int | None = None
    file_bytes: int | None = None
    energy_per_example: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON (whose keys are strings)."""
        return asdict(self) | {
            "latency": {str(size): asdict(latency) for size, latency in self.latency.items()}
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The Measurement that `to_dict` wrote."""
        latency = {int(size): Latency(**values) for size, values in data["latency"].items()}
        return cls(**{**data, "latency": latency})


def measure_side_by_side(
    models: Mapping[str, torch.nn.Module],
    batches: Mapping[int, Mapping[str, torch.Tensor]],
    *,
    folders: Mapping[str, str | Path] | None = None,
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Measurement]:
    """Measure models against each other on the same batches.

    The timed runs take turns (A B C A B C ...), so a machine that slows down for a while slows
    them all and not one of them. Memory is read in a fresh process per folder.

    Args:
        models: By name.
        batches: A batch per batch size, such as `{1: ..., 32: ...}`; labels are left out.
        folders: Where models are saved, by the same names, for memory and file size.
        repeats: Timed runs of each model at each batch size.
        threads: CPU threads of an operation; None leaves torch's own number.

    Raises:
        DataError: Nothing to measure, a batch that is not of its size, or a folder of no model.
    """
    import torch

    folders = folders or {}
    if not models or not batches or repeats < 1:
        raise DataError(
            f"Nothing to measure: {len(models)} models, {len(batches)} batches and {repeats} "
            "repeats given; at least one of each is needed."
        )
    if strangers := folders.keys() - models.keys():
        raise DataError(
            f"Folders given for {', '.join(sorted(strangers))}, but the models are "
            f"{', '.join(sorted(models))}: use the same names."
        )
    for size, batch in batches.items():
        if (given := _examples(batch)) != size:
            raise DataError(f"The batch given for size {size} holds {given} examples.")
    largest = batches[max(batches)]
    measured = {}
    with _threads(threads):
        latency = {size: _interleaved(models, batch, repeats) for size, batch in batches.items()}
        for name, model in models.items():
            device = next(model.parameters()).device
            folder = folders.get(name)
            measured[name] = Measurement(
                device=str(device),
                threads=torch.get_num_threads(),
                latency={size: latency[size][name] for size in batches},
                peak_memory=peak_memory(folder, largest, device) if folder else None,
                file_bytes=file_bytes(folder) if folder else None,
                energy_per_example=energy_per_example(model, largest),
            )
    return measured


def peak_memory(
    folder: str | Path, batch: Mapping[str, torch.Tensor], device: str | torch.device = "cpu"
) -> int | None:
    """Bytes a saved model needs at its peak, from loading it to the end of one forward pass.

    On the CPU: how far the resident memory of a fresh process rises above what it was just before
    loading. That process has loaded and run the model once already and freed it, so that
    libraries, imports and thread pools, which weigh more than a small model, are not counted.
    Pages of the weight file are counted once they are touched. Linux only: None elsewhere, or
    where the kernel does not let a process reset its high-water mark. On CUDA: what torch's
    allocator held at most.

    Args:
        folder: A saved model, loaded by `hfprune.from_pretrained`.
        batch: What to run it on; labels are left out.
        device: Where to run it.

    Raises:
        HfpruneError: The model does not load or run in the fresh process.
    """
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "inputs.safetensors")
        tensors = model_inputs(batch, torch.device("cpu"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, inputs)
        run = subprocess.run(
            [sys.executable, "-m", __name__, str(folder), str(inputs), str(device)],
            # Freed tensors go back to the system at once, and not to a heap that hides them.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise HfpruneError(f"Peak memory of {str(folder)!r} could not be measured: {reason}")
    peak: int | None = json.loads(run.stdout.splitlines()[-1])
    return peak


def file_bytes(folder: str | Path) -> int:
    """Bytes of a saved model's weights: its *.safetensors, without configuration and tokenizer.

    Raises:
        CheckpointError: The folder holds no weights.
    """
    weights = list(Path(folder).glob("*.safetensors"))
    if not weights:
        raise CheckpointError(
            f"No *.safetensors in {str(folder)!r}: give the folder that save_pretrained wrote."
        )
    return sum(file.stat().st_size for file in weights)


def energy_per_example(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> float | None:
    """Joules the CPU packages draw per example, all that runs on them included.

    Read from the hardware's own counters (RAPL) through codecarbon while the model runs the batch
    for `ENERGY_SECONDS`; close other programs first. None without codecarbon, without readable
    counters, or off the CPU: codecarbon would fall back on the processor's nominal power, which
    is an estimate.
    """
    try:
        from codecarbon.core.cpu import IntelRAPL, is_rapl_available
        from codecarbon.core.units import Time
    except ImportError:
        return None
    if next(model.parameters()).device.type != "cpu" or not is_rapl_available():
        return None
    with inference(model) as device:
        inputs = model_inputs(batch, device)
        model(**inputs)
        meter = IntelRAPL()
        meter.start()
        passes, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < ENERGY_SECONDS:
            model(**inputs)
            passes += 1
        details = meter.get_cpu_details(Time(seconds=elapsed))
    joules = JOULES_PER_KWH * sum(kwh for name, kwh in details.items() if "Energy" in name)
    return joules / (passes * _examples(batch)) if joules > 0 else None


def _interleaved(
    models: Mapping[str, torch.nn.Module], batch: Mapping[str, torch.Tensor], repeats: int
) -> dict[str, Latency]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        inputs = {
            name: model_inputs(batch, stack.enter_context(inference(model)))
            for name, model in models.items()
        }
        for turn in range(WARM_UP + repeats):
            for name, model in models.items():
                elapsed = _seconds(model, inputs[name])
                if turn >= WARM_UP:
                    seconds[name].append(elapsed)
    return {name: _latency(values) for name, values in seconds.items()}


def _seconds(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    import torch

    cuda = any(tensor.is_cuda for tensor in inputs.values())
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**inputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _latency(seconds: list[float]) -> Latency:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return Latency(float(median), float(low), float(high), len(seconds))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _examples(batch: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))


def _peak_in_this_process(folder: str, inputs_file: str, device: str) -> int | None:
    """What `peak_memory` returns, measured in this process: meant for a fresh one."""
    import torch
    from safetensors.torch import load_file

    from hfprune.structure.checkpoint import from_pretrained

    inputs = load_file(inputs_file, device=device)

    def load_and_run() -> None:
        model: torch.nn.Module = from_pretrained(folder)
        model.to(device)
        with inference(model):
            model(**inputs)

    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        load_and_run()
        return torch.cuda.max_memory_allocated(device) - before
    load_and_run()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is now
        before = _resident("VmRSS")
        load_and_run()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(field: str) -> int:
    """Bytes of this process: `VmRSS` (now) or `VmHWM` (at most so far).

    Not `getrusage`: a child's `ru_maxrss` begins at the size of the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines[field].split()[0]) * 1024  # the file says kB and means KiB


if __name__ == "__main__":
    print(json.dumps(_peak_in_this_process(*sys.argv[1:])))
