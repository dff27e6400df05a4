"""Batches of picture-text pairs on this rank, from indexed tars of pictures or of cached patch tokens.

What a batch holds is decided by (seed, position) alone: which samples, in which order, with which text, which crop
and which patches. Neither the number of ranks or threads nor the moment of a restart makes a difference.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pacl_scale import storage
from pacl_scale.data.assemble import listed
from pacl_scale.data.batch import PairBatch
from pacl_scale.data.buffers import Buffers, Memory
from pacl_scale.data.captions import TextConfig
from pacl_scale.data.decode import PictureConfig, resizer
from pacl_scale.data.disk_cache import DiskCache
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import SampleIndex
from pacl_scale.data.order import EndlessOrder, Mixture
from pacl_scale.data.own_process import OwnProcessRun
from pacl_scale.data.ranges import ShardReader
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.run import Run
from pacl_scale.data.vectors import VectorFormat
from pacl_scale.distributed import World
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

if TYPE_CHECKING:
    from pacl_scale.encoders.vision import Preprocess

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))

JUDGED_FROM = 100
"""Samples after which the share of skipped ones is judged."""


@dataclass
class DataConfig:
    """The data set and how it becomes batches."""

    root: str = ""
    """Path or URL of a folder of indexed tars: pictures, or the patch tokens that `cache` wrote."""

    mix: dict[str, float] = field(default_factory=dict)
    """Several such folders with their weights, instead of root. Each is consumed in its own order and starts its own
    next epoch; a weight twice another's delivers twice the samples."""

    text: TextConfig = field(default_factory=TextConfig)
    picture: PictureConfig = field(default_factory=PictureConfig)
    read: ReadConfig = field(default_factory=ReadConfig)

    patch_sample: int = 0
    """Patches of a picture that enter a step, drawn from (seed, epoch, key); 0 takes all. Fewer cost less;
    what they lose, `benchmarks/patch_sampling.py` measures."""

    decode_threads: int = 0
    """Threads that decode, in each rank; 0 takes as many as torch computes with."""

    prefetch_batches: int = 2
    """Finished batches that wait for the training step."""

    own_process: bool | None = None
    """Load in a process of its own, one a rank, and not in the rank's threads, which hold up its launching of GPU work.
    None: where the rank computes on a GPU. Evaluation and `cache` always load in threads."""

    max_skip_share: float = 0.05
    """Share of this rank's samples that may be unusable (no picture, damaged, no caption) before the run stops."""

    def __post_init__(self) -> None:
        if self.root and self.mix:
            raise ValueError("data.root and data.mix are two ways to say the same; set one of them")
        if any(weight <= 0 for weight in self.mix.values()):
            raise ValueError("the weights of data.mix must be above 0")
        if self.patch_sample < 0 or self.decode_threads < 0 or self.prefetch_batches < 1:
            raise ValueError("data.patch_sample and decode_threads must be at least 0, prefetch_batches at least 1")
        if not 0 <= self.max_skip_share < 1:
            raise ValueError(f"data.max_skip_share is a share from 0 to below 1, not {self.max_skip_share}")

    @property
    def weights(self) -> dict[str, float]:
        """Folder -> weight, whichever way it was said, in an order that does not depend on how."""
        return dict(sorted((self.mix or {self.root: 1.0}).items()))


