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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfprune.errors import CheckpointError, DataError, HfpruneError
from hfprune.evaluation.evaluate import inference, model_inputs
from hfprune.evaluation.hardware import energy_per_example

if TYPE_CHECKING:
    import torch

WARM_UP = 3
"""Untimed runs of each model before the timed ones."""


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
        latency: By batch size, on the examples as they are.
        latency_by_length: By batch size, then by tokens of an example; empty if no lengths were
            asked for.
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
    latency_by_length: dict[int, dict[int, Latency]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON (whose keys are strings)."""
        by_length = self.latency_by_length.items()
        return asdict(self) | {
            "latency": _with_text_keys(self.latency),
            "latency_by_length": {str(size): _with_text_keys(line) for size, line in by_length},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The Measurement that `to_dict` wrote."""
        by_length = data.get("latency_by_length", {}).items()
        latencies = {
            "latency": _with_number_keys(data["latency"]),
            "latency_by_length": {int(size): _with_number_keys(line) for size, line in by_length},
        }
        return cls(**{**data, **latencies})


def measure_side_by_side(
    models: Mapping[str, torch.nn.Module],
    batches: Mapping[int, Mapping[str, torch.Tensor]],
    *,
    folders: Mapping[str, str | Path] | None = None,
    lengths: Sequence[int] = (),
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Measurement]:
    """Measure models against each other on the same batches.

    The timed runs take turns (A B C A B C ...), so a machine that slows down for a while slows
    them all and not one of them. Memory is read in a fresh process.

    Args:
        models: By name.
        batches: A batch per batch size, such as `{1: ..., 32: ...}`; labels are left out.
        folders: Where models are saved, by the same names, for memory and file size.
        lengths: Tokens of an example; each batch is timed again at each of these lengths.
        repeats: Timed runs of each model at each batch size and length.
        threads: CPU threads of an operation; None leaves torch's own number.

    Raises:
        DataError: Nothing to measure, a batch that is not of its size, a folder of no model, or a
            length that a model does not run at.
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
    if lengths:
        for model in models.values():
            check_length(model, batches[min(batches)], max(lengths))
    largest = batches[max(batches)]
    measured = {}
    with _threads(threads):
        latency = {size: _interleaved(models, batch, repeats) for size, batch in batches.items()}
        by_length = {
            size: {n: _interleaved(models, of_length(batch, n), repeats) for n in lengths}
            for size, batch in batches.items()
        }
        energy = energy_per_example(models, largest)
        devices = {name: str(next(model.parameters()).device) for name, model in models.items()}
        peaks: dict[str, int | None] = {}
        for device in {devices[name] for name in folders}:
            there = {name: folder for name, folder in folders.items() if devices[name] == device}
            peaks |= zip(there, peak_memory(list(there.values()), largest, device), strict=True)
        for name in models:
            folder = folders.get(name)
            measured[name] = Measurement(
                device=devices[name],
                threads=torch.get_num_threads(),
                latency={size: latency[size][name] for size in batches},
                peak_memory=peaks.get(name),
                file_bytes=file_bytes(folder) if folder else None,
                energy_per_example=energy.get(name),
                latency_by_length={
                    size: {n: of_models[name] for n, of_models in line.items()}
                    for size, line in by_length.items()
                    if line
                },
            )
    return measured


def of_length(batch: Mapping[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """A batch of examples of so many tokens each, without padding: each example's own ones over and
    over, and its last one at the end only, as classifiers that read a text's one end need it.

    Args:
        batch: {name: (examples, tokens)}; what has other shapes, and what a decoder reads, stays
            as it is.
        tokens: how many the examples get.
    """
    import torch

    ids = batch["input_ids"]
    given, mask = ids.shape, batch.get("attention_mask", torch.ones_like(ids))
    places = torch.stack([_places(*row, tokens) for row in zip(ids, mask, strict=True)])
    made = dict(batch)
    for name, tensor in batch.items():
        if tensor.shape == given and not name.startswith("decoder_"):
            made[name] = tensor.gather(1, places.to(tensor.device))
    if "attention_mask" in made:
        made["attention_mask"] = made["attention_mask"].new_ones(given[0], tokens)
    return made


def _places(ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which tokens of an example come one after another in one of another length."""
    import torch

    (real,) = mask.nonzero(as_tuple=True)
    if not len(real):  # a text of nothing
        real = torch.zeros_like(ids[:1])
    last = real[-1:]
    others = real[ids[real] != ids[last]]
    if not len(others):
        others = last
    return torch.cat([others.repeat(-(-tokens // len(others)))[: tokens - 1], last])


def check_length(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], tokens: int) -> None:
    """Try one example of so many tokens, before anything that takes long.

    Raises:
        DataError: The model does not run on it; most often it has no embeddings of so many
            positions.
    """
    one = {name: tensor[:1] for name, tensor in of_length(batch, tokens).items()}
    try:
        with inference(model) as device:
            model(**model_inputs(one, device))
    except (IndexError, RuntimeError, ValueError) as error:
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        raise DataError(
            f"The model does not run on examples of {tokens} tokens ({error})."
            + (f" Its max_position_embeddings is {most}." if most else "")
            + " Give shorter ones."
        ) from error


def peak_memory(
    folders: Sequence[str | Path],
    batch: Mapping[str, torch.Tensor],
    device: str | torch.device = "cpu",
) -> list[int | None]:
    """Bytes that saved models need at their peak, each from loading it to the end of one forward
    pass.

    On the CPU: how far the resident memory of a fresh process rises above what it was just before
    loading. That process has loaded and run the model once already and freed it, so that
    libraries, imports and thread pools, which weigh more than a small model, are not counted.
    Pages of the weight file are counted once they are touched. Linux only: None elsewhere, or
    where the kernel does not let a process reset its high-water mark. On CUDA: what torch's
    allocator held at most.

    Args:
        folders: Saved models, loaded by `hfprune.from_pretrained` one after another in the same
            process, whose start takes longer than a small model.
        batch: What to run them on; labels are left out.
        device: Where to run them.

    Raises:
        HfpruneError: A model does not load or run in the fresh process.
    """
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "inputs.safetensors")
        tensors = model_inputs(batch, torch.device("cpu"))
        # A copy each: two names of one tensor cannot be saved.
        copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        save_file(copies, inputs)
        run = subprocess.run(
            [sys.executable, "-m", __name__, str(device), str(inputs), *map(str, folders)],
            # Freed tensors go back to the system at once, and not to a heap that hides them.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise HfpruneError(f"Peak memory could not be measured: {reason}")
    peaks: list[int | None] = json.loads(run.stdout.splitlines()[-1])
    return peaks


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


def _with_text_keys(line: Mapping[int, Latency]) -> dict[str, Any]:
    return {str(number): asdict(latency) for number, latency in line.items()}


def _with_number_keys(line: Mapping[str, Any]) -> dict[int, Latency]:
    return {int(number): Latency(**values) for number, values in line.items()}


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


def _peak_in_this_process(
    folder: str, inputs: Mapping[str, torch.Tensor], device: str
) -> int | None:
    """What `peak_memory` returns of one model, measured in this process: meant for a fresh one."""
    import torch

    from hfprune.structure.checkpoint import from_pretrained

    def load_and_run() -> None:
        model: torch.nn.Module = from_pretrained(folder)
        model.to(device)
        with inference(model):
            model(**inputs)

    load_and_run()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        load_and_run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is now
        before = _resident("VmRSS")
        load_and_run()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _peaks_in_this_process(device: str, inputs_file: str, *folders: str) -> list[int | None]:
    from safetensors.torch import load_file

    inputs, peaks = load_file(inputs_file, device=device), []
    for folder in folders:
        try:
            peaks.append(_peak_in_this_process(folder, inputs, device))
        except Exception as error:
            # In one line: the last one is what the other process reads.
            raise HfpruneError(f"{folder}: {error!r}") from error
    return peaks


def _resident(field: str) -> int:
    """Bytes of this process: `VmRSS` (now) or `VmHWM` (at most so far).

    Not `getrusage`: a child's `ru_maxrss` begins at the size of the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines[field].split()[0]) * 1024  # the file says kB and means KiB


if __name__ == "__main__":
    print(json.dumps(_peaks_in_this_process(*sys.argv[1:])))
