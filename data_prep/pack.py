"""A folder of captioned pictures -> verified, indexed WebDataset tars: ``python data_prep/pack.py --images DIR ...``.

The captions are a CSV file with one row a caption; a picture may have several. Pictures are copied byte for byte.
"""

import csv
import hashlib
import io
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: the checkout around it comes first, not this folder with its everyday names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image, UnidentifiedImageError

from data_prep import layout, sources
from data_prep.decontaminate import Excluded, check_distance, describe_lists, read_lists
from data_prep.lock import only_run
from data_prep.nouns import extract_nouns, merge_nouns
from data_prep.prepare import normalise_caption
from data_prep.verify import PICTURE_FORMATS, BadShard, TarFacts, check_tar
from pacl_scale import storage
from pacl_scale.config import parse
from pacl_scale.data.index import INDEX_NAME, SampleIndex, build_index
from pacl_scale.errors import UserError, run_command
from pacl_scale.log import configure, get_logger, progress

log = get_logger(__name__)

MANIFEST = "pack.json"
KEY_DIGITS = 9

EXTENSIONS = {kind: extension for extension, kind in PICTURE_FORMATS.items()}
"""Extension of the member that holds a picture, by Pillow's name of its format."""


@dataclass
class PackConfig:
    """Pack a local folder of captioned pictures into WebDataset tars, verify and index them."""

    images: str
    """Folder of the pictures (JPEG, PNG or WebP)."""
    captions: str
    """CSV file with a header line: one row a caption, several rows a picture are several captions of it."""
    output: str
    """Where the data set goes: a folder, as a path or fsspec URL (s3://bucket/name)."""
    image_column: str = "image"
    """Column with the picture's path, relative to images."""
    caption_column: str = "caption"
    """Column with the caption."""
    samples_per_shard: int = 1000
    """Pictures a shard."""
    nouns: bool = True
    """Name the things of a picture's captions (spaCy) in its json member, for the noun prompts of training."""
    exclude: list[str] = field(default_factory=list)
    """Lists of hashes of pictures that must not be in the data set, made by data_prep/decontaminate.py."""
    exclude_distance: int = 4
    """Bits of 64 in which a perceptual hash may differ from a listed one."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError("samples_per_shard must be at least 1")
        check_distance("exclude_distance", self.exclude_distance)


@dataclass(frozen=True)
class Pack:
    """The account of a packed folder: ``pictures`` named by the CSV file = ``samples`` + ``left_out``."""

    fingerprint: str
    captions_sha256: str
    pictures: int
    samples: int
    captions: int
    left_out: dict[str, int]
    shards: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each tar, by name; empty while they are being written."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    configure()
    return run_command(lambda: pack(parse(PackConfig, argv, "data_prep/pack.py")))


def pack(config: PackConfig) -> None:
    """Write the tars, read them back, index them and print the account; nothing is done twice.

    Raises:
        UserError: a missing folder or file, a CSV file without the columns, no usable picture; a place that
            cannot be written; or one that holds the data set of another folder.
    """
    images = Path(config.images)
    if not images.is_dir():
        raise UserError(f"{config.images}: there is no such folder of pictures")
    captions_sha256 = sources.sha256_of(config.captions)
    captions = read_captions(config)
    with only_run(config.output):
        _pack(config, images, captions, captions_sha256)


def _pack(config: PackConfig, images: Path, captions: Mapping[str, Sequence[str]], captions_sha256: str) -> None:
    manifest_url = storage.join(config.output, MANIFEST)
    fingerprint = _fingerprint(captions_sha256, config)
    before = layout.read_json(manifest_url)
    tars = layout.file_sizes(config.output, ".tar")
    if before is None and tars:
        raise UserError(f"{config.output} holds tars that this command did not make; choose another output")
    if before is not None and before.get("fingerprint") != fingerprint:
        raise UserError(f"{config.output} holds the data set of other captions or settings; choose another output")
    if before is not None and storage.exists(storage.join(config.output, INDEX_NAME)):
        index = SampleIndex.load(config.output)
        if {shard.name: shard.size for shard in index.shards} == tars:
            print(as_table(Pack(**before), config.output))
            return
    left_out: Counter[str] = Counter()
    excluded = read_lists(tuple(config.exclude), config.exclude_distance) if config.exclude else None
    usable = list(_usable(images, captions, left_out, excluded))
    if not usable:
        raise UserError(_why_nothing(config, left_out))
    nouns = _nouns([captions[name] for name in usable]) if config.nouns else [[] for _ in usable]
    made = Pack(
        fingerprint=fingerprint,
        captions_sha256=captions_sha256,
        pictures=len(captions),
        samples=len(usable),
        captions=sum(len(captions[name]) for name in usable),
        left_out=dict(left_out.most_common()),
    )
    # The account comes first, so that a run that is killed below is known by it; the index last, as what says
    # that all is there.
    layout.write_json(manifest_url, asdict(made))
    facts = _write_shards(config, images, usable, captions, nouns)
    made = replace(made, shards={fact.name: fact.sha256 for fact in facts})
    layout.write_json(manifest_url, asdict(made))
    build_index(config.output, [fact.name for fact in facts])
    print(as_table(made, config.output))


def read_captions(config: PackConfig) -> dict[str, list[str]]:
    """Captions by picture, both in the order of the file; empty captions are no captions.

    Raises:
        UserError: no such file, no such columns, or no rows.
    """
    text = storage.read_bytes(config.captions).decode("utf-8", "replace")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    missing = {config.image_column, config.caption_column} - set(rows.fieldnames or ())
    if missing:
        raise UserError(f"{config.captions} has no column {' or '.join(sorted(missing))} in its first line")
    captions: dict[str, list[str]] = {}
    try:
        for row in rows:
            name, caption = row[config.image_column] or "", normalise_caption(row[config.caption_column] or "")
            listed = captions.setdefault(name, [])
            if caption:
                listed.append(caption)
    except csv.Error as error:
        raise UserError(f"{config.captions} cannot be read as CSV: {error}") from error
    if not captions:
        raise UserError(f"{config.captions} is empty: it names no picture")
    return captions


def as_table(made: Pack, output: str) -> str:
    """The account for a terminal."""
    lines = [("pictures named", made.pictures)]
    lines += [(f"  left out: {cause}", count) for cause, count in made.left_out.items()]
    lines += [("samples", made.samples), ("captions", made.captions)]
    width = max(len(what) for what, _ in lines)
    table = [f"{what:<{width}}  {count:>9,}" for what, count in lines]
    return "\n".join([*table, f"{len(made.shards)} shards, indexed: {output}"])


def _usable(
    images: Path, captions: Mapping[str, Sequence[str]], left_out: Counter[str], excluded: Excluded | None
) -> Iterator[str]:
    """Names of the pictures that can be packed; the others are counted in ``left_out``."""
    root = images.resolve()
    for name in progress(captions, "look at pictures", unit="picture"):
        path = (root / name).resolve()
        if not captions[name]:
            left_out["no caption"] += 1
        elif not path.is_relative_to(root):
            # A list from elsewhere must not pull in files from around the folder.
            left_out["path leads out of the folder"] += 1
        elif not path.is_file():
            left_out["no such file"] += 1
        elif _size_and_extension(path) is None:
            left_out["not a JPEG, PNG or WebP picture"] += 1
        elif excluded is not None and (cause := excluded.cause_of(path.read_bytes())):
            left_out[cause] += 1
        else:
            yield name


def _size_and_extension(path: Path) -> tuple[tuple[int, int], str] | None:
    try:
        with Image.open(path, formats=list(EXTENSIONS)) as picture:
            return picture.size, EXTENSIONS[str(picture.format)]
    except (UnidentifiedImageError, OSError, ValueError, KeyError, Image.DecompressionBombError):
        return None


def _nouns(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Things that each picture's captions name; the captions of all pictures are tagged in one stream."""
    total = sum(len(own) for own in captions)
    every = extract_nouns(caption for own in captions for caption in own)
    tagged = progress(every, "find nouns", total=total, unit="caption")
    return [merge_nouns(islice(tagged, len(own))) for own in captions]