class PairStream:
    """An iterator of :class:`PairBatch`; endless in training, once over the data in ordered mode.

    Use it in a ``with`` block, or call :meth:`close`, so that its threads end with it.

    Args:
        config: what and how.
        seed: of the run, not negative.
        global_batch_size: samples of all ranks together in one batch.
        world: which part of every batch is ours, and the device it goes to: for a CUDA device the tensors lie in
            page-locked memory, so that copies to it do not block.
        position: samples consumed before, by all ranks; see also :meth:`load_state`.
        ordered: for evaluation: every sample once, in the order of the index, with its first caption, all patches, no
            augmentation, and a last batch that may be smaller.

    Raises:
        UserError: no data set named, no index, several encoders' features or vectors, fewer samples than a batch.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        world: World = ALONE,
        *,
        position: int = 0,
        ordered: bool = False,
    ) -> None:
        self.config, self.seed, self.ordered = config, seed, ordered
        self.global_batch_size, self.world = global_batch_size, world
        if not config.root and not config.mix:
            raise UserError("no data set is named; set data.root to a folder of indexed tars")
        self.indexes = [SampleIndex.load(root) for root in config.weights]
        self.features = _common_format(self.indexes)
        """The format of the data set's patch tokens; None for a data set of pictures."""
        self.vectors = _common_vectors(self.indexes) if config.text.cached_vectors else None
        """The format of the data set's text vectors; None where it has none, or where none are wanted."""
        self.position = position
        """Samples consumed by all ranks together, the batch handed out last included."""
        self.skipped: Counter[str] = Counter()
        """Unusable samples of this rank so far, by cause."""
        self.seen = 0
        """Samples of this rank so far, the unusable ones included."""
        self.preprocess: Preprocess | None = None
        self.undecoded = False
        """Whether batches hold pictures as they lie in the tars, instead of pixels."""
        self.buffers: Memory = Buffers(pin=world.device.type == "cuda")
        self._mixture = self._mix(position, None)
        self._running: Run | OwnProcessRun | None = None
        self._readers: tuple[int, list[ShardReader]] = (0, [])
        """Those of the iteration before, and the process that they belong to."""
        self._check()

    def __len__(self) -> int:
        """Samples in one epoch of the data set; of a mixture, of all its data sets together."""
        return sum(len(index) for index in self.indexes)

    @property
    def width(self) -> int:
        """Channels of the data set's patch tokens."""
        if self.features is None:
            raise ValueError("a data set of pictures has no width; ask the vision encoder")
        return self.features.width

    @property
    def retried(self) -> Counter[str]:
        """Reads of this rank that were tried again since the iteration began, by cause."""
        return self._running.retried if self._running else Counter()

    def prepare_pictures_for(self, preprocess: "Preprocess") -> None:
        """Say how the vision encoder wants its pictures; before the first batch of a data set of pictures."""
        self.preprocess = preprocess
        resizer()

    def state_after(self, batch: PairBatch) -> dict[str, Any]:
        """Where the stream is when ``batch`` is done, as plain JSON: give it to :meth:`load_state` of a stream with
        any number of ranks, threads, or samples a batch."""
        return self._state_at(batch.position_after)

    def _state_at(self, position: int) -> dict[str, Any]:
        own = self._mixture.own_positions(position).tolist()
        return {
            "seed": self.seed,
            "position": position,
            "own_positions": dict(zip(self.config.weights, own, strict=True)),
            "indexes": {name: i.identity for name, i in zip(self.config.weights, self.indexes, strict=True)},
            "chunk_samples": self.config.read.chunk_samples,
            "window_chunks": self.config.read.window_chunks,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream was. A data set that moved is known by its index; one that was not in the mixture
        begins at its start.

        Raises:
            UserError: the state belongs to another order (another seed, chunk or window, an index that was written
                anew and names other samples), or to none of these data sets.
        """
        if state["seed"] != self.seed:
            raise UserError(f"the data was ordered by seed {state['seed']}, not {self.seed}; resume with the same seed")
        for name in ("chunk_samples", "window_chunks"):
            before, now = state.get(name), getattr(self.config.read, name)
            if before not in (None, now):
                raise UserError(
                    f"the data was ordered with data.read.{name} {before}, not {now}; resume with the same one"
                )
        own = self._own_positions_in(state)
        self.close()
        self.position = int(state["position"])
        self._mixture = self._mix(self.position, own)

    def __iter__(self) -> Iterator[PairBatch]:
        if self.features is None and self.preprocess is None and not self.undecoded:
            raise ValueError("prepare_pictures_for() says how the encoder wants its pictures; call it first")
        return self.span(self.position, len(self) if self.ordered else None)

    def span(self, start: int, stop: int | None) -> Iterator[PairBatch]:
        """The batches of the positions ``start`` to ``stop`` (None: without end); the last may be smaller.

        An iterator is of no more use when the stream was closed, moved or iterated anew, or in a process that was
        forked meanwhile: it raises RuntimeError, and the stream can be iterated again. Spans that follow one another
        use the same connections to the store.
        """
        self.close()
        run = self._running = self.begin(start, stop)
        while (batch := run.next()) is not None:
            self.position = batch.position_after
            self._count(batch)
            yield batch
        self.close()

    def begin(self, start: int, stop: int | None) -> Run | OwnProcessRun:
        """What makes the batches of :meth:`span`; whoever calls this closes it."""
        own_process = self.config.own_process
        if own_process is None:
            own_process = self.world.device.type == "cuda"
        if own_process and not self.ordered:
            return OwnProcessRun(self, self._state_at(start), start, stop)
        return Run(self, self._mixture, self._open_readers(), start, stop)

    def __enter__(self) -> "PairStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            "a stream cannot be sent to another process; send its config and state_after(batch), and open one there"
        )

    def close(self) -> None:
        """End the threads; the stream can be iterated again from where it is.

        Returns within about a second, even where the store or a file system hangs: a thread that waits for it is left
        behind, ends with its time-out, and does not keep the program from ending.
        """
        run, self._running = self._running, None
        if run is None:
            return
        if run.is_of_this_process:
            run.close()
        else:
            # Its threads are those of the process that forked this one, and may have held a lock at that moment.
            self.buffers = Buffers(pin=self.world.device.type == "cuda")

    def _open_readers(self) -> list[ShardReader]:
        """A reader of each data set; connections that this process has are used again."""
        process, readers = self._readers
        if process == os.getpid():
            readers = [reader.again() for reader in readers]
        else:
            read = self.config.read
            disk_cache = DiskCache(read.disk_cache, int(read.disk_cache_gb * 1e9)) if read.disk_cache else None
            readers = [
                ShardReader(index, read.fetch_threads, read.timeout_s, read.retries, disk_cache)
                for index in self.indexes
            ]
        self._readers = os.getpid(), readers
        return readers

    def _count(self, batch: PairBatch) -> None:
        """Count a batch when it is handed out, not when a thread has made it ahead of its turn."""
        skipped = sum(batch.skipped.values())
        self.skipped += Counter(batch.skipped)
        # In training a neighbour takes the place of a skipped sample, so the batch is as long as ever.
        self.seen += len(batch) + (skipped if self.ordered else 0)
        if self.skipped.total() > self.config.max_skip_share * max(self.seen, JUDGED_FROM):
            raise UserError(
                f"{self.skipped.total()} of {self.seen} samples cannot be used ({listed(self.skipped)}), "
                f"more than data.max_skip_share = {self.config.max_skip_share:.0%}"
            )

    def _own_positions_in(self, state: Mapping[str, Any]) -> list[int]:
        """Samples of each of our data sets that a state counts as consumed."""
        known, left = state.get("indexes", {}), dict(state["own_positions"])
        found: dict[str, int] = {}
        for name, index in zip(self.config.weights, self.indexes, strict=True):
            if name in left:
                if known.get(name, index.identity) != index.identity:
                    raise UserError(
                        f"{name} was indexed anew and holds other samples than when the state was saved, so that "
                        "samples would be lost or repeated; restore the index, or start another run"
                    )
                found[name] = int(left.pop(name))
        for name, index in zip(self.config.weights, self.indexes, strict=True):
            moved = next((old for old in left if known.get(old) == index.identity), None)
            if name not in found and moved is not None:
                found[name] = int(left.pop(moved))
        if not found and state["position"]:
            ours, theirs = (", ".join(names) for names in (self.config.weights, state["own_positions"]))
            raise UserError(f"the state is of {theirs}, and {ours} holds other samples; start another run")
        return [found.get(name, 0) for name in self.config.weights]

    def _mix(self, position: int, own_positions: list[int] | None) -> Mixture:
        window = 0 if self.ordered else self.config.read.window_chunks
        orders = [EndlessOrder(i.shards, self.seed, self.config.read.chunk_samples, window) for i in self.indexes]
        return Mixture(orders, list(self.config.weights.values()), position, own_positions)

    def _check(self) -> None:
        if self.ordered and len(self.indexes) > 1:
            raise UserError("ordered reading is of one data set; set data.root instead of data.mix")
        if self.features is not None and self.config.picture.augments:
            raise UserError(
                f"{self.indexes[0].root_url} holds patch tokens, which cannot be cropped or flipped; "
                "train on the pictures or switch the augmentation off"
            )
        if self.config.read.disk_cache and all(storage.is_local(root) for root in self.config.weights):
            log.warning(
                "data.read.disk_cache is of no use: the data set is on this machine", root=self.indexes[0].root_url
            )
        weights = self.config.weights
        for (root, weight), index in zip(weights.items(), self.indexes, strict=True):
            part = math.ceil(self.global_batch_size * weight / sum(weights.values()))
            if not self.ordered and len(index) < part:
                raise UserError(
                    f"{root} has {len(index):,} samples, fewer than its part of a global batch, {part:,} of "
                    f"{self.global_batch_size:,}"
                )


def _common_format(indexes: Sequence[SampleIndex]) -> FeatureFormat | None:
    """The one format of all data sets; None where they hold pictures."""
    formats = [FeatureFormat.of(index) for index in indexes]
    if any(one != formats[0] for one in formats):
        raise UserError("the data sets of data.mix must all hold pictures, or all patch tokens of one encoder")
    return formats[0]


def _common_vectors(indexes: Sequence[SampleIndex]) -> VectorFormat | None:
    """The one format of all data sets' text vectors; None where they have none."""
    formats = [VectorFormat.of(index) for index in indexes]
    if any(one != formats[0] for one in formats):
        raise UserError(
            "the data sets of data.mix must all hold text vectors of one tower, or none; "
            "data.text.cached_vectors=false encodes all texts with the text tower"
        )
    return formats[0]
