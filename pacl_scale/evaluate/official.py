"""The official segmentation data sets, read as they are downloaded: one row each.

Each row says which folders (or archives) hold pictures, masks and the list of the split, what the masks' values mean,
and how many pictures the split has. Where several layouts are common the first one that is there is read.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate import class_names as named
from pacl_scale.evaluate import places
from pacl_scale.evaluate.classes import ClassList


@dataclass(frozen=True)
class Source:
    """One way in which a data set lies below its root; every path is relative to it and may lead into an archive."""

    pictures: str
    masks: str
    picture_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    not_masks: str | None = None
    """End of the names of files beside the masks that are something else."""
    split: str | None = None
    """File with one picture's stem a line; without one, every mask counts."""
    raw_context: bool = False
    """Masks are PASCAL-Context's MATLAB files of 459 classes."""


@dataclass(frozen=True)
class Layout:
    """One official data set."""

    title: str
    sources: tuple[Source, ...]
    pictures: int
    """Pictures of the split."""
    classes: Callable[[], ClassList]
    get: str
    """Where it comes from, in one clause."""


def _below(*prefixes: str, source: Callable[[str], Source]) -> tuple[Source, ...]:
    return tuple(source(prefix) for prefix in prefixes)


def _voc(score_background: bool) -> Layout:
    sources = _below(
        *("VOCdevkit/VOC2012/", "VOC2012/", "", "VOCtrainval_11-May-2012.tar/VOCdevkit/VOC2012/"),
        source=lambda at: Source(
            f"{at}JPEGImages", f"{at}SegmentationClass", split=f"{at}ImageSets/Segmentation/val.txt"
        ),
    )
    return Layout(
        f"Pascal VOC 2012 val ({20 + score_background} classes)",
        sources,
        1449,
        lambda: ClassList(words=dict(named.VOC), void=255, background=0, score_background=score_background),
        "VOCtrainval_11-May-2012.tar of the VOC 2012 challenge, or torchvision.datasets.VOCSegmentation(download=True)",
    )


def _context(score_background: bool) -> Layout:
    prefixes = ("VOCdevkit/VOC2010/", "VOC2010/", "")
    converted = _below(
        *prefixes,
        source=lambda at: Source(
            f"{at}JPEGImages", f"{at}SegmentationClassContext", split=f"{at}ImageSets/SegmentationContext/val.txt"
        ),
    )

    def matlab(at: str, masks: str) -> Source:
        split = f"{at}ImageSets/Main/val.txt"
        return Source(f"{at}JPEGImages", masks, mask_suffix=".mat", split=split, raw_context=True)

    archive = "VOCtrainval_03-May-2010.tar/VOCdevkit/VOC2010/"
    original = [matlab(at, masks) for at in (*prefixes, archive) for masks in ("trainval", "trainval.tar.gz/trainval")]
    return Layout(
        f"PASCAL-Context val ({59 + score_background} classes)",
        (*converted, *original),
        5105,
        lambda: ClassList(words=dict(named.CONTEXT), void=255, background=0, score_background=score_background),
        "VOC 2010's VOCtrainval_03-May-2010.tar, and beside VOCdevkit the folder trainval of PASCAL-Context's "
        "trainval.tar.gz; or SegmentationClassContext with values 0 to 59, as others' converters write it",
    )


def _coco(title: str, classes: Callable[[], ClassList]) -> Layout:
    masks = "stuffthingmaps_trainval2017"
    pairs = [
        ("val2017", f"{masks}/val2017"),
        ("val2017", "val2017_masks"),
        ("images/val2017", "annotations/val2017"),
        ("val2017.zip/val2017", f"{masks}.zip/val2017"),
    ]
    return Layout(
        title,
        # Who has trained by mmsegmentation has its converted masks among the original ones.
        tuple(Source(pictures, found, not_masks="_labelTrainIds.png") for pictures, found in pairs),
        5000,
        classes,
        "COCO's val2017.zip and COCO-Stuff's stuffthingmaps_trainval2017.zip, unpacked or not, in one folder "
        "(the maps in a folder of that name)",
    )


def _ade() -> Layout:
    sources = _below(
        *("ADEChallengeData2016/", "", "ADEChallengeData2016.zip/ADEChallengeData2016/"),
        source=lambda at: Source(f"{at}images/validation", f"{at}annotations/validation"),
    )
    return Layout(
        "ADE20K val (150 classes)",
        sources,
        2000,
        # 0 is "other objects" and nobody's class: shifting every value down by one is not needed if it is void.
        lambda: ClassList(words=dict(named.ADE), void=0),
        "ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark",
    )


