"""Checkpoints: two safetensors and a side-car that a human can read, whole or not there at all.

``<folder>/<step>/model.safetensors``      float32 master weights of the trainable part, by parameter name
``<folder>/<step>/optimizer.safetensors``  AdamW's moments, ``exp_avg/<name>`` and ``exp_avg_sq/<name>``
``<folder>/<step>/state.json``             step, data position, configuration, revision, checksums

The side-car is written last: a folder without it is a save that was cut short, and is passed over. A folder whose
checksums do not match is passed over as well, aloud. Folders may lie on any fsspec URL.
"""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from pacl_scale import storage
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.log import get_logger
from pacl_scale.run_folder import checkpoints_of
from pacl_scale.storage import StoreUnavailable

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
VERSION = 1
MOST_LOST = 3
"""Writes in a row that may be given up before the run ends: a training that cannot be resumed is not worth its cost."""
log = get_logger("pacl_scale.checkpoint")


@dataclass
class CheckpointConfig:
    """When to save, where, and how many to keep."""

    every_steps: int = 500
    """Save after every so many steps (and always after the last)."""

    every_minutes: float | None = None
    """Save as well when so many minutes have passed since the last save; null: only by steps."""

    keep_last: int = 3
    """Newest checkpoints to keep; older ones are deleted after a successful save."""

    keep_every: int | None = None
    """Keep for good the checkpoints whose step is a multiple of this; null keeps none but the newest."""

    folder: str | None = None
    """Where checkpoints lie: a path or any fsspec URL; null is <run>/checkpoints."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep_last < 1:
            raise ValueError("checkpoint.every_steps and checkpoint.keep_last must be at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError("checkpoint.keep_every must be at least 1, or null")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ValueError("checkpoint.every_minutes must be positive, or null")


def save(
    folder: str,
    step: int,
    state: dict[str, dict[str, Tensor]],
    info: dict[str, Any],
    keep_last: int,
    keep_every: int | None = None,
    best: int | None = None,
) -> str:
    """Write one checkpoint and delete those older than the ``keep_last`` newest; one rank calls it.

    Args:
        folder: where checkpoints lie.
        step: optimizer steps taken.
        state: as ``engine.gather_state`` returns it: ``{"master", "exp_avg", "exp_avg_sq"} -> name -> tensor``.
        info: what the side-car says besides step and checksums; plain JSON.
        keep_last: newest checkpoints to keep.
        keep_every: checkpoints whose step is a multiple of this are never deleted.
        best: step of one that is not deleted either.

    Returns:
        The URL of the checkpoint.
    """
    target = path_of(folder, step)
    moments = {f"{part}/{name}": t for part in state if part != "master" for name, t in state[part].items()}
    contents = {MODEL: save_safetensors(state["master"]), OPTIMIZER: save_safetensors(moments)}
    _write(target, contents, {"step": step, **info})
    # Later steps than this one were passed over as damaged: they are not what a run could go on from.
    for old in [one for one in steps_in(folder) if one <= step][:-keep_last]:
        if old == best or (keep_every and old % keep_every == 0):
            continue
        storage.remove(path_of(folder, old))
    return target


def save_weights(path: str, weights: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write a checkpoint at ``path`` that can be used but not resumed: weights and side-car, no moments."""
    _write(path, {MODEL: save_safetensors(weights)}, info)


