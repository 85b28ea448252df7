"""Runs that are killed at any moment, run out of disk or may not write: nothing that was done is
lost, and the end is the same.
"""

import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from launching import FSDP, environment, forked, together
from test_pipeline import at, generation, leftovers, make

import hfprune
from hfprune import steps
from hfprune.errors import HfpruneError
from hfprune.files import whole_folder, write_whole
from hfprune.planning.plan import PruningPlan
from hfprune.recovery.checkpoints import last_complete_checkpoint
from hfprune.steps import steps_done

TRAINING = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 8}
DYING = """
import os, sys, torch
from hfprune.pipeline import run
from hfprune.recovery.sharding import ShardableTrainer

torch.set_num_threads(1)
recipe, moment, how, rank = sys.argv[1], *map(int, sys.argv[2:])
calls = 0

def dying(method):
    def called(self, *given, **named):
        global calls
        calls += 1
        if calls == moment and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), how)
        return method(self, *given, **named)
    return called

for name in (
    "training_step", "save_model", "_save_optimizer_and_scheduler", "_save_rng_state",
    "_load_from_checkpoint", "_load_best_model",
):
    setattr(ShardableTrainer, name, dying(getattr(ShardableTrainer, name)))
run(recipe, say=str, until="result")
"""
LIMITED = """
import resource, sys
from hfprune.cli import main
from hfprune.recovery.sharding import ShardableTrainer

recipe, size, before = sys.argv[1], *map(int, sys.argv[2:])

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

saves = 0

def save(self, *given, **named):
    global saves
    saves += 1
    if saves == before:
        limit()
    unlimited(self, *given, **named)

unlimited, ShardableTrainer._save_checkpoint = ShardableTrainer._save_checkpoint, save
if not before:
    limit()
main(["distill", recipe])
"""


def run(recipe, folder, count, moment=0, how=0, rank=0):
    """Exit status of a run on some processes, one of which ends itself at a moment: when it is
    about to make a training step, or to write or read a part of a checkpoint.
    """
    files = [folder / "run.py", folder / "recipe.yaml"]
    files[0].write_text(DYING)
    files[1].write_text(yaml.safe_dump(recipe.to_dict()))
    arguments = [*files, moment, how, rank]
    if count == 1 or not moment:
        ended = forked(*arguments) if count == 1 else together(*arguments, count=count)
        return max((status for status, _, _ in ended), key=abs)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=180,
        env=environment(ACCELERATE_USE_CPU="true"),
    ).returncode


def same_weights(name, *recipes):
    """Whether a model came out bitwise the same of two runs."""
    first, second = (hfprune.from_pretrained(at(r, name)).state_dict() for r in recipes)
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(count, tmp_path):
    """Bitwise, with dropout in the fine-tuning."""
    whole, killed = (
        make(tmp_path / name, finetune=TRAINING, distill=TRAINING) for name in ("whole", "killed")
    )
    assert run(whole, tmp_path / "whole", count) == 0
    chance = random.Random(count)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)[: 3 // count]:
        moment, rank = chance.randint(1, 17), chance.randrange(count)
        status = run(killed, tmp_path / "killed", count, moment, int(how), rank)
        assert status == (-how if count == 1 else 1), "it was killed, and none of them waits on"
    assert run(killed, tmp_path / "killed", count) == 0
    assert not leftovers(killed)
    plans = [PruningPlan.load(at(r, "plan.json")) for r in (whole, killed)]
    assert plans[0] == plans[1]
    assert same_weights("dense", whole, killed) and same_weights("distilled", whole, killed)


def test_a_text_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match="taken is a folder; give the name of a file"):
        write_whole(tmp_path / "taken", "text")
    write_whole(tmp_path / "file", "before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            write_whole(tmp_path / "file", "after")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "file").read_text() == "before"


def fails(error):
    def call(*given, **named):
        raise error

    return call


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    (tmp_path / ".small.tmp").mkdir()
    (tmp_path / ".small.tmp" / "of a process that was killed").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "small") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "small") as folder:
        (folder / "all").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["small", "all"]


@pytest.mark.parametrize("place", ["run/compensated", "photos/1.png"])
def test_what_cannot_be_read_is_not_said_to_be_unwritable(place, tmp_path, monkeypatch):
    recipe = make(tmp_path, finetune=None)
    hfprune.run(recipe, say=str, until="pruned")
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / place))
    monkeypatch.setattr(steps, "compensate", fails(denied))
    with pytest.raises((HfpruneError, OSError)) as caught:
        hfprune.run(recipe, say=str, until="compensated")
    of_ours = f"Compensating by least squares: cannot write in {at(recipe)}: Permission denied."
    assert str(caught.value).startswith(of_ours if place.startswith("run") else str(denied))
    assert not leftovers(recipe)


