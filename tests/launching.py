"""Start processes as launchers do; shared by the tests of several processes."""

import gc
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
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
_IMPORTED = multiprocessing.get_context("forkserver")
_IMPORTED.set_forkserver_preload(["hfprune.cli", "hfprune.pipeline", "transformers.trainer"])
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


def together(code, *arguments, count=2, timeout=90, **variables):
    """(exit status, stdout, stderr) of each of `count` CPU processes that run some code, or a file,
    as their main program, without a launcher that would stop them.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count}
    common |= {"ACCELERATE_USE_CPU": "true"} | variables
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return forked(code, *arguments, each=each, timeout=timeout)


def forked(code, *arguments, each=({},), timeout=90):
    """(exit status, stdout, stderr) of processes that run some code, or a file, as their main
    program, one for each set of variables.

    They are forked from one that has only imported: that is most of what starting takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = code if isinstance(code, Path) else Path(folder, "main.py")
        if file is not code:
            file.write_text(code)
        processes = []
        try:
            for number, variables in enumerate(each):
                said = [Path(folder, f"{name}-{number}") for name in ("stdout", "stderr")]
                given = (str(file), list(map(str, arguments)), environment(**variables), said)
                process = _IMPORTED.Process(target=_play, args=given)
                process.start()
                processes.append((process, said))
            end = time.monotonic() + timeout
            for process, _ in processes:
                process.join(max(0, end - time.monotonic()))
                assert process.exitcode is not None, f"it has not ended within {timeout} s"
            return [
                (process.exitcode, *(path.read_text() for path in said))
                for process, said in processes
            ]
        finally:
            for process, _ in processes:
                process.kill()


def _play(file, arguments, variables, said):
    gc.freeze()  # what it was forked with stays: no collection looks through it
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def succeed(ended):
    """What processes said, if all of them ended well."""
    for status, _, err in ended:
        assert status == 0, err[-3000:]
    return [out for _, out, _ in ended]


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
