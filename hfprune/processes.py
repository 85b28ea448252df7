"""The processes of one run: one writes, all agree, and when one fails the others stop with its
error.

They talk through a key-value store beside the process group. Waiting in it has no timeout of a
collective, so a long step of the one that writes is no failure; and it can say what went wrong
while the group's own collectives hang.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hfprune.errors import HfpruneError

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

_FAILED = "failed"
_PAUSE = 0.05  # seconds between two looks
_GRACE = 10.0  # seconds that a failing process waits for the others to have heard of it


class OtherProcessError(HfpruneError):
    """Another process of this run failed; the message is its own."""


class Processes:
    """The processes of a run as one of them sees them; by default it is alone.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        cpu: whether they compute on CPUs.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, store: dist.Store | None = None, cpu: bool = True
    ) -> None:
        self.rank = rank
        self.count = count
        self.cpu = cpu
        self._store = store
        self._exchanges = 0
        self._failure: tuple[int, str] | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        accelerator = None if self.cpu else torch.accelerator.current_accelerator()
        return accelerator or torch.device("cpu")

    def gather(self, value: str = "") -> list[str]:
        """What every process gives, in their order. It waits for all of them.

        Raises:
            OtherProcessError: one of them failed.
        """
        if self._store is None:
            return [value]
        self._exchanges += 1
        keys = [f"{self._exchanges}/{rank}" for rank in range(self.count)]
        self._store.set(keys[self.rank], value)
        while not self._store.check(keys):
            self.stop_if_failed()
            time.sleep(_PAUSE)
        return [self._store.get(key).decode() for key in keys]

    def told(self, value: bool) -> bool:
        """What process 0 decides."""
        return bool(json.loads(self.gather(json.dumps(value))[0]))

    def agree(self, what: str, value: str) -> None:
        """Make sure that all processes came to the same.

        Raises:
            HfpruneError: they did not; says which.
        """
        refuse_disagreement(what, self.gather(value))

    def stop_if_failed(self) -> None:
        """Raise the error of another process, if one failed."""
        if self._failure is None and self._store is not None and self._store.check([_FAILED]):
            rank, text = json.loads(self._store.get(_FAILED))
            self._failure = rank, text
            self._store.set(f"told/{self.rank}", "")
        if self._failure is not None and self._failure[0] != self.rank:
            raise OtherProcessError(f"Process {self._failure[0]} failed: {self._failure[1]}")

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error of this process; or raise theirs, if they failed first.

        A collective breaks when the process at its other end is gone: then the other's error is
        the one to show.
        """
        if self._store is None or isinstance(error, OtherProcessError):
            return
        text = str(error) if isinstance(error, HfpruneError) else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):  # process 0 is gone, and the store with it
            self.stop_if_failed()
            self._store.set(_FAILED, json.dumps([self.rank, text]))
            self._wait_for_others("told")

    def leave(self) -> None:
        """Meet for the last time. Process 0 serves the store: it leaves after the others.

        Raises:
            OtherProcessError: one of them failed.
        """
        self.gather()
        if self._store is None:
            return
        if self.main:
            self._wait_for_others("left")
        else:
            self._store.set(f"left/{self.rank}", "")

    def _wait_for_others(self, what: str) -> None:
        """Wait until the others have said something, but not for ever: they may be gone."""
        assert self._store is not None
        keys = [f"{what}/{rank}" for rank in range(self.count) if rank != self.rank]
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(_PAUSE)

    def listen(self, until: threading.Event) -> None:
        """Hear of failures while this process computes or waits in a collective."""
        while not until.wait(10 * _PAUSE):
            with suppress(OtherProcessError, RuntimeError):  # the store may be gone already
                self.stop_if_failed()


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that `accelerate launch` or `torchrun` started; one alone without them.

    Raises:
        HfpruneError: they were started to shard the weights in a way that is not supported.
        OtherProcessError: another process failed; within seconds after it.
    """
    if deepspeed_asked():
        from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available

        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
        refuse_deepspeed(plugin)
        if not is_deepspeed_available():
            raise HfpruneError(
                "DeepSpeed is asked for and not installed: pip install 'hfprune[deepspeed]'."
            )
    if fsdp_asked():
        from accelerate.utils import FullyShardedDataParallelPlugin

        refuse_fsdp(FullyShardedDataParallelPlugin())
    count = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = torch.accelerator.current_accelerator()
    cpu = accelerator is None or accelerator.type == "mps"  # which has no float64
    cpu = cpu or _set("ACCELERATE_USE_CPU")
    if count == 1:
        yield Processes(cpu=cpu)
        return
    if not cpu:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if cpu else None)
    processes = Processes(dist.get_rank(), count, _store(dist.get_rank()), cpu)
    leaving = threading.Event()
    listener = threading.Thread(target=processes.listen, args=(leaving,), daemon=True)
    listener.start()
    try:
        yield processes
        leaving.set()
        listener.join()
        processes.leave()
    except BaseException as error:
        processes.fail(error)
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        leaving.set()
        listener.join()
        # The group's threads must not outlive the interpreter. Nor may a wrapped model outlive the
        # group: as its last owner it would wait for a thread that waits for the interpreter's lock.
        gc.collect()
        dist.destroy_process_group()


