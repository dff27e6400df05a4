"""Zero-shot segmentation: each picture is encoded once, and every method scores the same patch tokens.

Letters: B views, T = h*w patches, Din width of the tower's tokens, D of text vectors, C classes, H x W pixels.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pacl_scale import log
from pacl_scale.errors import UserError
from pacl_scale.evaluate.boundaries import boundary_counts
from pacl_scale.evaluate.classes import NOT_SCORED, ClassList
from pacl_scale.evaluate.counts import Confusion
from pacl_scale.evaluate.labels import Lattice, View, cells, label_pixels, merged
from pacl_scale.evaluate.methods import MAJORITY, PATCH_ORACLE, Method, Towers
from pacl_scale.evaluate.pictures import AnnotatedPictures, read_ahead
from pacl_scale.evaluate.progress import Progress
from pacl_scale.evaluate.protocol import ClassVectors, Protocol, patch_scores, vectors_for
from pacl_scale.evaluate.rows import Row, checkpoint_of, digest, towers_of
from pacl_scale.evaluate.tallies import OWN_WORDS, PictureCounts, Tally, majority, scores_of, sparse
from pacl_scale.evaluate.views import Prepared, check_size, check_stride, lattice_of, prepare, recorded

READERS = 4
"""Threads that read, decode and resize pictures beside the tower."""

BATCHES_WAITING = 4
"""Views of different shapes wait for company in their own batches, but never more than so many batches' worth."""

TOKENS_AT_ONCE = 16384
"""Patches that pass the tower together at most: small strides go picture by picture, which bounds memory."""


def evaluate_segmentation(
    name: str,
    data: AnnotatedPictures,
    towers: Towers,
    methods: Sequence[Method],
    protocol: Protocol,
    batch_size: int,
    controls: Sequence[str] = (MAJORITY, PATCH_ORACLE),
    progress: Progress | None = None,
) -> list[Row]:
    """Score ``methods`` and ``controls`` on a data set, in one pass of the vision tower.

    Args:
        name: the data set's name in the rows.
        data: pictures, masks, classes.
        towers: the frozen encoders; each view of a picture passes the vision tower once.
        methods: embedders to score.
        protocol: how pictures are shown and scores become labels.
        batch_size: views of one shape that pass the tower together.
        controls: of :data:`MAJORITY` (the most frequent true class everywhere: it peeks at the truth) and
            :data:`PATCH_ORACLE` (the true majority class of each patch: what the patch grid can reach).
        progress: remembers the counts of finished pictures and which pictures this process is to do; if not given,
            nothing is remembered and every picture is done.

    Returns:
        One row a method, then one a control; none while other processes' pictures are missing.

    Raises:
        UserError: a picture or mask cannot be used, or the protocol does not suit the data set or the tower.
    """
    started = time.monotonic()
    classes = data.classes
    check_segmentation(name, classes, towers, protocol)
    positions = positions_of(classes, protocol)
    vectors = {word_set or OWN_WORDS: _vectors(towers, classes, word_set, protocol) for word_set in classes.word_sets()}
    progress = progress or Progress.forgetful()
    numbers = progress.remaining([data.name(number) for number in range(len(data))])
    lattice = lattice_of(towers.vision, protocol)
    done = encoded_batches(data, numbers, towers, protocol, batch_size)
    for prepared, tokens in log.progress(done, f"evaluate {name}", total=len(numbers), unit="picture"):
        counts = {
            method.name: count_picture(prepared, tokens, method, vectors, lattice, protocol, classes, positions)
            for method in methods
        }
        if PATCH_ORACLE in controls:
            truth_HW, size = prepared.truth_HW, prepared.views[0].size
            labels_HW = oracle_labels(truth_HW, lattice.grid(size), positions, size, lattice)
            counts[PATCH_ORACLE] = PictureCounts({OWN_WORDS: sparse(Confusion.of(truth_HW, labels_HW, positions))})
        progress.add(data.name(prepared.number), counts)
    finished = progress.all_done(len(data))
    if finished is None:
        return []
    tallies = {method.name: Tally() for method in methods} | (
        {PATCH_ORACLE: Tally()} if PATCH_ORACLE in controls else {}
    )
    for picture, found in finished.items():
        for method_name, tally in tallies.items():
            tally.pictures[picture] = found[method_name]
    checkpoints: dict[str, dict[str, Any]] = {method.name: checkpoint_of(method) for method in methods}
    checkpoints[PATCH_ORACLE] = {}
    if MAJORITY in controls:
        oracle = tallies.pop(PATCH_ORACLE, None)
        tallies[MAJORITY], answer = majority(oracle or next(iter(tallies.values())), positions)
        checkpoints[MAJORITY] = {"answer": [*classes.names, "background"][answer]}
        tallies |= {PATCH_ORACLE: oracle} if oracle else {}
    seconds = round(time.monotonic() - started, 3)
    record = recorded(protocol, towers.vision)
    record["background_applied"] = protocol.background_applies(classes.score_background)
    names = digest([data.name(number) for number in range(len(data))])
    return [
        Row(
            task="segmentation",
            data_set=name,
            protocol=record,
            method=method_name,
            checkpoint=checkpoints[method_name],
            towers=towers_of(towers),
            pictures=len(data),
            scores=scores_of(tally, classes, positions),
            per_picture=tally.per_picture(positions),
            confusion=tally.total(positions).counts_CC.tolist(),
            seconds=seconds,
            data=data.record | classes.record() | {"names": names},
        )
        for method_name, tally in tallies.items()
    ]


