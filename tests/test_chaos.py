"""Sixty disasters over one training run: the curve is the undisturbed one, and every sample was seen once an epoch."""

import json
import os
import random
import signal
import socket
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from ranks import started_quickly
from training import SAMPLES, curve, settings_for

from pacl_scale import checkpoint, config, metrics, storage
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.stream import DataConfig
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import EXIT_REQUEUE, run_command
from pacl_scale.quickstart.store import ObjectStore
from pacl_scale.train import TrainConfig

pytestmark = [pytest.mark.distributed, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, BATCH, DISASTERS = 480, 16, 60
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STORE_FAULTS = ("500", "503", "reset before", "reset in body", "truncated")

processes = started_quickly()


def rank_of(settings: dict[str, Any], rank: int, size: int, port: int, seen: str) -> None:
    """One rank of one attempt, as under a launcher; notes the samples that it trains on."""
    import torch

    from pacl_scale import distributed, signals, train

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    real = train.encode

    def noting(batch: Any, *arguments: Any) -> Any:
        with open(f"{seen}.{rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([batch.position_after, batch.keys]) + "\n")
        return real(batch, *arguments)

    def command() -> int:
        parsed = config.parse(TrainConfig, ["--config", settings["file"]], "train")
        with (
            mock.patch.object(train, "encode", noting),
            distributed.joined(parsed.distributed) as world,
            signals.heard() as stop,
        ):
            return 0 if train.train(parsed, world, stop) else EXIT_REQUEUE

    os._exit(run_command(command))


class Attempt:
    """Ranks that train until something happens to them; started from a process that has imported everything."""

    def __init__(self, file: Path, size: int, seen: str, environment: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = ({"file": str(file)}, size, port, seen, environment)
        self.ranks: list[BaseProcess] = [
            processes.Process(target=with_environment, args=(rank, *arguments)) for rank in range(size)
        ]
        for process in self.ranks:
            process.start()

    def signal(self, number: int, rank: int) -> None:
        process = self.ranks[rank]
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)

    def end(self, timeout: float = 90.0, launching: bool = False) -> list[int | None]:
        """Exit codes of all ranks, which end within a bounded time whatever happened to one of them.

        Ranks that are ``launching`` wait for a rank that is gone before it joined them; a launcher ends those.
        """
        deadline = time.monotonic() + timeout
        while launching and all(process.is_alive() for process in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        if launching:
            deadline = time.monotonic() + 3
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        assert launching or None not in codes, f"ranks went on: {codes}"
        return codes

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.ranks)


def with_environment(rank: int, settings: dict[str, Any], size: int, port: int, seen: str, env: dict[str, str]) -> None:
    os.environ |= env
    rank_of(settings, rank, size, port, seen)


def write_settings(features: str, run: Path, folder: str | None = None) -> Path:
    settings = settings_for(
        features,
        run,
        steps=STEPS,
        global_batch_size=BATCH,
        data=DataConfig(root=features, patch_sample=4),
        engine=EngineConfig(1, "fp32"),
        checkpoint=CheckpointConfig(every_steps=5, keep_every=STEPS // 2, folder=folder),
    )
    settings.distributed.device, settings.distributed.threads = "cpu", 1
    settings.distributed.step_timeout_minutes = 0.5
    file = run.with_suffix(".yaml")
    file.write_text(config.to_yaml(settings), encoding="utf-8")
    return file


def damage(url: str, chance: random.Random) -> str:
    """Cut the newest checkpoint's weights short, or lose its side-car: what a dying store may leave behind."""
    steps = checkpoint.steps_in(url)
    if len(steps) < 2:
        return "nothing to damage"
    newest = storage.join(url, f"{steps[-1]:08d}")
    if chance.random() < 0.5:
        weights = storage.join(newest, checkpoint.MODEL)
        storage.write_bytes(weights, storage.read_bytes(weights)[:-100])
        return "truncated checkpoint"
    storage.remove(storage.join(newest, checkpoint.STATE))
    return "half a checkpoint"


def seen_samples(folder: Path) -> dict[int, list[str]]:
    """Position after a batch -> keys of all ranks, from the newest attempt that trained on it."""
    found: dict[int, list[str]] = {}
    attempts = sorted({int(file.name.split(".")[1]) for file in folder.iterdir()})
    for attempt in attempts:
        by_rank: dict[int, list[str]] = {}
        for file in sorted(folder.glob(f"seen.{attempt}.*")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    position, keys = json.loads(line)
                except ValueError:
                    continue
                by_rank.setdefault(position, []).extend(keys)
        # A rank that was killed in a step leaves the others' part of a batch; a later attempt trains on it again.
        found |= {position: keys for position, keys in by_rank.items() if len(keys) == BATCH}
    return found


def wait_for(run: Path, attempt: Attempt, steps: int) -> None:
    """Until the run is ``steps`` further than it was, or over."""
    file = run / "metrics.jsonl"

    def step() -> int:
        lines = metrics.read_metrics(file) if file.exists() else []
        return lines[-1]["step"] if lines else 0

    begun, deadline = step(), time.monotonic() + 60
    while attempt.alive and step() < begun + steps:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def test_sixty_disasters_change_nothing(quick_features: str, store: ObjectStore, s3_url: str, tmp_path: Path) -> None:
    quiet = Attempt(write_settings(quick_features, tmp_path / "quiet"), 2, str(tmp_path / "quiet-seen"), {})
    assert quiet.end(300) == [0, 0]

    chance = random.Random(7)
    run, seen, folder = tmp_path / "run", tmp_path / "seen", f"{s3_url}/checkpoints"
    seen.mkdir()
    file = write_settings(quick_features, run, folder)
    happened: Counter[str] = Counter()
    with FaultyProxy(store.endpoint, share=0.0, faults=STORE_FAULTS, stall_s=0.2, seed=1) as proxy:
        environment = store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
        number, attempt = 0, None
        kinds = ["kill", "signal", "store", "store"] * (DISASTERS // 4)
        chance.shuffle(kinds)
        for kind in kinds:
            if attempt is None:
                attempt = Attempt(file, chance.choice((2, 2, 2, 4)), str(seen / f"seen.{number}"), environment)
                number += 1
            # At its start, when it joins its peers, reads checkpoints and lays out its state; or later.
            launching = chance.random() < 0.2
            if launching:
                time.sleep(chance.uniform(0, 2))
            else:
                wait_for(run, attempt, chance.randint(1, 7))
            happened[kind] += 1
            if kind == "store":
                proxy.share = chance.choice((0.2, 0.5))
                wait_for(run, attempt, 5)
                proxy.share = 0.0
                if attempt.alive:
                    continue
            else:
                which = signal.SIGKILL if kind == "kill" else chance.choice(SIGNALS)
                attempt.signal(which, chance.randrange(len(attempt.ranks)))
            codes = attempt.end(launching=launching)
            attempt = None
            if set(codes) == {0}:
                # Done before its time: as if it had not been, so that there is something left to disturb.
                rewind(folder, run, STEPS // 2)
            elif chance.random() < 0.25:
                happened[damage(folder, chance)] += 1
        last = attempt or Attempt(file, 2, str(seen / f"seen.{number}"), environment)
        codes = last.end(300)
        if set(codes) != {0}:
            codes = Attempt(file, 2, str(seen / f"seen.{number + 1}"), environment).end(300)
    assert codes == [0] * len(codes)
    assert proxy.spoiled.total() > 20
    assert happened["truncated checkpoint"] and happened["half a checkpoint"]

    np.testing.assert_allclose(curve(run), curve(tmp_path / "quiet"), rtol=1e-5)
    batches = seen_samples(seen)
    assert sorted(batches) == list(range(BATCH, STEPS * BATCH + 1, BATCH))
    per_epoch = SAMPLES // BATCH
    ordered = [batches[position] for position in sorted(batches)]
    for start in range(0, STEPS, per_epoch):
        keys = [key for keys in ordered[start : start + per_epoch] for key in keys]
        assert len(set(keys)) == SAMPLES
    assert not [name for name in run.rglob("*.part")]


def rewind(folder: str, run: Path, step: int) -> None:
    """Forget what came after ``step``."""
    for later in checkpoint.steps_in(folder):
        if later > step:
            storage.remove(storage.join(folder, f"{later:08d}"))
    assert checkpoint.steps_in(folder)[-1] == step
    metrics.MetricsFile(run / "metrics.jsonl", step)