def test_a_checkpoint_cut_off_in_its_last_file_is_not_complete(tmp_path):
    for step, text in ((2, "{}"), (10, '{"epoch": 1'), (11, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    for name in ("checkpoint-best", "checkpoint-2-copy"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-2"


def limited(recipe, folder, size, before=0):
    """(exit status, stderr) of a run that cannot write a file of more than `size` bytes, from the
    start or from a checkpoint on, counted from 1.
    """
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    ((status, _, err),) = forked(LIMITED, folder / "recipe.yaml", size, before)
    return status, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "step"), [("kept.png", "Removing"), (None, "Fine-tuning the dense model")]
)
def test_a_disk_that_is_full_is_one_line_and_loses_nothing(before, step, tmp_path):
    recipe = generation(tmp_path, finetune=TRAINING | {"epochs": 1}, distill=None)
    if before:
        hfprune.run(recipe, say=str, until=before)
    done = steps_done(at(recipe))
    status, err = limited(recipe, tmp_path, 20_000)
    assert status == 2, err
    assert err.startswith(f"hfprune: {step}: cannot write in {at(recipe)}: "), err
    assert "Finished steps and the last checkpoint are kept" in err and len(err.splitlines()) == 1
    assert steps_done(at(recipe)) == done
    assert all(hfprune.from_pretrained(at(recipe, name)) for name in done if name == "dense")
    hfprune.run(recipe, say=str, until="result")
    assert not leftovers(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("fits", ["nothing", "the weights"])
def test_a_disk_that_fills_up_while_distilling_leaves_the_last_checkpoint(fits, tmp_path):
    """The third of four checkpoints, the start being one, cannot be written; the run goes on from
    the second.
    """
    whole, recipe = (
        make(tmp_path / name, finetune=None, distill=TRAINING) for name in ("whole", "full")
    )
    hfprune.run(whole, say=str, until="result")
    hfprune.run(recipe, say=str, until="compensated")
    weights = at(recipe, "compensated/model.safetensors").stat().st_size
    room = {"nothing": 2_000, "the weights": weights + 2_000}[fits]
    status, err = limited(recipe, tmp_path, room, before=3)
    assert status == 2, err
    assert err.startswith(f"hfprune: Distilling: cannot write in {at(recipe)}: "), err
    (checkpoints,) = at(recipe).glob(".*-checkpoints")
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-0", "checkpoint-5"}
    assert hfprune.from_pretrained(checkpoints / "checkpoint-5")
    hfprune.run(recipe, say=str, until="result")
    assert not leftovers(recipe)
    first, second = (
        hfprune.from_pretrained(at(r, "distilled")).state_dict() for r in (whole, recipe)
    )
    assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of a megabyte; larger, the same run goes through."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount")
    try:
        recipe = make(tmp_path, finetune=None, distill=TRAINING)
        recipe = dataclasses.replace(recipe, output=str(disk / "run"))
        with pytest.raises(HfpruneError, match=r"No space left|is the disk full"):
            hfprune.run(recipe, say=str, until="result")
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        hfprune.run(recipe, say=str, until="result")
        assert not leftovers(recipe)
    finally:
        # Weights that were mapped into memory keep it busy.
        subprocess.run(["umount", "--lazy", disk], check=True)


SPOILT = """
import os, sys
import torch
from torch.distributed.tensor import DTensor
from hfprune.pipeline import run
from hfprune.recovery.sharding import ShardableTrainer

step, calls = ShardableTrainer.training_step, 0

def spoilt(self, model, *given, **named):
    global calls
    calls += 1
    if calls == 8 and os.environ["RANK"] == "1":
        for parameter in model.parameters():
            parameter = parameter.detach()
            here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            here.fill_(float("nan"))
    return step(self, model, *given, **named)

ShardableTrainer.training_step = spoilt
run(sys.argv[1], say=str, until="dense")
"""


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP], ids=["whole", "sharded"])
def test_a_loss_that_is_not_finite_stops_both_processes(variables, tmp_path):
    recipe = make(tmp_path, finetune=TRAINING)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    first, second = together(SPOILT, tmp_path / "recipe.yaml", timeout=180, **variables)
    assert [first[0], second[0]] == [1, 1]
    assert (
        "DataError: The loss is not finite at global step 8, batch 1 of 1 on process" in second[2]
    )
    assert "The loss is not finite at global step 8, batch 1 of 1 on process" in first[2]
    (checkpoints,) = at(recipe).glob(".*-checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-5"]
    kept = hfprune.from_pretrained(checkpoints / "checkpoint-5").state_dict()
    assert all(tensor.isfinite().all() for tensor in kept.values())


BECOMES_READ_ONLY = """
import os, sys
import hfprune

def say(line):
    if line == "Planning ...":
        os.chmod(sys.argv[2], 0o500)

try:
    hfprune.run(sys.argv[1], say=say)
except hfprune.HfpruneError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_output_that_becomes_read_only_is_one_line(tmp_path):
    # root may write everywhere, unless it gives up that right.
    meek = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if meek and not shutil.which("setpriv"):
        pytest.skip("root needs setpriv to have no right to write")
    recipe = make(tmp_path, finetune=None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    command = [*meek, sys.executable, "-c", BECOMES_READ_ONLY, tmp_path / "recipe.yaml", at(recipe)]

    def said():
        options = {"capture_output": True, "text": True, "check": True, "env": environment()}
        return subprocess.run(command, **options).stdout.splitlines()

    (line,) = said()
    assert line.startswith(f"Planning: cannot write in {at(recipe)}: Permission denied. Finished ")
    assert steps_done(at(recipe)).keys() == {"dense", "scores"}
    (line,) = said()
    assert line == f"output: cannot write below {at(recipe)}; choose another folder."
    at(recipe).chmod(0o700)