def _cityscapes() -> Layout:
    def source(pictures: str, masks: str) -> Source:
        return Source(f"{pictures}leftImg8bit/val", f"{masks}gtFine/val", "_leftImg8bit.png", "_gtFine_labelIds.png")

    return Layout(
        "Cityscapes val (19 classes)",
        (source("", ""), source("leftImg8bit_trainvaltest.zip/", "gtFine_trainvaltest.zip/")),
        500,
        lambda: ClassList(words=dict(named.CITYSCAPES), void=list(named.CITYSCAPES_VOID)),
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com, unpacked or not",
    )


def _stuff_classes() -> ClassList:
    return ClassList(words=dict(named.COCO_STUFF), void=255)


def _object_classes() -> ClassList:
    stuff = [value for value in named.COCO_STUFF if value not in named.COCO_OBJECT]
    return ClassList(words=dict(named.COCO_OBJECT), void=255, background=stuff, score_background=True)


LAYOUTS: Mapping[str, Layout] = {
    "voc_20": _voc(score_background=False),
    "voc_21": _voc(score_background=True),
    "context_59": _context(score_background=False),
    "context_60": _context(score_background=True),
    "coco_stuff_171": _coco("COCO-Stuff val2017 (171 classes)", _stuff_classes),
    "coco_object": _coco("COCO-Object val2017 (80 classes and background)", _object_classes),
    "ade_150": _ade(),
    "cityscapes_19": _cityscapes(),
}


def find_pairs(layout: Layout, root: str, partial: bool) -> tuple[Source, list[tuple[str, str]]]:
    """The (picture, mask) addresses of the split below ``root``, in the order of the pictures' names.

    Args:
        layout: the data set.
        root: folder, URL or archive that holds one of its sources.
        partial: take what is there of the split instead of refusing an incomplete data set.

    Raises:
        UserError: nothing there, files of the split are missing, or the split has another number of pictures; the
            sentence says what was expected where, and where the data set comes from.
    """
    source = next((s for s in layout.sources if _is_there(root, s)), None)
    if source is None:
        first = layout.sources[0]
        raise UserError(
            f"{root} does not hold {layout.title}: expected pictures in {storage.join(root, first.pictures)} and masks "
            f"in {storage.join(root, first.masks)}; get it from {layout.get}"
        )
    pictures_at, masks_at = storage.join(root, source.pictures), storage.join(root, source.masks)
    pictures = _by_stem(pictures_at, source.picture_suffix)
    masks = _by_stem(masks_at, source.mask_suffix, source.not_masks)
    stems = _split_stems(root, source) if source.split else sorted(masks)
    present = [stem for stem in stems if stem in pictures and stem in masks]
    missing = [stem for stem in stems if stem not in pictures or stem not in masks]
    if missing and not (partial and present):
        kind, at = ("picture", pictures_at) if missing[0] not in pictures else ("mask", masks_at)
        raise UserError(
            f"{layout.title} is incomplete: {len(missing)} of {len(stems)} pictures lack a file, first the {kind} "
            f"{missing[0]} in {at}; get it from {layout.get}"
        )
    if len(present) != layout.pictures and not partial:
        raise UserError(
            f"{layout.title} has {layout.pictures} pictures, but {masks_at} leads to {len(present)}; get it from "
            f"{layout.get} (or set partial=true to measure on these alone)"
        )
    return source, [(pictures[stem], masks[stem]) for stem in present]


def read_raw_context(content: bytes, address: str) -> np.ndarray:
    """A mask of PASCAL-Context's own MATLAB files, 459 classes, as (H, W) uint8 of the 59, 0 for every other.

    Raises:
        UserError: not such a file.
    """
    # Only this layout needs scipy.
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("PASCAL-Context's own files need scipy; run: pip install 'pacl-scale[context]'") from error
    try:
        labels_HW = loadmat(io.BytesIO(content))["LabelMap"].astype(np.int64)
        table = np.zeros(460, np.uint8)
        table[named.CONTEXT_OF_459] = np.arange(1, 60)
        return table[labels_HW]
    except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise UserError(f"{address} is no label map of PASCAL-Context ({error})") from error


def _is_there(root: str, source: Source) -> bool:
    folders = (storage.join(root, source.pictures), storage.join(root, source.masks))
    split = source.split is None or places.is_file(storage.join(root, source.split))
    return split and all(map(places.is_folder, folders))


def _by_stem(folder: str, suffix: str, others: str | None = None) -> dict[str, str]:
    names = [name for name in places.names(folder) if name.endswith(suffix) and not (others and name.endswith(others))]
    return {name.removesuffix(suffix): storage.join(folder, name) for name in names}


def _split_stems(root: str, source: Source) -> list[str]:
    assert source.split is not None
    lines = places.read(storage.join(root, source.split)).decode("utf-8", "replace").splitlines()
    # VOC's lists of one class hold a second column; a stem is the first word.
    return sorted({line.split()[0] for line in lines if line.strip()})
