"""Load a saved or published model in a fresh process, without hfprune and by it, and compare what
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
source, revision, name, folder, *ways = sys.argv[1:]
sys.modules["hfprune"] = None  # importing it is an error until its turn
import torch, transformers
from safetensors.torch import load_file, save_file
options = {"revision": revision} if revision else {}
batch = load_file(f"{folder}/inputs")
for way in ways:
    if way == "stock":
        model = getattr(transformers, name).from_pretrained(source, **options)
    elif way == "remote-code":
        config = transformers.AutoConfig.from_pretrained(source, **options)
        auto = next(a for a, path in config.auto_map.items() if path.endswith("." + name))
        load = getattr(transformers, auto).from_pretrained
        model = load(source, trust_remote_code=True, **options)
    else:
        del sys.modules["hfprune"]
        import hfprune
        model = hfprune.from_pretrained(source, **options)
    with torch.no_grad():
        outputs = model.eval()(**batch)[0] if batch else torch.zeros(0)
    save_file({"outputs": outputs.contiguous()}, f"{folder}/{way}")
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
    """Load a model in a fresh process, by one way after another, and compare its outputs on a
    batch. hfprune is imported only when the ways without it are done.

    Args:
        source: folder or Hub id.
        model: what must come back, in eval mode.
        batch: what it is called with; empty to see only that it loads.
        ways: names in `WAYS`.
        revision: of the Hub id.
        environment: variables of the process, besides those of this one.

    Returns:
        {way: largest absolute difference of the outputs; None if the batch is empty}.

    Raises:
        CheckpointError: a way failed, or its outputs differ by more than 1e-5.
    """
    from safetensors.torch import load_file, save_file

    with torch.no_grad():
        expected = model(**batch)[0] if batch else torch.zeros(0)
    variables = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **(environment or {})}
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="hfprune-reload-") as folder:
        save_file(dict(batch), Path(folder, "inputs"))
        in_turn = sorted(ways, key="hfprune".__eq__)
        arguments = [source, revision or "", type(model).__name__, folder, *in_turn]
        ended = subprocess.run(
            [sys.executable, "-c", _SCRIPT, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **variables},
        )
        if ended.returncode:
            missing = (way for way in in_turn if not Path(folder, way).is_file())
            failed = WAYS[next(missing, in_turn[-1])]
            raise CheckpointError(f"{source} did not reload by {failed}: {ended.stderr[-2000:]}")
        for way in ways:
            got = load_file(Path(folder, way))["outputs"]
            if not torch.allclose(got.float(), expected.float(), rtol=0, atol=1e-5):
                raise CheckpointError(f"{source} reloaded by {WAYS[way]} gives other outputs.")
            found[way] = float((got - expected).abs().max()) if batch else None
    return found