def positions_of(classes: ClassList, protocol: Protocol) -> int:
    """Rows of the confusion matrix: the classes, and background where it is scored or can be answered."""
    background = classes.score_background or protocol.background_applies(classes.score_background)
    return len(classes.indices) + background


@torch.no_grad()
def encoded_batches(
    data: AnnotatedPictures, numbers: Sequence[int], towers: Towers, protocol: Protocol, batch_size: int
) -> Iterator[tuple[Prepared, list[tuple[View, Tensor, tuple[int, int]]]]]:
    """Each picture of ``numbers`` with its views' patch tokens (1, T, Din) and grids, in the order of full batches.

    Views are batched by their size; reading, decoding and resizing run ahead in threads.
    """
    vision = towers.vision
    lattice = lattice_of(vision, protocol)

    def read(number: int) -> Prepared:
        picture, truth_HW = data.read(number)
        check_size(truth_HW.shape, data.name(number), vision, protocol)
        return prepare(number, picture, truth_HW, vision, protocol)

    def encode(batch: list[tuple[Prepared, int]]) -> Iterator[Prepared]:
        pixels_B3hw = torch.stack([item.inputs[number] for item, number in batch]).to(towers.device)
        encoded = vision.encode(pixels_B3hw, protocol.stride or None)
        for row, (item, number) in enumerate(batch):
            item.tokens[number] = encoded.tokens[row : row + 1]
            item.grids[number] = encoded.grid
            item.inputs[number] = torch.empty(0)
            if len(item.tokens) == len(item.views):
                yield item

    def finished(batch: list[tuple[Prepared, int]]) -> Iterator[tuple[Prepared, list[Any]]]:
        for item in encode(batch):
            tokens = [(view, item.tokens.pop(n), item.grids[n]) for n, view in enumerate(item.views)]
            yield item, tokens

    waiting: dict[torch.Size, list[tuple[Prepared, int]]] = {}
    for item in read_ahead(numbers, read, READERS):
        for number, pixels_3hw in enumerate(item.inputs):
            shape = pixels_3hw.shape
            patches = (shape[1] // lattice.stride) * (shape[2] // lattice.stride)
            batch = waiting.setdefault(shape, [])
            batch.append((item, number))
            if len(batch) >= min(batch_size, max(1, TOKENS_AT_ONCE // patches)):
                yield from finished(waiting.pop(shape))
        if sum(map(len, waiting.values())) >= BATCHES_WAITING * batch_size:
            yield from finished(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
    for batch in waiting.values():
        yield from finished(batch)


def predict(
    tokens: Sequence[tuple[View, Tensor, tuple[int, int]]],
    method: Method,
    vectors: ClassVectors,
    size: tuple[int, ...],
    lattice: Lattice,
    protocol: Protocol,
    background: int | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Class positions (H, W) int64 of one picture from its views' tokens, and the first view's maps (C, h, w)."""
    out = (size[0], size[1])
    maps = score_maps(tokens, method, vectors)
    labels_HW, _ = label_pixels(
        lambda portion: merged(maps, portion, out, lattice), vectors.classes, out[0] * out[1], protocol, background
    )
    return labels_HW.cpu().numpy(), maps[0][1]


def score_maps(
    tokens: Sequence[tuple[View, Tensor, tuple[int, int]]], method: Method, vectors: ClassVectors
) -> list[tuple[View, Tensor]]:
    """Each view with its scores (C, h, w) on patches."""
    return [(view, patch_scores(method.embed(tokens_1TD), vectors, grid)[0]) for view, tokens_1TD, grid in tokens]


def count_picture(
    prepared: Prepared,
    tokens: Sequence[tuple[View, Tensor, tuple[int, int]]],
    method: Method,
    vectors: Mapping[str, ClassVectors],
    lattice: Lattice,
    protocol: Protocol,
    classes: ClassList,
    positions: int,
) -> PictureCounts:
    """Exact counts of one method on one picture, under every word set."""
    truth_HW = prepared.truth_HW
    background = classes.background_position if protocol.background_applies(classes.score_background) else None
    counts = PictureCounts({})
    for word_set, class_vectors in vectors.items():
        labels_HW, first_Chw = predict(tokens, method, class_vectors, truth_HW.shape, lattice, protocol, background)
        counts.confusions[word_set] = sparse(Confusion.of(truth_HW, labels_HW, positions))
        if word_set == OWN_WORDS:
            if protocol.boundary:
                counts.boundary = boundary_counts(truth_HW, labels_HW, positions, protocol.boundary).tolist()
            # A square picture fits into one window: a figure of these alone would not be the data set's.
            if not protocol.window:
                counts.patches = _right_patches(truth_HW, first_Chw, prepared, lattice, positions, len(classes.indices))
    return counts


def oracle_labels(
    truth_HW: np.ndarray,
    grid: tuple[int, int],
    classes: int,
    box: tuple[int, int] | None = None,
    lattice: Lattice | None = None,
) -> np.ndarray:
    """What the patch grid can express of the truth (H, W): the most frequent scored class of each patch, upsampled.

    One-hot maps of the patches' true classes take the place of a model's scores; a patch without a scored pixel
    votes for no class. A tie goes to the class that comes first. Without ``box`` (the tower's input in pixels) and
    ``lattice``, patches do not overlap and fill the picture.
    """
    height, width = truth_HW.shape
    lattice = lattice or Lattice(1, 1)
    box = box or grid
    votes_TC = _votes(truth_HW, grid, classes, box, lattice)
    winners_TC = F.one_hot(votes_TC.argmax(dim=1), classes) * (votes_TC.sum(dim=1, keepdim=True) > 0)
    winners_Chw = winners_TC.float().T.reshape(classes, *grid)
    maps = [(View(0, box, 0, 0, box), winners_Chw)]
    labels_HW, _ = label_pixels(
        lambda portion: merged(maps, portion, (height, width), lattice), classes, height * width, Protocol()
    )
    return labels_HW.numpy()


def _votes(truth_HW: np.ndarray, grid: tuple[int, int], classes: int, box: tuple[int, int], lattice: Lattice) -> Tensor:
    """Scored pixels (T, C) of each class nearest to each patch's centre."""
    rows_H = cells(grid[0], truth_HW.shape[0], box[0], lattice).numpy()
    columns_W = cells(grid[1], truth_HW.shape[1], box[1], lattice).numpy()
    patch_HW = rows_H[:, None] * grid[1] + columns_W
    scored = truth_HW != NOT_SCORED
    patches = grid[0] * grid[1]
    votes = np.bincount(patch_HW[scored] * classes + truth_HW[scored], minlength=patches * classes)
    return torch.from_numpy(votes).view(patches, classes)


def _right_patches(
    truth_HW: np.ndarray, maps_Chw: Tensor, prepared: Prepared, lattice: Lattice, positions: int, classes: int
) -> list[int]:
    """Patches whose best class is their most frequent true class, and all patches with a pixel of a class.

    Background, which is no class, neither votes nor is answered, whatever the protocol's rule for it.
    """
    votes_TC = _votes(truth_HW, prepared.grids[0], positions, prepared.views[0].size, lattice)[:, :classes]
    said_T = maps_Chw[:classes].flatten(1).argmax(dim=0).cpu()
    voted_T = votes_TC.sum(dim=1) > 0
    right = (votes_TC.argmax(dim=1) == said_T) & voted_T
    return [int(right.sum()), int(voted_T.sum())]


def _vectors(towers: Towers, classes: ClassList, word_set: str | None, protocol: Protocol) -> ClassVectors:
    background = protocol.background == "words" and protocol.background_applies(classes.score_background)
    return vectors_for(towers.text, classes.synonyms(word_set), protocol, background).to(towers.device)


def check_segmentation(name: str, classes: ClassList, towers: Towers, protocol: Protocol) -> None:
    """Raise :class:`UserError` where a protocol does not suit a data set or the tower, before anything is measured."""
    if classes.score_background and protocol.background == "none":
        raise UserError(f"{name} scores background, so the protocol needs a rule for it; set protocol.background")
    try:
        check_stride(towers.vision, protocol)
    except ValueError as error:
        raise UserError(f"protocol.stride={protocol.stride} does not suit this vision tower: {error}") from error
