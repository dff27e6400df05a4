"""Pictures that must not be trained on: ``python data_prep/decontaminate.py --images DIR --output voc.txt`` lists them.

A list has one hash a line, ``sha256:<hex>``, ``md5:<hex>`` (of the file's bytes) or ``phash:<hex>`` (64 bits of the
picture's low frequencies, by ``imagehash``), then perhaps a tab and a name. ``fetch.exclude`` of a download names such
lists: a picture that is in one of them, or nearly, fails with the cause ``evaluation_picture`` and is counted.

``pdqhash`` (256 bits) was weighed: twice as slow, and on recompressed and resized photographs no more certain.
"""

import functools
import hashlib
import io
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    # Run as a file: the checkout around it comes first, not this folder with its everyday names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from data_prep.causes import FetchError
from data_prep.orientation import upright
from pacl_scale import storage
from pacl_scale.config import parse
from pacl_scale.errors import UserError, run_command
from pacl_scale.log import configure, progress

DIGITS = {"sha256": 64, "md5": 32, "phash": 16}
"""Hexadecimal digits of each kind of hash."""

LINE = re.compile(r"(sha256|md5|phash):([0-9a-f]+)")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
DRAFT = (128, 128)
"""Least size that a JPEG is decoded to before it is hashed: its decoder can halve cheaply."""


@dataclass
class DecontaminateConfig:
    """List the pictures of a folder and all below it by hash, for fetch.exclude of a download."""

    images: str
    """Folder of evaluation pictures, searched with all folders below it."""
    output: str
    """The list: a path or fsspec URL of a text file."""
    kinds: list[str] = field(default_factory=lambda: ["sha256", "phash"])
    """Hashes of each picture: sha256 and md5 find the same file, phash also a resized or recompressed picture."""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in DIGITS]
        if wrong or not self.kinds:
            raise ValueError(f"kinds: choose among {', '.join(DIGITS)}")


@dataclass(frozen=True)
class Excluded:
    """Hashes of pictures that must not be trained on.

    Attributes:
        exact: hexadecimal digests by kind, each with the picture's name.
        perceptual: 64-bit hashes, (n,) uint64, in the order of ``names``.
        distance: most bits in which a hash may differ from a listed one.
    """

    exact: dict[str, dict[str, str]]
    perceptual: np.ndarray
    names: tuple[str, ...]
    distance: int

    def check(self, content: bytes) -> None:
        """Raise FetchError if ``content``, a picture whose header was found harmless, is one of them."""
        for kind, digests in self.exact.items():
            name = digests.get(hashlib.new(kind, content, usedforsecurity=False).hexdigest())
            if name is not None:
                raise FetchError("evaluation_picture", f"{kind} of {name}")
        if len(self.perceptual):
            bits = np.bitwise_count(self.perceptual ^ np.uint64(perceptual_hash(content)))
            nearest = int(bits.argmin())
            if bits[nearest] <= self.distance:
                raise FetchError("evaluation_picture", f"{bits[nearest]} bits from {self.names[nearest]}")

    def cause_of(self, content: bytes) -> str | None:
        """Why a picture cannot be used: it is one of them, or no picture; ``None`` if it can."""
        try:
            self.check(content)
        except FetchError as error:
            return error.cause
        return None


def check_distance(name: str, bits: int) -> None:
    """Raise ValueError for a setting called ``name`` that is no use as :attr:`Excluded.distance`."""
    if not 0 <= bits <= 16:
        raise ValueError(f"{name} must be between 0 and 16: beyond, any two pictures are alike")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    configure()
    return run_command(lambda: write_list(parse(DecontaminateConfig, argv, "data_prep/decontaminate.py")))


def write_list(config: DecontaminateConfig) -> None:
    """Hash every picture of a folder and write the list.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    root = Path(config.images)
    if not root.is_dir():
        raise UserError(f"{config.images}: there is no such folder of pictures")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    lines: list[str] = []
    unreadable = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        hashes = threads.map(lambda path: _hashes_of(path, config.kinds), paths)
        for path, found in progress(zip(paths, hashes, strict=True), "hash", total=len(paths), unit="picture"):
            unreadable += not found
            lines += [f"{kind}:{digest}\t{path.relative_to(root)}" for kind, digest in found.items()]
    if not lines:
        raise UserError(f"{config.images} holds no picture ({', '.join(EXTENSIONS)})")
    storage.write_bytes(config.output, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    print(f"{len(paths) - unreadable:,} pictures listed, {unreadable:,} files were none: {config.output}")


def _hashes_of(path: Path, kinds: Iterable[str]) -> dict[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror})"
        raise UserError(f"{reason}; a list without it would let the picture in") from error
    try:
        near = f"{perceptual_hash(content):016x}"
    except FetchError:
        return {}
    return {kind: near if kind == "phash" else hashlib.new(kind, content).hexdigest() for kind in kinds}


def perceptual_hash(content: bytes) -> int:
    """64 bits that a resized or recompressed copy of a picture shares but for a few.

    Raises:
        FetchError: it cannot be decoded.
    """
    import imagehash

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as picture:
                picture.draft("L", DRAFT)
                bits = imagehash.phash(upright(picture)).hash
    except Exception as error:  # of any kind: Pillow's parsers promise nothing
        raise FetchError("not_an_image", type(error).__name__) from error
    return int.from_bytes(np.packbits(bits.flatten()).tobytes(), "big")


@functools.lru_cache(maxsize=1)
def read_lists(urls: tuple[str, ...], distance: int) -> Excluded:
    """The pictures of all lists; read once a process.

    Raises:
        UserError: a list cannot be read, or a line of it is no hash.
    """
    exact: dict[str, dict[str, str]] = {}
    perceptual: dict[int, str] = {}
    for url in urls:
        for kind, digest, name in _entries(url):
            if kind == "phash":
                perceptual.setdefault(int(digest, 16), name)
            else:
                exact.setdefault(kind, {}).setdefault(digest, name)
    return Excluded(exact, np.array(list(perceptual), np.uint64), tuple(perceptual.values()), distance)


def describe_lists(urls: Sequence[str]) -> dict[str, int | str]:
    """What shapes the pictures of a data set: SHA-256 of the lists' content, whatever their order, and their hashes."""
    entries = [f"{kind}:{digest}" for url in urls for kind, digest, _ in _entries(url)]
    counts = Counter(entry.partition(":")[0] for entry in set(entries))
    return {"sha256": hashlib.sha256("\n".join(sorted(set(entries))).encode()).hexdigest(), **counts}


def _entries(url: str) -> Iterator[tuple[str, str, str]]:
    """Kind, digest and name of each line."""
    text = storage.read_bytes(url).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        digest, _, name = line.strip().partition("\t")
        if not digest or digest.startswith("#"):
            continue
        match = LINE.fullmatch(digest.lower())
        if match is None or len(match[2]) != DIGITS[match[1]]:
            kinds = ", ".join(f"{kind}:<{digits} hexadecimal digits>" for kind, digits in DIGITS.items())
            raise UserError(f"{url}, line {number}: {digest[:40]!r} is no hash; write {kinds}")
        yield match[1], match[2], name or f"line {number} of {url}"


if __name__ == "__main__":
    sys.exit(main())
