"""The command: pictures, folders and videos in; overlays, masks, heat maps and shares out."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pacl_scale import config, log, storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay, places
from pacl_scale.evaluate.masks import UNLABELLED
from pacl_scale.evaluate.methods import PACL, Method, Towers, choose_device, load_methods
from pacl_scale.evaluate.pictures import PICTURE_SUFFIXES, read_picture
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.look import check_protocol, find, see
from pacl_scale.segment.frames import frames_of, is_video
from pacl_scale.segment.results import kind_of, upright, write_heat, write_masks, write_overlay

PROG = "python -m pacl_scale.segment"
logger = log.get_logger("pacl_scale.segment")


@dataclass
class SegmentConfig:
    """Colour each part of a picture by the word that fits it best."""

    checkpoint: str = "runs/demo"
    """Run directory or checkpoint."""

    output: str | None = None
    """PNG or JPEG to write, by its suffix; not given, `<picture>.segmented.png` in the current directory. Of a folder
    or a video: the folder for all results; not given, the current directory."""

    words_file: str | None = None
    """File of words, one a line, that are looked for after those on the command line."""

    masks: bool = False
    """Also write, beside the overlay, `.mask.png` (values are positions in the list of words, 255 is none of them) and
    `.json` (words, shares, and each word's mask as COCO's uncompressed RLE), of the picture's own size, turned as its
    EXIF data say."""

    heat: bool = False
    """Also write a `.heat-N.png` for the Nth word (values 0 to 255 of a palette): how well it fits each part, on one
    scale for all words, which the `.json` states."""

    frames_per_second: float = 1.0
    """Of a video, so many frames of each second are segmented, each into files of its own."""

    background: list[str] = field(default_factory=list)
    """Words for everything else, e.g. `[sky, grass]`: they compete for pixels but get no colour."""

    threshold: float | None = None
    """Pixels whose best word scores a lower cosine get no colour, -1 to 1; not given, every pixel gets a word."""

    size: int = 0
    """Pixels of the picture's short side in the vision tower; more finds smaller things and takes longer.
    0 takes the tower's own."""

    stride: int = 0
    """Pixels between neighbouring patches; 0 is the patch size. Less is finer and slower."""

    window: int = 0
    """Side in pixels of square windows that slide over the resized picture; 0 shows it whole. For large `size`."""

    scales: tuple[float, ...] = (1.0,)
    """The picture is shown at `size` times each of these, and the scores are averaged."""

    flip: bool = False
    """Also show the picture mirrored, and average."""

    templates: Literal["paper", "single", "none"] = "paper"
    """Prompts around each word: the paper's seven, "a photo of a {}.", or the bare word."""

    opacity: float = 0.55
    """How much the colours cover the picture, 0 to 1."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of the towers."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is a GPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1:
            raise ValueError("opacity lies between 0 and 1")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError("threshold is a cosine and lies between -1 and 1")
        if self.frames_per_second <= 0:
            raise ValueError("frames_per_second must be positive")
        # A protocol refuses what it cannot be: ask for it now.
        _ = self.protocol

    @property
    def protocol(self) -> Protocol:
        """How pictures are shown to the model."""
        return Protocol(
            size=self.size,
            stride=self.stride,
            window=self.window,
            scales=self.scales,
            flip=self.flip,
            templates=self.templates,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``segment``. Returns 0; raises :class:`pacl_scale.errors.UserError` for a user's mistake."""
    positionals: list[tuple[str, dict[str, Any]]] = [
        ("picture", {"help": "Path or URL of a picture or a folder of pictures, or a video."}),
        ("words", {"nargs": "*", "metavar": "word", "help": "What to look for; quote phrases: 'red car'."}),
    ]
    settings, given = config.parse(SegmentConfig, argv, PROG, positionals)
    log.configure()
    words = [*given["words"], *_words_of(settings.words_file)]
    if not words:
        raise UserError(f"name at least one word to look for, or a words_file ({PROG} --help)")
    for output, shares in segment_files(settings, given["picture"], words):
        for word, share in shares.items():
            print(f"{100 * share:5.1f} %  {word}")
        print(output)
    return 0