def refuse_disagreement(what: str, values: Sequence[str]) -> None:
    """Make sure that all processes came to the same; values are in their order.

    Raises:
        HfpruneError: they did not; says which.
    """
    if len(set(values)) > 1:
        listed = ", ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
        raise HfpruneError(
            f"The processes do not agree on {what} ({listed}). They must see the same files and"
            " run the same versions of hfprune and torch."
        )


def fsdp_asked() -> bool:
    """Whether Accelerate was told to shard the weights by FSDP."""
    return _set("ACCELERATE_USE_FSDP")


def deepspeed_asked() -> bool:
    """Whether Accelerate was told to shard the optimizer's state by DeepSpeed."""
    return _set("ACCELERATE_USE_DEEPSPEED")


def refuse_deepspeed(plugin: DeepSpeedPlugin) -> None:
    """Refuse what is not supported of DeepSpeed.

    Raises:
        HfpruneError: names the setting, and what it must be.
    """
    if plugin.zero_stage not in (1, 2):
        raise HfpruneError(
            f"zero_stage is {plugin.zero_stage}; only 1 and 2 are supported. To shard the weights"
            " too, as ZeRO-3 does, start with recipes/accelerate/fsdp2.yaml."
        )
    config = plugin.deepspeed_config
    precisions = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled") is True]
    given = {
        "deepspeed_config_file": os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"),
        "offload_optimizer_device": plugin.offload_optimizer_device,
        "offload_param_device": plugin.offload_param_device,
        # Accelerate would leave DeepSpeed out without a word. (use_cpu in its file is no matter.)
        "ACCELERATE_USE_CPU": "true" if _set("ACCELERATE_USE_CPU") else "no",
        # DeepSpeed would round the weights themselves.
        "mixed_precision": precisions[0] if precisions else "no",
    }
    for name, value in given.items():
        if value not in ("none", "no", None):
            raise HfpruneError(
                f"{name} is {value}, which is not supported with DeepSpeed. Start from"
                " recipes/accelerate/deepspeed.yaml; docs/accelerate.md says what FSDP2 has of it."
            )


def refuse_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse what is not supported of FSDP.

    Raises:
        HfpruneError: names the setting, and what it must be.
    """
    given = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT"),
        # Scoring and planning read the whole model in every process.
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
    }
    for name, (value, needed) in given.items():
        if value != needed:
            raise HfpruneError(
                f"{name} is {value}; only {needed} is supported. Start from"
                " recipes/accelerate/fsdp2.yaml."
            )


def _set(flag: str) -> bool:
    """Whether Accelerate set a flag in the environment."""
    return os.environ.get(flag, "").lower() in ("1", "true", "yes")


def _store(rank: int) -> dist.Store:
    """The store, which process 0 serves at a port that is free."""
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        dist.broadcast_object_list([store.port])
        return store
    port: list[int] = [0]
    dist.broadcast_object_list(port)
    return dist.TCPStore(host, port[0], is_master=False)
