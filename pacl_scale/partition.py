"""What a Slurm cluster's partitions have, held against what a job asks for: ``sinfo`` is asked once."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pacl_scale.controller import ask_slurm, hostnames
from pacl_scale.errors import UserError

FORMAT = "%P|%a|%N|%T|%c|%m|%G|%f|%l"
AWAY = ("down", "drain", "drng", "fail", "error", "unknown", "future", "reboot")
"""States of nodes that take no job now and may take one later."""

UNITS = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True)
class Ask:
    """What one job asks for."""

    nodes: int
    """The fewest with which it starts."""
    tasks: int = 1
    """Tasks of each node."""
    gpus: int = 0
    """GPUs of each node."""
    gpu_type: str = ""
    cpus_per_task: int | None = None
    mem: str | None = None
    """Of each node, as Slurm writes it."""
    time: str | None = None
    partition: str | None = None
    """One, or several with commas; ``None`` is the cluster's default."""
    constraint: str | None = None
    exclude: str | None = None


@dataclass(frozen=True)
class Node:
    """One node as a member of one partition."""

    partition: str
    is_default: bool
    is_up: bool
    """Whether the partition takes jobs."""
    name: str
    state: str
    cores: int
    memory_mb: float
    gres: str
    features: frozenset[str]
    limit: str
    """Time limit of the partition."""

    @property
    def is_away(self) -> bool:
        """Whether it takes no job now."""
        return self.state.startswith(AWAY) or self.state.endswith("*")


def check(ask: Ask) -> list[str]:
    """Refuse a job that its partitions can never run.

    Returns:
        Sentences about what it will have to wait for, such as nodes that are drained.

    Raises:
        UserError: no such partition, it is down, its time limit is shorter, or it has too few such nodes.
    """
    nodes = read()
    partitions = wanted(nodes, ask.partition)
    problems, warnings = [], []
    for partition in partitions:
        mine = [node for node in nodes if node.partition == partition]
        fitting = fit(mine, ask)
        present = [node for node in fitting if not node.is_away]
        problem = None
        if not mine[0].is_up:
            problem = f"partition {partition} is not up"
        elif ask.time and minutes_in(ask.time) > minutes_in(mine[0].limit):
            problem = f"partition {partition} ends jobs after {mine[0].limit}, and {ask.time} is asked for"
        elif len(fitting) < ask.nodes:
            problem = f"partition {partition} has {len(fitting)} nodes{described(ask)}, and {ask.nodes} are asked for"
        elif len(present) < ask.nodes:
            away = ", ".join(f"{node.name} is {node.state.rstrip('*')}" for node in fitting if node.is_away)
            warnings.append(f"partition {partition} has {len(present)} such nodes now ({away}); the job waits for more")
        if problem:
            problems.append(problem)
    if len(problems) == len(partitions):
        raise UserError("; ".join(problems))
    # Where one partition can start it, what the others lack is no news.
    return warnings if len(warnings) + len(problems) == len(partitions) else []


def wanted(nodes: Sequence[Node], chosen: str | None) -> list[str]:
    """The partitions that a job may start in.

    Raises:
        UserError: one of them does not exist, or none is named and the cluster has no default.
    """
    known = list(dict.fromkeys(node.partition for node in nodes))
    if chosen is None:
        default = [node.partition for node in nodes if node.is_default][:1]
        if not default:
            raise UserError(f"the cluster has no default partition; choose one with --partition: {', '.join(known)}")
        return default
    found = chosen.split(",")
    if unknown := [name for name in found if name not in known]:
        raise UserError(f"there is no partition {unknown[0]}; the cluster has {', '.join(sorted(known))}")
    return found


def limit_of(chosen: str | None) -> float:
    """The shortest time limit of the partitions that a job may start in, in minutes."""
    nodes = read()
    names = wanted(nodes, chosen)
    return min(minutes_in(node.limit) for node in nodes if node.partition in names)


def read() -> list[Node]:
    """Every node of every partition, hidden ones too."""
    lines = ask_slurm("sinfo", "--noheader", "--all", "--Node", "--format", FORMAT).splitlines()
    found = []
    for line in lines:
        partition, up, name, state, cores, memory, gres, features, limit = line.split("|")
        is_default, names = partition.endswith("*"), frozenset(features.split(","))
        size = int(cores.rstrip("+")), float(memory.rstrip("+"))
        found.append(Node(partition.rstrip("*"), is_default, up == "up", name, state, *size, gres, names, limit))
    return found


def fit(nodes: Sequence[Node], ask: Ask) -> list[Node]:
    """Those of ``nodes`` that have what each node of a job needs."""
    without = hostnames(ask.exclude) if ask.exclude else []
    cores, memory = ask.tasks * (ask.cpus_per_task or 1), megabytes_in(ask.mem) if ask.mem else 0.0
    return [
        node
        for node in nodes
        if gpus_in(node.gres, ask.gpu_type) >= ask.gpus
        and node.cores >= cores
        and node.memory_mb >= memory
        and has(node.features, ask.constraint)
        and node.name not in without
    ]


def left(partition: str, without: Collection[str], gpus: int) -> list[str]:
    """Nodes with so many GPUs that a job can still be given when it is kept off some."""
    mine = [node for node in read() if node.partition in partition.split(",")]
    fitting = fit(mine, Ask(nodes=1, gpus=gpus))
    return sorted({node.name for node in fitting if not node.is_away} - set(without))


def described(ask: Ask) -> str:
    """What a job asks of each node, in words."""
    parts = []
    if ask.gpus:
        parts.append(f"{ask.gpus} {ask.gpu_type} GPUs".replace("  ", " "))
    if ask.cpus_per_task or ask.tasks > 1:
        parts.append(f"{ask.tasks * (ask.cpus_per_task or 1)} cores")
    if ask.mem and megabytes_in(ask.mem):
        parts.append(f"{ask.mem} of memory")
    if ask.constraint:
        parts.append(f"the features {ask.constraint}")
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return (f" with {listed}" if parts else "") + (f" besides {ask.exclude}" if ask.exclude else "")


def has(features: Collection[str], constraint: str | None) -> bool:
    """Whether a node fulfils ``a&b`` or ``a|b``; what is written with counts or brackets is left to Slurm."""
    if not constraint or re.search(r"[\[\]()*!]", constraint) or ("&" in constraint and "|" in constraint):
        return True
    names = re.split(r"[&|,]", constraint)
    return any(name in features for name in names) if "|" in constraint else all(name in features for name in names)


def gpus_in(gres: str, kind: str = "") -> int:
    """GPUs (of one type) in Slurm's list of a node's generic resources, as in ``gpu:a100:8(S:0-1),shard:2``."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)(?=[(,]|$)", gres)
    return sum(int(count) for name, count in found if not kind or name == kind)


def minutes_in(limit: str) -> float:
    """A time limit of Slurm in minutes: ``30``, ``30:00``, ``12:00:00``, ``2-00``, ``2-00:00:00`` or ``infinite``.

    Raises:
        UserError: it is none of these.
    """
    if limit.lower() in ("infinite", "unlimited"):
        return float("inf")
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", limit):
        raise UserError(f"{limit!r} is no time limit of Slurm; write 90 (minutes), 12:00:00 or 2-00:00:00")
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def megabytes_in(memory: str) -> float:
    """An amount of memory as Slurm writes it, ``500G`` or ``64000``, in MB.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", memory.strip().upper())
    if found is None:
        raise UserError(f"{memory!r} is no amount of memory of Slurm; write 500G, or 0 for all of a node")
    return float(found[1]) * UNITS[found[2] or "M"]
