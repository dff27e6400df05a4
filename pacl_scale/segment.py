"""Pictures and some words in, masks out: ``python -m pacl_scale.segment photo.jpg dog sofa``.

Every pixel goes to the word whose text vector is nearest to the embedded patches around it.
"""

import io
import json
import posixpath
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from pacl_scale import config, log, storage
from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import overlay, places
from pacl_scale.evaluate.masks import UNLABELLED, index_png, run_lengths
from pacl_scale.evaluate.methods import PACL, Method, Towers, choose_device, load_methods
from pacl_scale.evaluate.pictures import PICTURE_SUFFIXES, read_picture
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.look import find, see

PROG = "python -m pacl_scale.segment"
MAX_SIDE = 1600
"""Larger pictures are drawn at most this wide or high, in pixels; the tower sees less than that anyway."""

logger = log.get_logger("pacl_scale.segment")


@dataclass
class SegmentConfig:
    """Colour each part of a picture by the word that fits it best."""

    checkpoint: str = "runs/demo"
    """Run directory or checkpoint."""

    output: str | None = None
    """PNG to write; not given, `<picture>.segmented.png` in the current directory. Of a folder of pictures: the folder
    for all results; not given, the current directory."""

    words_file: str | None = None
    """File of words, one a line, that are looked for after those on the command line."""

    masks: bool = False
    """Also write, beside the overlay, `.mask.png` (values are positions in the list of words, 255 is none of them) and
    `.json` (words, shares, and each word's mask as COCO's uncompressed RLE)."""

    background: list[str] = field(default_factory=list)
    """Words for everything else, e.g. `[sky, grass]`: they compete for pixels but get no colour."""

    threshold: float | None = None
    """Pixels whose best word scores a lower cosine get no colour, -1 to 1; not given, every pixel gets a word."""

    size: int = 0
    """Pixels of the picture's short side in the vision tower; more finds smaller things and takes longer.
    0 takes the tower's own."""

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
        if self.size < 0:
            raise ValueError("size cannot be negative")


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``segment``. Returns 0; raises :class:`pacl_scale.errors.UserError` for a user's mistake."""
    positionals: list[tuple[str, dict[str, Any]]] = [
        ("picture", {"help": "Path or URL of a picture, or of a folder of pictures."}),
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
    """Segment one picture, or every picture of a folder in the order of names; see :func:`segment_file`.

    Raises:
        UserError: as :func:`segment_file`; or a folder without a picture, or with two pictures of one stem.
    """
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
        yield _segment_one(settings, storage.join(address, name), words, asked, output, loaded)


def segment_file(settings: SegmentConfig, address: str, words: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Segment the picture at ``address`` and write the overlay.

    Returns:
        Where the overlay is, and the share of the picture that each word covers, largest first. With a threshold
        or background words a last entry, "(none of these)", holds the rest.

    Raises:
        UserError: no such file, not a picture, no checkpoint, an empty or repeated word.
    """
    asked = _asked(settings, words)
    read_picture(address)
    stem = posixpath.splitext(posixpath.basename(address))[0]
    output = settings.output or f"{stem}.segmented.png"
    return _segment_one(settings, address, words, asked, output, _load(settings))


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
    return towers, method


def _segment_one(
    settings: SegmentConfig,
    address: str,
    words: Sequence[str],
    asked: Sequence[str],
    output: str,
    loaded: tuple[Towers, Method],
) -> tuple[str, dict[str, float]]:
    towers, method = loaded
    words = asked[: len(words)]
    picture = upright(read_picture(address))
    if len(asked) == 1 and settings.threshold is None:
        logger.warning("one word alone gets every pixel; add words, --background or --threshold", word=asked[0])

    protocol = Protocol(size=settings.size, templates=settings.templates)
    labels_HW = segment(picture, asked, towers, method, protocol, settings.threshold)
    labels_HW[labels_HW >= len(words)] = overlay.NOTHING
    shares = {word: float((labels_HW == number).mean()) for number, word in enumerate(words)}
    drawn = draw(picture, labels_HW, words, shares, settings.opacity)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    storage.write_bytes(output, buffer.getvalue())
    if settings.masks:
        stem = output.removesuffix(".png")
        storage.write_bytes(f"{stem}.mask.png", index_png(labels_HW, overlay.colours(len(words))))
        found = [
            {"word": word, "share": shares[word], "rle": run_lengths(labels_HW == number)}
            for number, word in enumerate(words)
        ]
        content = {"picture": address, "height": picture.height, "width": picture.width, "words": found}
        storage.write_bytes(f"{stem}.json", (json.dumps(content) + "\n").encode())

    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    rest = float((labels_HW == overlay.NOTHING).mean())
    has_rest = settings.threshold is not None or settings.background
    return output, ordered | ({"(none of these)": rest} if has_rest else {})


def segment(
    picture: Image.Image,
    words: Sequence[str],
    towers: Towers,
    method: Method,
    protocol: Protocol,
    threshold: float | None = None,
) -> np.ndarray:
    """Position in ``words`` of each pixel (H, W) int64; ``overlay.NOTHING`` below the threshold."""
    return find(see(picture, towers, method, protocol), words, towers, protocol, threshold).labels_HW


def draw(
    picture: Image.Image, labels_HW: np.ndarray, words: Sequence[str], shares: dict[str, float], opacity: float
) -> Image.Image:
    """The overlay: colours over the picture, each word on its region, and a legend with shares below."""
    palette = overlay.colours(len(words))
    colored = overlay.draw_labels(overlay.blend(picture, labels_HW, palette, opacity), labels_HW, words)
    entries = [(palette[number], f"{word} {100 * shares[word]:.1f} %") for number, word in enumerate(words)]
    return overlay.with_legend(colored, entries)


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its camera meant it to be seen, and no larger than :data:`MAX_SIDE`."""
    turned = ImageOps.exif_transpose(picture)
    turned.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return turned


if __name__ == "__main__":
    sys.exit(run_command(main))
