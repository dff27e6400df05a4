"""Run a function as several gloo ranks, for tests."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from pacl_scale.distributed import World

PRELOAD = [
    "pacl_scale.train",
    "deepspeed",
    "numba",
    "s3fs",
    # What others import when they are first used, and what towers do when they are built.
    "pacl_scale.encoders.from_open_clip",
    "pacl_scale.encoders.from_package",
    "transformers.models.bert.modeling_bert",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.original_muon",
]


def started_quickly() -> Any:
    """The context of processes that are forked from one that has imported everything, which takes seconds.

    They get the environment of that one: hand them what they need.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(world, *args)`` in ``size`` new processes; returns their results in order of rank.

    A rank that raises fails the caller with that rank's traceback.
    """
    context = started_quickly()
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = (size, port, results, dict(os.environ), function, args)
    ranks = [context.Process(target=_run, args=(rank, *shared)) for rank in range(size)]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < size:
            if results.empty() and not any(process.is_alive() for process in ranks):
                raise RuntimeError("a rank ended without a result")
            if results.empty():
                for process in ranks:
                    process.join(0.02)
                continue
            rank, failure, pickled = results.get()
            if failure:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            found[rank] = pickle.loads(pickled)
    finally:
        for process in ranks:
            if len(found) < size:
                process.kill()
            process.join()
    return [found[rank] for rank in range(size)]


def _run(
    rank: int,
    size: int,
    port: int,
    results: Any,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ |= environment
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=90))
        value = function(World(rank, size, rank, torch.device("cpu")), *args)
        torch.distributed.destroy_process_group()
        # As bytes: the queue would pass tensors as handles to memory that is gone when this process ends.
        results.put((rank, None, pickle.dumps(value)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
