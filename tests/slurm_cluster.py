"""A private Slurm cluster on loopback: a controller and several nodes on this machine, nothing of it left behind.

Needs root (namespaces, a munged of its own) and Slurm's daemons. Every node is a ``slurmd`` in namespaces of its own,
so that it has its own host name and can be switched off like a machine: all of its processes end at once.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "unshare")
GPU_TYPE = "a100"
MEMORY_MB = 8000
JOBS_A_WORKER = 40
FEATURE = "ib"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def missing() -> str | None:
    """Why no cluster can be started here; ``None`` if one can."""
    absent = [name for name in PROGRAMS if find(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True).returncode:
        return "a Slurm cluster needs root and namespaces"
    return None


def find(program: str) -> str | None:
    """Path of a program; daemons lie in /usr/sbin, which is not in everybody's PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Cluster:
    """A running cluster. Commands find it through :attr:`environment`."""

    def __init__(self, folder: Path, nodes: int, gpus: int, max_array_size: int = 1001, first_job: int = 1) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.small_disk = folder / "small"
        """A folder on a disk of four MiB, seen by all nodes."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: dict[str, list[int]] = {}
        """Of each node that is on: host name and mounts, held open so that nothing else gets their numbers."""
        self._write_files(gpus, max_array_size, first_job)

    def run(self, *words: str, check: bool = True) -> str:
        """What a command on this cluster prints."""
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | self.environment, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def state(self, job: str) -> str:
        """State of a job, as in RUNNING."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, states: Sequence[str] = FINAL, seconds: float = 300) -> str:
        """Wait until a job is in one of ``states``; returns it."""
        until(
            lambda: self.state(job) in states,
            seconds,
            lambda: f"job {job} is {self.state(job)}: {self.field(job, 'Reason')}",
        )
        return self.state(job)

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        socket_path = self.folder / "munge.socket"
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        munge = [f"--{name}-file={self.folder / f'munged.{name}'}" for name in ("log", "pid", "seed")]
        munge += [f"--key-file={key}", f"--socket={socket_path}", "--force", "--foreground", "--num-threads=2"]
        self._start("munged", find("munged") or "", *munge)
        until(socket_path.exists, 10, lambda: "munged does not start:\n" + self._log("munged"))
        self.start_controller()
        self.small_disk.mkdir()
        # Before the nodes start: what is mounted later they do not see.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(self.small_disk)], check=True)
        for name in self.names:
            self.power_on(name)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Until every node can take jobs."""

        def up() -> set[str]:
            return set(self.run("sinfo", "-h", "-N", "-t", "idle,mix,alloc", "-o", "%N", check=False).split())

        until(lambda: up() == set(self.names), 40, lambda: f"only {up()} came up:\n{self._log('n1')}")

    def start_controller(self) -> None:
        """Start the controller; it goes on from the state on disk."""
        self._start("slurmctld", find("slurmctld") or "", "-D", "-f", self.environment["SLURM_CONF"])

    def kill_controller(self) -> None:
        """End the controller at once; jobs that run go on."""
        daemon = self._daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait(10)

    def restart_daemon(self, name: str) -> None:
        """End a node's slurmd and start it again on the same node; what runs there goes on."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait(10)
        uts, mnt = self._namespaces[name]
        words = [f"--uts=/proc/self/fd/{uts}", f"--mount=/proc/self/fd/{mnt}", *self._slurmd(name)]
        self._start(name, "nsenter", *words, pass_fds=(uts, mnt))

    def answers(self) -> bool:
        """Whether the controller does."""
        return (
            subprocess.run(["scontrol", "ping"], capture_output=True, env=os.environ | self.environment).stdout.find(
                b"is UP"
            )
            > 0
        )

    def fill(self, name: str, folder: Path) -> None:
        """On one node, put a disk of one MiB in a folder's place."""
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        subprocess.run(["nsenter", f"--mount=/proc/{self._daemons[name].pid}/ns/mnt", *mount], check=True)

    def power_on(self, name: str) -> None:
        """Start a node; nothing happens if it is on."""
        if name in self._daemons:
            return
        hosts = f"mount --bind {self.folder}/hosts /etc/hosts && hostname {name}"
        self._start(name, "unshare", "-m", "-u", "sh", "-c", f"{hosts} && exec {' '.join(self._slurmd(name))}")
        pid = self._daemons[name].pid
        until(
            lambda: _namespace(pid) not in ("", _namespace(os.getpid())),
            10,
            lambda: f"{name} does not start:\n{self._log(name)}",
        )
        self._namespaces[name] = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("uts", "mnt")]

    def power_off(self, name: str) -> None:
        """End everything that runs on a node, at once and without a word to the controller."""
        for _ in range(5):
            for pid in self._processes_of(name):
                _kill(pid, signal.SIGKILL)
        self._daemons.pop(name).wait(10)
        for namespace in self._namespaces.pop(name):
            os.close(namespace)

    def training(self, name: str) -> list[psutil.Process]:
        """The Python processes of job steps on a node."""
        return [
            process
            for process in map(psutil.Process, self._processes_of(name))
            if process.name().startswith("python") and "SLURM_PROCID" in process.environ()
        ]

    def kill_training(self, name: str) -> None:
        """Kill the Python processes of job steps on a node; the node goes on."""
        for process in self.training(name):
            process.kill()

    def stop(self) -> None:
        """Cancel all jobs, then end every process of the cluster."""
        # The controller may be down.
        with suppress(subprocess.TimeoutExpired):
            words = ["scancel", "--signal=KILL", "--full", "--user=root"]
            subprocess.run(words, env=os.environ | self.environment, timeout=30)
        for name in [name for name in self.names if name in self._daemons]:
            self.power_off(name)
        for name, daemon in reversed(self._daemons.items()):
            daemon.terminate()
            try:
                daemon.wait(3 if name == "slurmctld" else 5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        self._daemons.clear()
        if self.small_disk.is_mount():
            subprocess.run(["umount", str(self.small_disk)], check=True)

    def _slurmd(self, name: str) -> list[str]:
        return [find("slurmd") or "", "-D", "-N", name, "-f", self.environment["SLURM_CONF"]]

    def _start(self, name: str, *words: str, pass_fds: Sequence[int] = ()) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                pass_fds=pass_fds,
            )

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")[-2000:]

    def _processes_of(self, name: str) -> list[int]:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        mine = f"uts:[{os.fstat(self._namespaces[name][0]).st_ino}]"
        return [pid for pid in pids if _namespace(pid) == mine]

    def _write_files(self, gpus: int, max_array_size: int, first_job: int) -> None:
        for folder in ("state", "spool", *(f"spool/{name}" for name in self.names)):
            (self.folder / folder).mkdir()
        hosts = ["127.0.0.1 localhost " + socket.gethostname(), *(f"127.0.0.1 {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        ports = free_ports(1 + len(self.names))
        gres, lines = "", []
        if gpus:
            gres = f" Gres=gpu:{GPU_TYPE}:{gpus}"
            for number in range(gpus):
                # A character device that a GPU's could be; this one swallows what is written.
                os.mknod(self.folder / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
            lines = [f"Name=gpu Type={GPU_TYPE} File={self.folder}/gpu[0-{gpus - 1}]"]
        (self.folder / "gres.conf").write_text("\n".join(lines) + "\n")
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": "localhost(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmctldPort": ports[0],
            "AuthType": "auth/munge",
            # A requeued job may start once its credential has expired: 120 s, if it is not said here.
            "AuthInfo": f"socket={self.folder}/munge.socket,cred_expire=5",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool" / "%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "%n.pid",
            "SlurmdParameters": "config_overrides",
            "SlurmctldParameters": "preempt_send_user_signal",
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "PropagateResourceLimits": "NONE",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "MaxArraySize": max_array_size,
            "FirstJobId": first_job,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmdTimeout": 10,
            # What a drill asks of a job that ended while others ran.
            "MinJobAge": 3600,
            "KillWait": 5,
            "ReturnToService": 2,
            "MpiDefault": "none",
        }
        if gpus:
            settings["GresTypes"] = "gpu"
        text = [f"{name}={value}" for name, value in settings.items()]
        for name, port in zip(self.names, ports[1:], strict=True):
            address = "NodeHostname=localhost NodeAddr=127.0.0.1"
            line = f"NodeName={name} {address} Port={port} CPUs=8 RealMemory={MEMORY_MB} Feature={FEATURE}"
            text.append(f"{line} State=UNKNOWN{gres}")
        text.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60")
        text.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF")
        text.append(f"PartitionName=short Nodes={self.names[0]} MaxTime=5 Hidden=YES State=UP PriorityTier=1")
        (self.folder / "slurm.conf").write_text("\n".join(text) + "\n")


@contextmanager
def slurm_cluster(folder: Path, nodes: int = 2, gpus: int = 0, max_array_size: int = 1001) -> Iterator[Cluster]:
    """A cluster of ``nodes`` nodes with ``gpus`` pretended GPUs each, for the length of a ``with`` block.

    Under ``pytest -n`` each worker's clusters number their jobs from elsewhere: their ranks meet on ports that follow
    from a job's number, and all nodes are one machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    cluster = Cluster(folder, nodes, gpus, max_array_size, first_job=1 + JOBS_A_WORKER * worker)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def until(condition: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Wait until ``condition`` holds; after ``seconds``, ``TimeoutError`` with what ``why`` says."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {why()}")
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Ports of loopback on which nobody listens."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return ""


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