def _write_shards(
    config: PackConfig,
    images: Path,
    names: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    nouns: Sequence[Sequence[str]],
) -> list[TarFacts]:
    facts = []
    starts = range(0, len(names), config.samples_per_shard)
    for shard, start in enumerate(progress(starts, "pack", unit="shard")):
        numbers = range(start, min(start + config.samples_per_shard, len(names)))
        samples = (_sample(images, number, names[number], captions, nouns[number]) for number in numbers)
        facts.append(_write_shard(config.output, shard, samples))
    return facts


def _sample(
    images: Path, number: int, name: str, captions: Mapping[str, Sequence[str]], nouns: Sequence[str]
) -> dict[str, Any]:
    path = images / name
    found = _size_and_extension(path)
    if found is None:
        raise UserError(f"{path} was a picture a moment ago and is none now")
    (width, height), extension = found
    meta = {"image": name, "captions": captions[name], "nouns": nouns, "width": width, "height": height}
    return {
        "__key__": f"{number:0{KEY_DIGITS}d}",
        extension: path.read_bytes(),
        "txt": captions[name][0].encode(),
        "json": json.dumps(meta, ensure_ascii=False).encode(),
    }


def _write_shard(output: str, shard: int, samples: Iterator[dict[str, Any]]) -> TarFacts:
    """Write one tar here, check it, and bring it to its place."""
    import webdataset as wds

    name = f"{layout.shard_name(shard)}.tar"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        # The same pictures make the same bytes: no time of day in the tar.
        with open(path, "wb") as file, wds.TarWriter(file, mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
        with open(path, "rb") as packed:
            try:
                facts = check_tar(packed, name)
            except BadShard as error:
                raise UserError(f"a packed shard does not hold what was put into it: {error}") from error
        layout.upload(path, storage.join(output, name))
    return facts


def _fingerprint(captions_sha256: str, config: PackConfig) -> str:
    own = ("output", "images", "captions", "exclude", "exclude_distance")
    shaping = {key: value for key, value in asdict(config).items() if key not in own}
    if config.exclude:
        shaping |= {"exclude": describe_lists(config.exclude), "exclude_distance": config.exclude_distance}
    return hashlib.sha256(json.dumps([1, captions_sha256, shaping]).encode()).hexdigest()


def _why_nothing(config: PackConfig, left_out: Counter[str]) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in left_out.most_common())
    return f"{config.images}: none of the pictures that {config.captions} names is usable ({causes})"


if __name__ == "__main__":
    sys.exit(main())