class Writer:
    """Writes checkpoints beside the training that goes on, one at a time; also knows when the next one is due.

    A store that does not answer is asked again for a while, then the write is given up, aloud, and training goes on:
    the next checkpoint has all that this one would have had. :data:`MOST_LOST` writes in a row, or the last one, given
    up end the run. What else went wrong in a write is raised by the next call.
    """

    def __init__(self, folder: str, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.best: int | None = None
        """Step of a checkpoint that is kept however old it is."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str] | None = None
        self._last = time.monotonic()
        self._lost = 0

    def minutes_passed(self) -> bool:
        """Whether ``every_minutes`` have passed since the last save."""
        minutes = self.config.every_minutes
        return minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def save(
        self,
        step: int,
        state: dict[str, dict[str, Tensor]],
        info: dict[str, Any],
        note_best: Callable[[], None] | None = None,
    ) -> None:
        """:func:`save` in a thread, when the write before is done.

        ``state`` is not to be changed any more. ``note_best`` is called after it and makes this one the best.
        """
        try:
            self.wait()
        except RunFailed as error:
            self._lost += 1
            if self._lost >= MOST_LOST:
                raise
            log.error("a checkpoint was not written", why=str(error), in_a_row=self._lost)
        self._last = time.monotonic()
        keep_last, keep_every = self.config.keep_last, self.config.keep_every

        def write() -> str:
            # The best one stays until a better one is written.
            url = storage.patiently(save, self.folder, step, state, info, keep_last, keep_every, self.best)
            if note_best:
                note_best()
                self.best = step
            return url

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Until what was handed over is written.

        Raises:
            RunFailed: the store did not answer, however often it was asked.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            log.info("saved", checkpoint=writing.result())
            self._lost = 0

    def close(self) -> None:
        """:meth:`wait`, then end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def load(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Side-car and full state of the checkpoint at ``path``, checked.

    Raises:
        UserError: not a checkpoint, or damaged.
    """
    info = read_state(path)
    state: dict[str, dict[str, Tensor]] = {"master": load_safetensors(_checked(path, MODEL, info))}
    for key, tensor in load_safetensors(_checked(path, OPTIMIZER, info)).items():
        part, _, name = key.partition("/")
        state.setdefault(part, {})[name] = tensor
    return info, state


def steps_in(folder: str) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, ascending; empty where there is no such folder."""
    files, path = storage.filesystem(folder)
    with storage.explained(folder):
        if not files.exists(path):
            return []
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(path, detail=False, refresh=True)]
        return sorted(int(n) for n in names if n.isdecimal() and files.exists(f"{path}/{n}/{STATE}"))


def path_of(folder: str, step: int) -> str:
    """URL of the checkpoint of ``step`` in ``folder``."""
    return storage.join(folder, f"{step:08d}")


def newest(folder: str) -> str | None:
    """URL of the newest checkpoint in ``folder`` that is whole; damaged ones are named and passed over.

    Returns:
        None where nothing was ever saved.

    Raises:
        UserError: there are checkpoints, but none that can be used: to begin again would throw away what was learned.
    """
    steps, why = steps_in(folder), ""
    for step in reversed(steps):
        candidate = path_of(folder, step)
        try:
            info = read_state(candidate)
            for name in (MODEL, OPTIMIZER):
                _checked(candidate, name, info)
            return candidate
        except StoreUnavailable:
            # It may be whole all the same.
            raise
        except UserError as error:
            why = str(error)
            log.warning("checkpoint passed over", path=candidate, why=why)
    if steps:
        raise UserError(
            f"none of the {len(steps)} checkpoints in {folder} can be used ({why}); remove them to begin again"
        )
    return None


def resolve(path: str) -> str:
    """The checkpoint that ``path`` means: itself, or the newest whole one of a run or of a checkpoint folder.

    Raises:
        UserError: there is none.
    """
    if storage.exists(storage.join(path, STATE)):
        return path
    found = newest(checkpoints_of(path)) or newest(path)
    if found is None:
        raise UserError(f"{path} holds no checkpoint; train first, or name a run or a checkpoint folder")
    return found


def read_state(path: str) -> dict[str, Any]:
    """The side-car of the checkpoint at ``path``. Raises :class:`UserError` where it is missing or not ours."""
    url = storage.join(path, STATE)
    try:
        info = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is damaged: it is not JSON") from error
    if not isinstance(info, dict) or info.get("version") != VERSION or not {"step", "config", "sha256"} <= info.keys():
        raise UserError(f"{url} is not the side-car of a checkpoint of this version ({VERSION})")
    return info


def read_weights(path: str, info: dict[str, Any]) -> dict[str, Tensor]:
    """The float32 weights of the checkpoint at ``path`` by parameter name, checked against its checksum."""
    return load_safetensors(_checked(path, MODEL, info))


def _write(path: str, contents: dict[str, bytes], info: dict[str, Any]) -> None:
    for name, content in contents.items():
        storage.write_bytes(storage.join(path, name), content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    # Last, for it is what makes the folder a checkpoint.
    sidecar = {"version": VERSION, **info, "sha256": sums}
    storage.write_bytes(storage.join(path, STATE), json.dumps(sidecar, indent=2).encode())


def _checked(path: str, name: str, info: dict[str, Any]) -> bytes:
    content = storage.read_bytes(storage.join(path, name))
    if hashlib.sha256(content).hexdigest() != info["sha256"].get(name):
        raise UserError(f"{storage.join(path, name)} is damaged: its checksum does not match")
    return content
