"""Look at the nodes of a job before training on them: ``python -m pacl_scale.nodes [check.KEY=VALUE ...] WORDS...``.

Started by ``srun`` in every task, in place of ``python -m pacl_scale.train``, whose words it takes. One all-reduce,
the free space and the clocks are looked at; a node that stands out is named in ``<run>/slurm/unfit.json``, and the
batch script queues the job again without it (``python -m pacl_scale.job requeue``). Otherwise training begins, in the
same process.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacl_scale import config
from pacl_scale.errors import RunFailed, UserError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from pacl_scale.distributed import World

MODULE = "pacl_scale.nodes"
PAYLOAD_MB = {"cpu": 4, "cuda": 256}
"""What is summed over all ranks to measure the network."""


@dataclass(frozen=True)
class CheckConfig:
    """What a node must have before a job trains on it."""

    enabled: bool = True
    """Look at the nodes before training."""

    min_gb_per_s: float = 0.01
    """Bandwidth of an all-reduce over all ranks, in GB/s, below which the slow node is looked for. The default finds
    a broken network only; a healthy one of your cluster, halved, finds a slow one."""

    min_disk_gb: float = 0.5
    """Free space in each node's folder for temporary files, and in the run directory."""

    max_clock_skew_s: float = 10.0
    """How far a node's clock may be from the middle one; certificates and S3 signatures fail beyond minutes."""

    timeout_s: float = 300.0
    """How long all ranks may take to find each other."""

    def __post_init__(self) -> None:
        if min(self.min_gb_per_s, self.min_disk_gb) < 0 or min(self.max_clock_skew_s, self.timeout_s) <= 0:
            raise ValueError("check.* cannot be negative, and max_clock_skew_s and timeout_s must be positive")


@dataclass
class _Words:
    """The words of this command that are not the training's."""

    check: CheckConfig


