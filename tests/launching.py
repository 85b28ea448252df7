"""Start processes as launchers do; shared by the tests of several processes."""

import gc
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
FSDP = {  # what `accelerate launch` sets for recipes/accelerate/fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
DEEPSPEED = {  # what it sets for recipes/accelerate/deepspeed.yaml, and what CPUs need
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_USE_CPU": "false",  # else there would be no DeepSpeed
    "DS_ACCELERATOR": "cpu",
}
LAUNCHER = [str(Path(sys.executable).with_name("accelerate")), "launch"]


def environment(**values):
    """This process's variables with one thread per process and the package of this repository."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **{name: str(value) for name, value in values.items()},
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(code, rank, count, port):
    """One of several processes that run some code, without a launcher that would stop them."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**values),
    )


def together(code, count=2, timeout=90):
    """(exit status, stdout, stderr) of each of `count` processes that run some code."""
    port = free_port()
    processes = [start(code, rank, count, port) for rank in range(count)]
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, ended, strict=True)]


def torchrun(file, *arguments, count=2, timeout=300, **variables):
    """Run a file as the main program of several CPU processes."""
    options = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    subprocess.run(
        [sys.executable, *options, file, *map(str, arguments)],
        check=True,
        timeout=timeout,
        env=environment(**{"ACCELERATE_USE_CPU": "true"} | variables),
    )


def leave():
    """End this process's part in its group, after all that holds the group has gone out of scope:
    a wrapped model that goes last can wait for ever (see `hfprune.processes.launched`).
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(script, *arguments, options=(), timeout=120):
    """What `accelerate launch` says when it starts a script of this repository."""
    given = ["--main_process_port", free_port(), *options]
    ended = subprocess.run(
        [*LAUNCHER, *map(str, given), str(ROOT / "scripts" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(),
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def losses(said):
    """The held-out losses that a Trainer printed, and the mean loss of its whole training."""
    return [float(loss) for loss in re.findall(r"'(?:eval|train)_loss': '([\d.e-]+)'", said)]
