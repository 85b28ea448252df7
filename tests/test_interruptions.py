"""Runs that are killed at any moment, run out of disk or may not write: nothing that was done is
lost, and the end is the same.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from launching import environment
from test_pipeline import at, generation, leftovers, make

import hfprune
from hfprune.planning.plan import PruningPlan
from hfprune.steps import steps_done

RUN = """
import sys, torch
torch.set_num_threads(1)
from hfprune import run
run(sys.argv[1], say=lambda line: print(line, flush=True), until="result")
"""
TRAINING = {"epochs": 8, "learning_rate": 1e-3, "batch_size": 8}
LIMITED = """
import resource, sys
from hfprune.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
main(["distill", sys.argv[1]])
"""


def start(recipe, path):
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    whole = generation(tmp_path / "whole", finetune=TRAINING, distill=TRAINING)
    process = start(whole, tmp_path / "whole.yaml")
    process.stdout.readline()
    begun = time.monotonic()
    assert process.wait() == 0
    lasted = time.monotonic() - begun

    killed = generation(tmp_path / "killed", finetune=TRAINING, distill=TRAINING)
    chance, moments = random.Random(0), []
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(killed, tmp_path / "killed.yaml")
        process.stdout.readline()  # it has begun
        time.sleep(chance.uniform(0, 0.5 * lasted))
        if process.poll() is None:
            process.send_signal(how)
            assert process.wait() == -how
            moments.append(sorted(p.name for p in at(killed).rglob("checkpoint-*")))
    process = start(killed, tmp_path / "killed.yaml")
    assert process.wait() == 0
    assert moments, "it was not killed once"
    assert not leftovers(killed)
    plans = [PruningPlan.load(at(r, "plan.json")) for r in (whole, killed)]
    assert plans[0] == plans[1]
    for name in ("dense", "distilled"):
        first, second = (hfprune.from_pretrained(at(r, name)).state_dict() for r in (whole, killed))
        assert all(first[key].equal(second[key]) for key in first)


def limited(recipe, folder, size):
    """(exit status, stderr) of a run that cannot write a file of more than `size` bytes."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, folder / "recipe.yaml", str(size)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(HF_DATASETS_CACHE=folder / "cache"),
    )
    return ended.returncode, ended.stderr


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


def test_an_output_that_became_read_only_is_one_line(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    recipe = make(tmp_path, finetune=None)
    hfprune.run(recipe, say=str, until="scores")
    at(recipe).chmod(0o500)
    with pytest.raises(hfprune.HfpruneError, match="cannot write in"):
        hfprune.run(recipe, say=str, until="plan.json")