def segment_files(
    settings: SegmentConfig, address: str, words: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Segment one picture, every picture of a folder in the order of names, or a video's frames.

    See :func:`segment_file`.

    Raises:
        UserError: as :func:`segment_file`; or a folder without a picture, or with two pictures of one stem.
    """
    if is_video(address):
        yield from _segment_video(settings, address, words)
        return
    if not places.is_folder(address):
        yield segment_file(settings, address, words)
        return
    names = [name for name in places.names(address) if "/" not in name and name.lower().endswith(PICTURE_SUFFIXES)]
    stems = [posixpath.splitext(name)[0] for name in names]
    if not names:
        raise UserError(f"{address} has no picture")
    if len(set(stems)) < len(stems):
        raise UserError(f"{address} has two pictures of one name, whose results would have one name too")
    asked = _asked(settings, words)
    loaded = _load(settings)
    for name, stem in zip(names, stems, strict=True):
        output = storage.join(settings.output or ".", f"{stem}.segmented.png")
        at = storage.join(address, name)
        yield _segment_one(settings, at, read_picture(at), words, asked, output, loaded)


def _segment_video(
    settings: SegmentConfig, address: str, words: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Every so many frames; a file's name holds the milliseconds at which its frame stands."""
    asked = _asked(settings, words)
    loaded, stem = None, posixpath.splitext(posixpath.basename(address))[0]
    for milliseconds, picture in frames_of(address, settings.frames_per_second):
        # A file that is no video is named before the model is loaded.
        loaded = loaded or _load(settings)
        output = storage.join(settings.output or ".", f"{stem}-{milliseconds:08d}.segmented.png")
        yield _segment_one(settings, address, picture, words, asked, output, loaded)


def segment_file(settings: SegmentConfig, address: str, words: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Segment the picture at ``address`` and write the overlay.

    Returns:
        Where the overlay is, and the share of the picture that each word covers, largest first. With a threshold
        or background words a last entry, "(none of these)", holds the rest.

    Raises:
        UserError: no such file, not a picture, no checkpoint, an empty or repeated word.
    """
    asked = _asked(settings, words)
    if settings.output:
        kind_of(settings.output)
    picture = read_picture(address)
    stem = posixpath.splitext(posixpath.basename(address))[0]
    output = settings.output or f"{stem}.segmented.png"
    return _segment_one(settings, address, picture, words, asked, output, _load(settings))


def _asked(settings: SegmentConfig, words: Sequence[str]) -> list[str]:
    asked = [word.strip() for word in [*words, *settings.background]]
    if not all(asked) or len(set(asked)) < len(asked):
        raise UserError("words must not be empty, and each may be named once")
    if settings.masks and len(asked) > UNLABELLED:
        raise UserError(f"a mask PNG holds at most {UNLABELLED} words")
    return asked


def _words_of(address: str | None) -> list[str]:
    if address is None:
        return []
    try:
        lines = storage.read_bytes(address).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{address} is no text in UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def _load(settings: SegmentConfig) -> tuple[Towers, Method]:
    device = choose_device(settings.device)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    towers, (method,) = load_methods({PACL: settings.checkpoint}, None, device, dtype)
    check_protocol(towers, settings.protocol)
    return towers, method


def _segment_one(
    settings: SegmentConfig,
    address: str,
    picture: Image.Image,
    words: Sequence[str],
    asked: Sequence[str],
    output: str,
    loaded: tuple[Towers, Method],
) -> tuple[str, dict[str, float]]:
    towers, method = loaded
    words = asked[: len(words)]
    picture = upright(picture)
    if len(asked) == 1 and settings.threshold is None:
        logger.warning("one word alone gets every pixel; add words, --background or --threshold", word=asked[0])

    protocol = settings.protocol
    found = find(see(picture, towers, method, protocol), asked, towers, protocol, settings.threshold)
    labels_HW = np.where(found.labels_HW < len(words), found.labels_HW, overlay.NOTHING)
    shares = write_overlay(output, picture, labels_HW, words, settings.opacity)
    stem, _ = kind_of(output)
    heat = write_heat(stem, found, words) if settings.heat else {}
    if settings.masks or settings.heat:
        write_masks(stem, address, labels_HW, shares, {"heat": heat} if heat else {})

    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    rest = float((labels_HW == overlay.NOTHING).mean())
    has_rest = settings.threshold is not None or settings.background
    return output, ordered | ({"(none of these)": rest} if has_rest else {})
