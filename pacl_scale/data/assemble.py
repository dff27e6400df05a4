"""One batch in the making: threads decode its samples, row by row, and then it is put together."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pacl_scale import storage
from pacl_scale.data import captions
from pacl_scale.data.batch import PairBatch, draw_patches
from pacl_scale.data.captions import PictureTexts
from pacl_scale.data.decode import BadPicture, PictureConfig, decode, normalise
from pacl_scale.data.index import PICTURE_EXTENSIONS, SampleIndex, hash_key
from pacl_scale.data.order import Picks
from pacl_scale.data.ranges import INDEX_AGAIN, ShardChanged
from pacl_scale.data.reader import Awaited
from pacl_scale.data.sample import Members, read_sample
from pacl_scale.data.tar import DamagedTar
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

if TYPE_CHECKING:
    from pacl_scale.data.stream import PairStream

log = get_logger(__name__)

EXACT = PictureConfig(exact=True)


@dataclass
class _Row:
    """What is known of one pair beside its pixels or patches."""

    key: str
    texts: PictureTexts
    text: str
    text_id: int
    patch_seed: int
    picture: tuple[str, bytes] | None = None


class PendingBatch:
    """A batch that is being decoded: threads fill its rows, then :meth:`finish` puts it together."""

    def __init__(self, stream: "PairStream", picks: Picks, position_after: int) -> None:
        self.tasks: list[Future[None]] = []
        self._stream, self._picks, self._position_after = stream, picks, position_after
        self._rows: list[_Row | str] = [""] * len(picks)
        features, preprocess = stream.features, stream.preprocess
        self._patch_sample = 0 if stream.ordered else stream.config.patch_sample
        self._images, self._patches, self._patch_ids = None, None, None
        if features is not None:
            count = self._patch_sample if self._patch_sample < features.tokens else 0
            self._patches = stream.buffers.empty(len(picks), count or features.tokens, features.width)
            self._patch_ids = torch.empty(len(picks), count, dtype=torch.int64) if count else None
        elif not stream.undecoded:
            assert preprocess is not None
            size = preprocess.image_size
            self._images = stream.buffers.empty(len(picks), 3, size, size)
        vectors = stream.vectors
        self._vectors = None if vectors is None else stream.buffers.empty(len(picks), vectors.width)

    def load(self, rows: Sequence[int], awaited: Sequence[Awaited]) -> None:
        """Fill ``rows``; runs in a decode thread."""
        for row, handle in zip(rows, awaited, strict=True):
            try:
                self._rows[row] = self._load(row, handle.result())
            except BadPicture as error:
                self._rows[row] = str(error)

    def finish(self) -> PairBatch:
        """The batch, when all its rows are there."""
        for task in self.tasks:
            task.result()
        skipped = self._count_skipped()
        good = [row for row, content in enumerate(self._rows) if isinstance(content, _Row)]
        if not good and self._rows and not self._stream.ordered:
            raise UserError(f"not one of the {len(self._rows)} samples of a batch can be used: {listed(skipped)}")
        take = good if self._stream.ordered else _with_neighbours(len(self._rows), good)
        rows = [content for row in take if isinstance(content := self._rows[row], _Row)]
        select = _shorten if self._stream.ordered else _fill
        ids = [row.texts.ids() for row in rows]
        widest = max(map(len, ids), default=1)
        return PairBatch(
            images=select(self._images, take),
            patches=select(self._patches, take),
            patch_ids=select(self._patch_ids, take),
            grid=self._stream.features.grid if self._stream.features else None,
            texts=[row.text for row in rows],
            text_vectors=select(self._vectors, take),
            text_ids=torch.tensor([row.text_id for row in rows], dtype=torch.int64),
            image_text_ids=torch.tensor([i + [-1] * (widest - len(i)) for i in ids], dtype=torch.int64),
            keys=[row.key for row in rows],
            captions=[row.texts.captions for row in rows],
            nouns=[row.texts.nouns for row in rows],
            position_after=self._position_after,
            skipped=dict(skipped),
            pictures=[row.picture for row in rows if row.picture],
            patch_sample=self._patch_sample,
            patch_seeds=[row.patch_seed for row in rows],
        )

    def _load(self, row: int, content: bytes) -> _Row:
        stream, config = self._stream, self._stream.config
        source, epoch, sample = (int(a[row]) for a in (self._picks.source, self._picks.epoch, self._picks.sample))
        index = stream.indexes[source]
        try:
            key, members = read_sample(content)
            changed = hash_key(key) != int(index.key[sample])
        except DamagedTar:
            # The headers were whole when they were indexed, so these are other bytes.
            changed = True
        if changed:
            raise ShardChanged(f"{_shard_url(index, sample)} holds other samples than were indexed; {INDEX_AGAIN}")
        texts = captions.read_texts(members)
        if texts is None:
            raise BadPicture("no caption")
        if stream.ordered:
            text, text_id = texts.captions[0], captions.text_id(texts.captions[0])
        else:
            text, text_id = captions.draw_text(texts, config.text, stream.seed, epoch, key)
        if self._vectors is not None:
            assert stream.vectors is not None
            stream.vectors.read(members, captions.possible_texts(texts), text, self._vectors[row])
        patch_seed = hash_key(f"{stream.seed}/{epoch}/patches/{key}") if self._patch_sample else 0
        picture = None
        if self._patches is not None:
            self._load_patches(row, members, patch_seed)
        elif stream.undecoded:
            extension, content_of = _picture_in(members)
            picture = extension, bytes(content_of)
        else:
            self._load_picture(row, members, epoch, key)
        return _Row(key, texts, text, text_id, patch_seed, picture)

    def _load_patches(self, row: int, members: Members, patch_seed: int) -> None:
        features, ids = self._stream.features, None
        assert features is not None and self._patches is not None
        if self._patch_ids is not None:
            ids = draw_patches(features.tokens, self._patch_sample, patch_seed)
            self._patch_ids[row] = torch.from_numpy(ids)
        features.read(members, ids, self._patches[row])

    def _load_picture(self, row: int, members: Members, epoch: int, key: str) -> None:
        stream, config = self._stream, self._stream.config.picture
        assert stream.preprocess is not None and self._images is not None
        _, content = _picture_in(members)
        drawn = config.augments and not stream.ordered
        draws = captions.draws(stream.seed, epoch, key, "picture", 4) if drawn else None
        pixels = decode(content, stream.preprocess, EXACT if stream.ordered else config, draws)
        normalise(pixels, stream.preprocess, self._images.numpy()[row])

    def _count_skipped(self) -> Counter[str]:
        stream = self._stream
        skipped: Counter[str] = Counter()
        for row, cause in enumerate(self._rows):
            if isinstance(cause, str):
                skipped[cause] += 1
                index, sample = stream.indexes[int(self._picks.source[row])], int(self._picks.sample[row])
                log.warning(
                    "sample skipped", cause=cause, shard=_shard_url(index, sample), byte=int(index.offset[sample])
                )
        return skipped


def _picture_in(members: Members) -> tuple[str, memoryview]:
    """Extension and content of a sample's picture."""
    for extension in PICTURE_EXTENSIONS:
        if extension in members:
            return extension, members[extension]
    raise BadPicture("no picture")


def _shard_url(index: SampleIndex, sample: int) -> str:
    return storage.join(index.root_url, index.shards[int(index.shard_of(np.array(sample)))].name)


def _with_neighbours(count: int, good: list[int]) -> list[int]:
    """``count`` rows in order; a bad one is replaced by the next good one, cyclically."""
    places = np.searchsorted(good, np.arange(count)) % max(len(good), 1)
    return [good[place] for place in places]


def _fill(tensor: Tensor | None, rows: list[int]) -> Tensor | None:
    """``tensor[rows]`` in place, where good rows are at their own place."""
    for row, source in enumerate(rows if tensor is not None else ()):
        if row != source:
            assert tensor is not None
            tensor[row] = tensor[source]
    return tensor


def _shorten(tensor: Tensor | None, rows: list[int]) -> Tensor | None:
    """``tensor[rows]``, fewer rows in the same order."""
    if tensor is None or len(rows) == len(tensor):
        return tensor
    chosen = tensor[torch.tensor(rows, dtype=torch.int64)]
    return chosen.pin_memory() if tensor.is_pinned() else chosen


def listed(causes: Counter[str]) -> str:
    """Counts by cause as words, the commonest first."""
    return ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
