"""The scripts, alone and started by Accelerate on several processes."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from launching import ROOT, forked, launch, losses, together
from test_pipeline import at, generation

import hfprune
from hfprune.importance.scores import Scores
from hfprune.planning.plan import PruningPlan
from hfprune.processes import Processes
from hfprune.steps import Steps

pytestmark = pytest.mark.xdist_group("forks")  # one worker imports what they are forked with

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def alone(script, *arguments):
    """(exit status, stdout, stderr) of a script that runs by itself."""
    (ended,) = forked(ROOT / "scripts" / script, *arguments)
    return ended


def test_scripts_are_short_and_the_command_line_does_the_work():
    ours = [path for path in SCRIPTS if path.name != "fetch_quickstart.py"]
    assert [path.stem for path in ours] == ["distill", "prune", "run", "score"]
    for path in ours:
        assert len(path.read_text().splitlines()) <= 60
        assert f'main(["{path.stem}", *sys.argv[1:]])' in path.read_text()


def test_a_script_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("modle: here\n")
    status, _, err = alone("run.py", tmp_path / "recipe.yaml")
    assert status == 2
    assert err.startswith("hfprune: Unknown key in recipe 'modle'. Did you mean 'model'?")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))
    known = {field.name for field in dataclasses.fields(config)}
    assert set(yaml.safe_load(path.read_text())) <= known
    assert config.num_processes % config.num_machines == 0
    kinds = {"fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    # MULTI_GPU is the only other kind that starts plain processes.
    assert config.distributed_type == kinds.get(path.stem, "MULTI_GPU")
    assert bool(config.fsdp_config) is (path.stem == "fsdp2")
    assert bool(config.deepspeed_config) is (path.stem == "deepspeed")
    assert f"recipes/accelerate/{path.name}" in (ROOT / "docs" / "accelerate.md").read_text()


def recipes(folder: Path, count: int):
    """Recipes of the same run with outputs of their own, each also in a file."""
    made = []
    for number in range(count):
        distill = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4}
        recipe = generation(
            folder / str(number),
            prune={"budget": "params=70%"},
            finetune={"epochs": 1, "learning_rate": 1e-3, "batch_size": 4},
            distill=distill,
        )
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
        made.append(recipe)
    # A last batch that is not full would be filled up, and two processes would see other examples.
    assert len(Steps(made[0], str, Processes()).splits["train"]) % 4 == 0
    return made


def weights(recipe, name):
    return hfprune.from_pretrained(at(recipe, name)).state_dict()


def sharded_on_cpus(folder, name="fsdp2"):
    """One of the shipped files that shard, for two CPU processes."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2}))
    return path


SEEING = """
import sys
from torch.distributed.tensor import DTensor
from hfprune.cli import main
from hfprune.recovery.sharding import ShardableTrainer

step = ShardableTrainer.training_step

def seen(self, model, *given, **named):
    whole = sum(not isinstance(p, DTensor) for p in model.parameters())
    print(f"{type(self).__name__}: {whole} of the parameters are whole")
    return step(self, model, *given, **named)

ShardableTrainer.training_step = seen
main(["distill", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    one, two, sharded = recipes(tmp_path, 3)
    status, said, err = alone("distill.py", tmp_path / "0.yaml")
    assert status == 0, err
    (tmp_path / "seeing.py").write_text(SEEING)
    cpus = ROOT / "recipes" / "accelerate" / "cpu.yaml"
    ways = [("distill.py", cpus, two), (tmp_path / "seeing.py", sharded_on_cpus(tmp_path), sharded)]
    for number, (script, config, recipe) in enumerate(ways, start=1):
        both = launch(script, tmp_path / f"{number}.yaml", options=["--config_file", config])
        assert "2 processes do it together." in both
        assert both.count("Planning ...") == 1, "one process tells"
        assert losses(both) == pytest.approx(losses(said), rel=1e-4) and losses(said)
        same_run(recipe, one)
        if recipe is sharded:
            assert both.count("_Trainer: 0 of the parameters are whole") > 0
            assert both.count("_DistillationTrainer: 0 of the parameters are whole") > 0
            assert " are whole" not in both.replace(": 0 of the parameters are whole", "")


SEEING_ZERO = """
import sys
from hfprune.cli import main
from hfprune.recovery.sharding import ShardableTrainer
from tests.recovery.test_sharding import refuse_whole_moments

saved = ShardableTrainer._save_optimizer_and_scheduler

def seen(self, folder):
    if self.state.global_step:
        refuse_whole_moments(self.model, self.optimizer)
        print(f"{type(self).__name__}: the moments are sharded")
    saved(self, folder)

ShardableTrainer._save_optimizer_and_scheduler = seen
main(["distill", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_two_processes_of_deepspeed_do_what_one_does(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    one, two = recipes(tmp_path, 2)
    status, said, err = alone("distill.py", tmp_path / "0.yaml")
    assert status == 0, err
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "seeing.py").write_text(SEEING_ZERO)
    config = sharded_on_cpus(tmp_path, "deepspeed")
    both = launch(tmp_path / "seeing.py", tmp_path / "1.yaml", options=["--config_file", config])
    assert losses(both) == pytest.approx(losses(said), rel=1e-4) and losses(said)
    assert "_Trainer: the moments are sharded" in both
    assert "_DistillationTrainer: the moments are sharded" in both
    same_run(two, one)


def same_run(recipe, one):
    """Scores, plan and trained weights are those of another run, to rounding."""
    scores = [Scores.load(at(r, "scores")) for r in (one, recipe)]
    assert (scores[0].examples, scores[0].tokens) == (scores[1].examples, scores[1].tokens)
    for criterion, groups in scores[0].importance.items():
        for name, values in groups.items():
            other = scores[1].by(criterion)[name]
            torch.testing.assert_close(other, values, rtol=1e-4, atol=1e-9)
    plans = [PruningPlan.load(at(r, "plan.json")) for r in (one, recipe)]
    assert plans[0].keep == plans[1].keep
    trained, start = weights(one, "distilled"), weights(one, "compensated")
    assert not trained["lm_head.weight"].equal(start["lm_head.weight"])
    for name, tensor in weights(recipe, "distilled").items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-3, atol=2e-5)


FAILING = """
import os, sys
from hfprune import steps
from hfprune.pipeline import run

def fails(*given, **named):
    raise MemoryError("no room for the gradients")

if os.environ["RANK"] == "1":
    steps.score = fails
run(sys.argv[1], until="scores")
"""


@pytest.mark.slow
def test_a_step_that_fails_on_one_process_stops_the_run_on_all(tmp_path):
    (recipe,) = recipes(tmp_path, 1)
    first, second = together(FAILING, tmp_path / "0.yaml")
    assert first[0] == second[0] == 1
    assert "OtherProcessError: Process 1 failed: MemoryError: no room for the grad" in first[2]
    assert "MemoryError: no room" in second[2] and "OtherProcessError" not in second[2]
    assert {p.name for p in at(recipe).iterdir() if p.name[0] != "."} == {"dense", "steps.json"}


@pytest.mark.slow
def test_each_script_stops_where_it_says(tmp_path):
    (recipe,) = recipes(tmp_path, 1)
    steps = ["dense", "scores", "plan.json", "kept.png", "pruned", "compensated"]
    for script, last in (("score.py", "scores"), ("prune.py", "compensated")):
        status, _, err = alone(script, tmp_path / "0.yaml")
        assert status == 0, err
        made = {path.name for path in at(recipe).iterdir()} - {"steps.json"}
        assert made == set(steps[: steps.index(last) + 1])
