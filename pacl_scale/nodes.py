"""Look at the nodes of a job before training on them: ``python -m pacl_scale.nodes [check.KEY=VALUE ...] WORDS...``.

Started by ``srun`` in every task, in place of ``python -m pacl_scale.train``, whose words it takes. One all-reduce,
the free space and the clocks are looked at; a node that stands out is named in ``<run>/slurm/unfit.*``, and the
batch script queues the job again without it (``python -m pacl_scale.job requeue``). Otherwise training begins, in the
same process.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacl_scale import config, controller
from pacl_scale.errors import RunFailed, UserError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from pacl_scale.distributed import World

MODULE = "pacl_scale.nodes"
PAYLOAD_MB = {"cpu": 4, "cuda": 256}
"""What is summed over all ranks to measure the network."""


PROBE_BYTES = 1 << 16
"""What each rank writes to the run directory to see that it can."""


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
    own, rest = split_words(words)
    settings = config.parse(_Words, own, f"python -m {MODULE}").check if own else CheckConfig()
    return start(settings, rest)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the check, each as ``--check.key=value``, and those of the training.

    Raises:
        UserError: a key of the check without a value.
    """
    own, rest = [], []
    left = list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.partition("=")
        if not key.removeprefix("--").startswith("check.") or not (equals or word.startswith("--")):
            rest.append(word)
        elif equals or left:
            own.append(f"--{key.removeprefix('--').replace('-', '_')}={value if equals else left.pop(0)}")
        else:
            raise UserError(f"{word} needs a value")
    return own, rest


def start(check: CheckConfig, words: Sequence[str]) -> int:
    """Look at the nodes, if this process is one of several tasks of a Slurm job, then train; returns its status.

    Raises:
        RunFailed: a node does not fit; it is noted for the batch script.
        UserError: the run directory is full, or the network as a whole is below the floor.
    """
    from pacl_scale import distributed, train

    print(place_of(os.environ), flush=True)
    settings: train.TrainConfig = config.parse(train.TrainConfig, words, "python -m pacl_scale.train")
    run = Path(settings.run)
    job = os.environ.get("SLURM_JOB_ID")
    if check.enabled and job:
        refuse_full(run, check)
        if settings.distributed.device != "cpu":
            refuse_lost_gpus(run, job)
        if ranks := distributed.slurm_ranks(os.environ):
            look(check, run, job, ranks, settings.distributed)
    return train.main(list(words))


def place_of(variables: Mapping[str, str]) -> str:
    """Where a task is, in one line: it opens the GPU of its local rank among those that it sees."""
    names = {"rank": "SLURM_PROCID", "node": "SLURMD_NODENAME", "local_rank": "SLURM_LOCALID"}
    names["CUDA_VISIBLE_DEVICES"] = "CUDA_VISIBLE_DEVICES"
    return "task " + " ".join(f"{name}={variables.get(variable, '')}" for name, variable in names.items())


def refuse_lost_gpus(run: Path, job: str) -> None:
    """Raise :class:`RunFailed` if torch finds fewer GPUs here than Slurm gave; the node is noted for the batch script.

    Without this the ranks of such a node would take the CPU and wait for the others, who wait for them on their GPUs.
    """
    import torch

    given, found = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0), torch.cuda.device_count()
    if found < given:
        node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        note_unfit(run, job, {node: f"torch finds {found} of the {given} GPUs that Slurm gave"})
        raise RunFailed(f"node {node} does not fit: torch finds {found} of the {given} GPUs that Slurm gave")


def refuse_full(run: Path, check: CheckConfig) -> None:
    """Raise :class:`UserError` if there is no room for checkpoints in the run directory."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run).free / 1e9
        # A quota that is used up shows when something is written.
        with tempfile.TemporaryFile(dir=run) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(
            f"the run directory {run} cannot be written ({error.strerror}); make room and submit again"
        ) from error
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
    seen, started = _arrivals(run, job), time.monotonic()
    try:
        with distributed.joined(replace(group, timeout_minutes=check.timeout_s / 60)) as world:
            facts = gather(world, check)
    except RuntimeError as error:
        late = sorted(set(_nodes_of_step()) - set(seen()))
        if time.monotonic() - started < 0.9 * check.timeout_s:
            # Nobody was waited for: a GPU, a driver or the network said no.
            said = str(error).strip().splitlines() or [type(error).__name__]
            here = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
            raise RunFailed(f"the check of the nodes failed on {here}: {said[0]}") from error
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
    return controller.hostnames(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])


def note_unfit(run: Path, job: str, nodes: Mapping[str, str]) -> None:
    """Leave word for the batch script: a file a node, as several may find themselves wanting at the same time."""
    for node, why in nodes.items():
        file = _unfit(run, job) / node
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(why, encoding="utf-8")


def unfit_nodes(run: Path, job: str) -> dict[str, str]:
    """Nodes that this attempt of ``job`` found wanting, and why."""
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(_unfit(run, job).glob("*"))}


def _unfit(run: Path, job: str) -> Path:
    return run / "slurm" / f"unfit.{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


if __name__ == "__main__":
    sys.exit(run_command(main))