@dataclass(frozen=True)
class Facts:
    """What one node says of itself."""

    node: str
    disk_gb: float
    clock_s: float
    pair_gb_per_s: float | None = None
    """Best bandwidth to a neighbour; only measured where all ranks together are slow."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then train; returns the training's exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = [word for word in words if word.lstrip("-").startswith("check.")]
    rest = [word for word in words if word not in own]
    settings = config.parse(_Words, own, f"python -m {MODULE}").check if own else CheckConfig()
    return start(settings, rest)


def start(check: CheckConfig, words: Sequence[str]) -> int:
    """Look at the nodes, if this process is one of several tasks of a Slurm job, then train; returns its status.

    Raises:
        RunFailed: a node does not fit; it is noted for the batch script.
        UserError: the run directory is full, or the network as a whole is below the floor.
    """
    from pacl_scale import distributed, train

    settings: train.TrainConfig = config.parse(train.TrainConfig, words, "python -m pacl_scale.train")
    run = Path(settings.run)
    job = os.environ.get("SLURM_JOB_ID")
    if check.enabled and job:
        refuse_full(run, check)
        if ranks := distributed.slurm_ranks(os.environ):
            look(check, run, job, ranks, settings.distributed)
    return train.main(list(words))


def refuse_full(run: Path, check: CheckConfig) -> None:
    """Raise :class:`UserError` if there is no room for checkpoints in the run directory."""
    run.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run).free / 1e9
    if free < check.min_disk_gb:
        raise UserError(
            f"the run directory {run} has {free:.2f} GB left, less than check.min_disk_gb={check.min_disk_gb:g}; "
            "make room and submit again"
        )


def look(check: CheckConfig, run: Path, job: str, ranks: Mapping[str, str], group: Any) -> None:
    """Join a process group for the check only, and judge."""
    from pacl_scale import distributed

    # A port of its own: training's first contact must not meet the remains of this group.
    port = str(20000 + (int(ranks.get("MASTER_PORT", "20000")) - 20000 + 5000) % 10000)
    before = {name: os.environ.get(name) for name in (*ranks, "MASTER_ADDR", "MASTER_PORT")}
    os.environ |= {**ranks, "MASTER_PORT": port}
    seen = _arrivals(run, job)
    try:
        with distributed.joined(replace(group, timeout_minutes=check.timeout_s / 60)) as world:
            facts = gather(world, check)
    except RuntimeError as error:
        late = sorted(set(_nodes_of_step()) - set(seen()))
        note_unfit(run, job, dict.fromkeys(late, "no task of it came within the time"))
        who = f"{', '.join(late)} did not come" if late else "every node started, but they cannot reach each other"
        raise RunFailed(f"the ranks did not find each other within {check.timeout_s:g} s: {who}") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    unfit = judge(facts, check)
    if unfit:
        if world.is_main:
            note_unfit(run, job, unfit)
        raise RunFailed("; ".join(f"node {node} does not fit: {why}" for node, why in unfit.items()))


def judge(facts: Sequence[Facts], check: CheckConfig) -> dict[str, str]:
    """The nodes that do not fit, and why.

    Raises:
        UserError: most nodes are slow, so it is the network or the floor.
    """
    middle = statistics.median(one.clock_s for one in facts)
    unfit, slow = {}, {}
    for one in facts:
        skew = one.clock_s - middle
        if one.disk_gb < check.min_disk_gb:
            unfit[one.node] = f"{one.disk_gb:.2f} GB left for temporary files, less than {check.min_disk_gb:g}"
        elif abs(skew) > check.max_clock_skew_s:
            unfit[one.node] = f"its clock is {skew:+.0f} s from the others'"
        elif one.pair_gb_per_s is not None and one.pair_gb_per_s < check.min_gb_per_s:
            slow[one.node] = f"{one.pair_gb_per_s:.3f} GB/s to its neighbours, less than {check.min_gb_per_s:g}"
    if 2 * len(slow) > len(facts):
        best = max(one.pair_gb_per_s or 0.0 for one in facts)
        raise UserError(
            f"{len(slow)} of {len(facts)} nodes are slower than check.min_gb_per_s={check.min_gb_per_s:g} (the best "
            f"pair has {best:.3f} GB/s): look at NCCL_SOCKET_IFNAME and the like, or lower the floor"
        )
    return unfit | slow


def gather(world: "World", check: CheckConfig) -> list[Facts]:
    """One entry a node. Collective."""
    import torch
    from torch import distributed as dist

    payload = torch.ones(PAYLOAD_MB[world.device.type] << 18, device=world.device)
    dist.all_reduce(payload)
    started = time.perf_counter()
    dist.all_reduce(payload)
    total = payload[:1].item()
    speed = _agreed(payload.nbytes / 1e9 / (time.perf_counter() - started), world)
    if total != float(world.size) ** 2:
        raise RunFailed(f"an all-reduce over {world.size} ranks gave {total:g}, not {world.size**2}")
    here = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    name = torch.zeros(64, dtype=torch.uint8, device=world.device)
    name[: len(here.encode()[:64])] = torch.tensor(list(here.encode()[:64]), dtype=torch.uint8)
    names = ["".join(map(chr, row.tolist())).rstrip("\0") for row in _all(name, world)]
    pairs = _pairs(world, names, payload) if speed < check.min_gb_per_s else None
    dist.barrier()
    disk = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    own = torch.tensor([disk, time.time(), -1.0 if pairs is None else pairs], dtype=torch.float64, device=world.device)
    facts: dict[str, Facts] = {}
    for node, row in zip(names, _all(own, world), strict=True):
        values = row.tolist()
        if node not in facts or values[2] > (facts[node].pair_gb_per_s or -1.0):
            facts[node] = Facts(node, values[0], values[1], None if pairs is None else max(0.0, values[2]))
    return list(facts.values())


def _pairs(world: "World", names: list[str], payload: "Tensor") -> float:
    """Best bandwidth between this node's first rank and its two neighbours' in a ring; 0 on the other ranks."""
    from torch import distributed as dist

    firsts = [rank for rank, name in enumerate(names) if name not in names[:rank]]
    best = 0.0
    for edges in rounds_of_a_ring(len(firsts)):
        for start, end in edges:
            a, b = firsts[start], firsts[end]
            if world.rank in (a, b):
                started = time.perf_counter()
                for sender in (a, b):
                    (dist.send if world.rank == sender else dist.recv)(payload, b if world.rank == a else a)
                payload[:1].item()
                best = max(best, 2 * payload.nbytes / 1e9 / (time.perf_counter() - started))
        dist.barrier()
    return best


def rounds_of_a_ring(nodes: int) -> list[list[tuple[int, int]]]:
    """The edges of a ring, in rounds within which no node has two: a slow node slows only its own two edges."""
    edges = [(node, (node + 1) % nodes) for node in range(nodes)] if nodes > 1 else []
    last = edges[-1:] if nodes % 2 else []
    pairs = edges[: len(edges) - len(last)]
    return [pairs[::2], pairs[1::2], last]


def _agreed(value: float, world: "World") -> float:
    """The largest of all ranks' values, so that all take the same branch."""
    import torch
    from torch import distributed as dist

    tensor = torch.tensor([value], dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def _all(tensor: "Tensor", world: "World") -> "list[Tensor]":
    import torch
    from torch import distributed as dist

    found = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(found, tensor)
    return found


def _arrivals(run: Path, job: str) -> Any:
    """Leave a mark that this node came; returns what lists the marks."""
    folder = run / "slurm" / f"arrived.{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (os.environ.get("SLURMD_NODENAME") or os.uname().nodename)).touch()
    return lambda: os.listdir(folder)


def _nodes_of_step() -> list[str]:
    from pacl_scale import job

    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    return job.ask_slurm("scontrol", "show", "hostnames", hosts).split()


@dataclass
class Unfit:
    """``<run>/slurm/unfit.json``: nodes that an attempt of a job found wanting."""

    job: str
    attempt: str
    nodes: dict[str, str]


def note_unfit(run: Path, job: str, nodes: dict[str, str]) -> None:
    """Leave word for the batch script."""
    file = run / "slurm" / "unfit.json"
    partial = file.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(asdict(Unfit(job, os.environ.get("SLURM_RESTART_COUNT", "0"), nodes))))
    partial.replace(file)


def unfit_nodes(run: Path, job: str) -> dict[str, str]:
    """What this attempt of ``job`` found, if it found something."""
    try:
        found = Unfit(**json.loads((run / "slurm" / "unfit.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    is_mine = (found.job, found.attempt) == (job, os.environ.get("SLURM_RESTART_COUNT", "0"))
    return found.nodes if is_mine else {}


if __name__ == "__main__":
    sys.exit(run_command(main))
