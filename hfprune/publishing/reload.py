"""Load a saved or published model in fresh processes, by hfprune and without it, and compare what
it says with what it should.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hfprune.errors import CheckpointError

WAYS = {
    "hfprune": "hfprune.from_pretrained",
    "remote-code": "trust_remote_code without hfprune",
    "stock": "plain transformers without hfprune",
}
"""The ways to load a model, and what to call them."""

_SCRIPT = """
import sys
source, way, revision, name, inputs, out = sys.argv[1:]
if way != "hfprune":
    sys.modules["hfprune"] = None  # importing it is an error now
import torch, transformers
from safetensors.torch import load_file, save_file
options = {"revision": revision} if revision else {}
if way == "hfprune":
    import hfprune
    model = hfprune.from_pretrained(source, **options)
elif way == "stock":
    model = getattr(transformers, name).from_pretrained(source, **options)
else:
    config = transformers.AutoConfig.from_pretrained(source, **options)
    auto = next(a for a, path in config.auto_map.items() if path.endswith("." + name))
    model = getattr(transformers, auto).from_pretrained(source, trust_remote_code=True, **options)
batch = load_file(inputs)
with torch.no_grad():
    outputs = model.eval()(**batch)[0] if batch else torch.zeros(0)
save_file({"outputs": outputs.contiguous()}, out)
"""


def reload_and_compare(
    source: str | os.PathLike[str],
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    ways: Sequence[str],
    *,
    revision: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, float | None]:
    """Load a model in fresh processes and compare its outputs on a batch.

    Args:
        source: folder or Hub id.
        model: what must come back, in eval mode.
        batch: what it is called with; empty to see only that it loads.
        ways: names in `WAYS`.
        revision: of the Hub id.
        environment: variables of the processes, besides those of this one.

    Returns:
        {way: largest absolute difference of the outputs; None if the batch is empty}.

    Raises:
        CheckpointError: a process failed, or outputs differ by more than 1e-5.
    """
    from safetensors.torch import load_file, save_file

    with torch.no_grad():
        expected = model(**batch)[0] if batch else torch.zeros(0)
    variables = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **(environment or {})}
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="hfprune-reload-") as folder:
        inputs, out = Path(folder, "inputs"), Path(folder, "outputs")
        save_file(dict(batch), inputs)
        for way in ways:
            arguments = [source, way, revision or "", type(model).__name__, inputs, out]
            ended = subprocess.run(
                [sys.executable, "-c", _SCRIPT, *map(str, arguments)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **variables},
            )
            if ended.returncode:
                raise CheckpointError(
                    f"{source} did not reload by {WAYS[way]}: {ended.stderr[-2000:]}"
                )
            got = load_file(out)["outputs"]
            if not torch.allclose(got.float(), expected.float(), rtol=0, atol=1e-5):
                raise CheckpointError(f"{source} reloaded by {WAYS[way]} gives other outputs.")
            found[way] = float((got - expected).abs().max()) if batch else None
    return found
