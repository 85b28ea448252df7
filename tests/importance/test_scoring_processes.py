"""One process's scores are the oracle: several processes, sharded and offloaded weights, bf16."""

import gc
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import dispatch_model
from launching import LAUNCHER, environment, free_port, succeed, together
from test_gates import make
from test_scoring import assert_same, rows
from transformers import LlamaForCausalLM

from hfprune.errors import UnsupportedModelError
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import Gathering, rank_correlation, score
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.checkpoint import from_pretrained
from hfprune.structure.surgery import copy_and_cut

pytestmark = pytest.mark.xdist_group("forks")  # one worker imports what they are forked with

WORKER = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
from hfprune.errors import DataError
from hfprune.importance.scoring import score
from hfprune.structure.checkpoint import from_pretrained
folder, sharded = sys.argv[1], sys.argv[2] == "sharded"
dist.init_process_group("gloo")
rank = dist.get_rank()
model = from_pretrained(folder)
if sharded:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
batches = torch.load(f"{folder}/batches.pt")
score(model, batches, loss="labels", moments=True).save(f"{folder}/labels{rank}")
score(model, batches, loss="sampled", checkpointing=sharded).save(f"{folder}/sampled{rank}")
first = lambda model, batch: model(**batch, output_hidden_states=True).hidden_states[1].sum()
try:
    score(model, batches, loss=first)
except DataError as error:
    open(f"{folder}/error{rank}", "w").write(str(error))
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
prepared = prepare_data_loader(DataLoader(batches, batch_size=None))
try:
    score(model, prepared, "fisher")
except DataError as error:
    open(f"{folder}/prepared{rank}", "w").write(str(error))
dist.barrier()
dist.destroy_process_group()
"""


def uneven(tmp_path):
    """A saved model, four batches of it, the last smaller, and its scores on one process."""
    tiny.model("llama").save_pretrained(tmp_path)
    batch = make("llama")[1]
    # Long enough that the inputs' moments are taken from a part of the tokens.
    batch = {name: tensor.repeat(1, 8) for name, tensor in batch.items()}
    batches = [rows(batch, at) for at in ([0], [1, 2], [3, 4], [2])]
    torch.save(batches, tmp_path / "batches.pt")
    model = from_pretrained(tmp_path)
    return {n: score(model, batches, loss=n, moments=n == "labels") for n in ("labels", "sampled")}


def check(folder, alone, world):
    for rank in range(world):
        for loss, expected in alone.items():
            found = Scores.load(Path(folder, f"{loss}{rank}"))
            assert_same(found, expected, rtol=1e-4, atol=1e-9)  # sums of terms that cancel
            assert found.agreement == pytest.approx(expected.agreement)
        assert "does not depend on layers.1.self_attn" in Path(folder, f"error{rank}").read_text()
        assert "accelerator.prepare() (a DataL" in Path(folder, f"prepared{rank}").read_text()


@pytest.mark.parametrize(
    ("world", "how"),
    [
        (3, "replicated"),
        pytest.param(2, "replicated", marks=pytest.mark.slow),
        pytest.param(3, "sharded", marks=pytest.mark.slow),
    ],
)
def test_several_processes_are_one(tmp_path, world, how):
    alone = uneven(tmp_path)
    succeed(together(WORKER, tmp_path, how, count=world))
    check(tmp_path, alone, world)


@pytest.mark.slow
def test_accelerate_launches_them(tmp_path):
    alone = uneven(tmp_path)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    # Without GPUs the launcher's --multi_gpu is what starts several processes.
    options = ["--multi_gpu", "--num_processes", "3", "--num_machines", "1"]
    options += ["--main_process_port", str(free_port()), "--mixed_precision", "no"]
    command = [*LAUNCHER, *options, "--dynamo_backend", "no", script, tmp_path, "replicated"]
    subprocess.run(list(map(str, command)), check=True, timeout=300, env=environment())
    check(tmp_path, alone, 3)


def test_offloaded_weights_are_brought_as_they_are_needed(tmp_path):
    model = tiny.model("mixtral")
    batch = tiny.batch(model)
    batches = [batch | {"labels": batch["input_ids"]}]
    whole = score(model, batches)
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"]
    where = dict.fromkeys(parts, "cpu") | dict.fromkeys(
        ("model.layers.1", "model.layers.2"), "disk"
    )
    model = dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    away = [p for p in model.parameters() if p.is_meta]
    assert len(away) > 12
    assert_same(score(model, batches), whole, rtol=1e-6, atol=1e-12)
    assert sum(p.is_meta for p in model.parameters()) == len(away)  # and gone again
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UnsupportedModelError, match="offloaded: it can be scored"):
        copy_and_cut(model, tiny.selection(Anatomy.of(model)))


def test_a_model_that_does_not_fit_is_scored_within_a_memory_cap(tmp_path, monkeypatch):
    config = tiny.config("llama")
    config.update({"num_hidden_layers": 8, "intermediate_size": 256, "layer_types": None})
    model = LlamaForCausalLM(config).eval()
    batch = tiny.batch(model)
    batches = [batch | {"labels": batch["input_ids"]}] * 2
    whole = score(model, batches, criteria=["fisher", "taylor"])
    model.save_pretrained(tmp_path / "model")
    weights = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    del model
    cap = 2 * layer
    model = from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": cap},
        offload_folder=tmp_path / "away",
    )

    assert sum(p.nbytes for p in model.parameters() if not p.is_meta) <= cap < weights / 3
    others = {id(p): p for p in _parameters()}  # held, so that no other takes their ids

    def brought():
        return sum(p.nbytes for p in _parameters() if id(p) not in others and not p.is_meta)

    seen, receive = [], Gathering.receive

    def spy(self, *arguments):
        seen.append(brought())
        receive(self, *arguments)

    monkeypatch.setattr(Gathering, "receive", spy)
    assert_same(score(model, batches, criteria=["fisher", "taylor"]), whole, rtol=1e-5, atol=1e-12)
    assert 0 < max(seen) <= layer  # no more than the one that is computed
    assert brought() == 0


def _parameters():
    """All that Python knows of. By type: torch's own check takes seconds for so many objects."""
    return [found for found in gc.get_objects() if type(found) is torch.nn.Parameter]


def test_statistics_of_bf16_weights_are_wider():
    exact = tiny.model("llama")
    for parameter in exact.parameters():  # values that bf16 holds
        parameter.data = parameter.data.bfloat16().float()
    narrow = tiny.model("llama").bfloat16()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        ids = torch.randint(3, tiny.VOCABULARY, (8, 32), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})
    expected, found = score(exact, batches), score(narrow, batches)
    for group in Anatomy.of(exact):
        for name in ("taylor", "fisher", "activation", "magnitude"):
            one, other = expected.by(name)[group.name], found.by(name)[group.name]
            assert rank_correlation(one, other) > 0.97
            # Of 2,048 tokens: a sum in bf16 stops growing at 256 times its terms.
            torch.testing.assert_close(one.sum(), other.sum(), rtol=0.03, atol=0)
        magnitudes = (scores.by("magnitude")[group.name] for scores in (expected, found))
        torch.testing.assert_close(*magnitudes, rtol=1e-12, atol=0)
