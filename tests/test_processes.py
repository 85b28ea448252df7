"""Several processes: they meet, agree, and when one fails the others stop with its error."""

import time

import pytest
from launching import DEEPSPEED, FSDP, together

from hfprune.errors import HfpruneError
from hfprune.processes import Processes, launched

pytestmark = pytest.mark.xdist_group("forks")  # one worker imports what they are forked with

ZERO = "ACCELERATE_DEEPSPEED_"
HEAD = """
import sys, time, torch
import torch.distributed as dist
from hfprune.errors import HfpruneError
from hfprune.processes import launched
"""


def test_one_process_is_alone():
    alone = Processes()
    assert alone.main and alone.gather("a") == ["a"] and alone.told(True)
    alone.agree("the plan", "x")
    alone.stop_if_failed()
    alone.fail(ValueError("mine"))


def test_they_exchange_agree_or_say_on_what_they_do_not():
    code = """
with launched() as processes:
    assert processes.gather(str(processes.rank)) == ["0", "1", "2"]
    assert processes.told(processes.rank == 0)
    processes.agree("the scores", "same")
    print("main" if processes.main else "other", processes.device)
    processes.agree("the plan", f"plan-{processes.rank}")
"""
    ended = together(HEAD + code, count=3)
    assert [out for _, out, _ in ended] == ["main cpu\n", "other cpu\n", "other cpu\n"], ended
    for status, _, err in ended:
        assert status == 1
        assert "do not agree on the plan (process 0: plan-0, process 1: plan-1, process 2" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version is 1; only 2 is supported.*fsdp2.yaml"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "only FULL_STATE_DICT is supported"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "efficient_loading is True; only False"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage is 3.*fsdp2.yaml"),
        (DEEPSPEED | {f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device is cpu"),
        (DEEPSPEED | {f"{ZERO}OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device is cpu"),
        (DEEPSPEED | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is bf16"),
        (DEEPSPEED | {"ACCELERATE_USE_CPU": "true"}, "ACCELERATE_USE_CPU is true"),
        (DEEPSPEED | {f"{ZERO}CONFIG_FILE": '{"zero_optimization": {}}'}, "config_file is {"),
        ({}, None),
    ],
)
def test_ways_to_shard_that_are_not_supported_are_refused_before_anything(
    changes, message, monkeypatch
):
    given = changes if "ACCELERATE_USE_DEEPSPEED" in changes else FSDP | changes
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if message is None:
        with launched() as processes:
            assert processes.main
        return
    with pytest.raises(HfpruneError, match=message), launched():
        pass


@pytest.mark.parametrize(
    ("failing", "where"),
    [
        (0, "processes.gather()"),
        pytest.param(1, "processes.gather()", marks=pytest.mark.slow),
        pytest.param(0, "dist.all_reduce(torch.ones(8))", marks=pytest.mark.slow),
        pytest.param(1, "dist.all_reduce(torch.ones(8))", marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_stops_the_others_with_its_error(failing, where):
    """Whether they wait for it or are in a collective with it."""
    code = f"""
with launched() as processes:
    if processes.rank == {failing}:
        time.sleep(0.2)
        raise HfpruneError("the disk is full")
    {where}
    processes.gather()
"""
    start = time.monotonic()
    ended = together(HEAD + code)
    assert time.monotonic() - start < 60
    assert [status for status, _, _ in ended] == [1, 1]
    other = ended[1 - failing][2]
    assert f"OtherProcessError: Process {failing} failed: the disk is full" in other
    assert "OtherProcessError" not in ended[failing][2]
