"""WebDataset tars that somebody else made: nothing is downloaded, every tar is read to its end, the sound are indexed.

What a mirror's samples hold besides a picture and a caption is its own affair. A tar that is damaged cannot be made
again here, so it is named, left where it is, and left out of the index. What was found is noted every now and then, so
that a run over a few hundred gigabytes can be killed.
"""

import hashlib
import io
import json
import posixpath
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep import layout, sources
from data_prep.decontaminate import Excluded, describe_lists, read_lists
from data_prep.fetch import FetchConfig
from data_prep.lock import only_run
from data_prep.page import write_page
from data_prep.prepare import ExpectConfig
from data_prep.report import Report, as_table
from data_prep.survey import Survey
from data_prep.verify import MEMORY_BYTES, THREADS, fetch_tar, sha256_of_stream
from pacl_scale import storage
from pacl_scale.data.index import INDEX_NAME, SampleIndex, build_index, hash_key, list_shards
from pacl_scale.data.tar import DamagedTar, TarMember, read_members, split_name
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.log import get_logger, progress

log = get_logger(__name__)

NOTES = "mirror.json"
"""What was found in each tar that was read."""

NOTE_SECONDS = 60.0
PICTURES = ("jpg", "jpeg", "png", "webp")
LARGEST_TEXT_BYTES = 1 << 20
PICTURE_HEAD_BYTES = 1 << 16
"""A header that does not lie in the first bytes of a picture is looked for in all of it."""


@dataclass
class TarNotes:
    """What a tar was found to hold.

    ``causes`` counts the samples that cannot be used, ``unusable`` names those that only a look into them tells;
    ``fault`` says why the whole tar cannot be used; ``excluded`` which lists of pictures it was held against.
    """

    bytes: int
    sha256: str = ""
    samples: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    fault: str | None = None
    unusable: list[str] = field(default_factory=list)
    excluded: str = ""
    sides: list[int] = field(default_factory=list)
    aspects: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Unwanted:
    """Pictures that are left out of a mirror's index, and a fingerprint of their lists; none by default.

    Larger ones than ``most_pixels`` cannot be held against them and are left out as well.
    """

    pictures: Excluded | None = None
    most_pixels: int = 0
    fingerprint: str = ""


def adopt(root_url: str, expect: ExpectConfig, fetch: FetchConfig, everything: bool) -> Report:
    """Verify and index the tars of a mirror, write the report and print it.

    Args:
        fetch: of which only ``exclude``, ``exclude_distance`` and ``largest_megapixels`` matter here.
        everything: read tars again that were read before.

    Raises:
        UserError: there are no tars, or another number of samples than expected.
        RunFailed: damaged tars were found (the others are indexed).
    """
    started = time.monotonic()
    with only_run(root_url):
        if layout.exists(storage.join(root_url, layout.PLAN)):
            raise UserError(f"{root_url} was downloaded by this command, it is no mirror; leave out source=mirror")
        names = list_shards(root_url)
        if not names:
            raise UserError(f"{root_url} holds no tars")
        notes = _read_tars(root_url, names, everything, _unwanted(fetch))
        sound = [name for name in names if notes[name].fault is None]
        if not any(notes[name].samples for name in sound):
            raise UserError(f"{root_url} holds no usable sample ({_first_fault(notes)})")
        # Its tars are read whatever they hold, so an empty one is no fault here; for the index it is.
        with_samples = [name for name in sound if notes[name].samples]
        samples = _index(root_url, with_samples, notes)
        report = _report(root_url, notes, samples, time.monotonic() - started)
        _write(root_url, report)
    print(as_table(report, root_url))
    if report.left_aside:
        raise RunFailed(
            f"{len(report.left_aside)} tars are damaged and not in the index: {', '.join(report.left_aside)}"
        )
    expect.check_rows(root_url, report.list_rows)
    return report


def _unwanted(fetch: FetchConfig) -> Unwanted:
    if not fetch.exclude:
        return Unwanted()
    what = json.dumps([describe_lists(fetch.exclude), fetch.exclude_distance, fetch.largest_megapixels])
    return Unwanted(
        read_lists(tuple(fetch.exclude), fetch.exclude_distance),
        round(fetch.largest_megapixels * 1e6),
        hashlib.sha256(what.encode()).hexdigest(),
    )


NOTHING_UNWANTED = Unwanted()


def check_foreign_tar(tar: BinaryIO, name: str, unwanted: Unwanted = NOTHING_UNWANTED) -> TarNotes:
    """Read a tar (seekable) to its end and look at every sample.

    Raises:
        DamagedTar: it is cut short, or its members are not what their headers say.
    """
    sha256, size = sha256_of_stream(tar)
    samples: dict[str, dict[str, TarMember]] = {}
    for member in read_members(tar, name):
        key, extension = split_name(member.name)
        samples.setdefault(key, {})[extension.lower()] = member
    causes: Counter[str] = Counter()
    unusable: list[str] = []
    sizes: list[tuple[int, int, int]] = []
    for key, parts in samples.items():
        found = _look_at(tar, parts, unwanted)
        if isinstance(found, str):
            causes[found] += 1
            unusable.append(key)
        else:
            sizes.append(found)
    survey = Survey()
    if sizes:
        widths, heights, lengths = np.array(sizes, np.int64).T
        survey.add_samples(widths, heights, lengths)
    histograms = [values.tolist() for values in (survey.sides, survey.aspects, survey.captions)]
    return TarNotes(
        size, sha256, len(sizes), dict(causes.most_common()), None, unusable, unwanted.fingerprint, *histograms
    )


def _look_at(tar: BinaryIO, parts: Mapping[str, TarMember], unwanted: Unwanted) -> tuple[int, int, int] | str:
    """Width, height and characters of caption of a sample, or why it cannot be used."""
    picture = next((parts[extension] for extension in PICTURES if extension in parts), None)
    if picture is None:
        return "no picture"
    size = _size_of(tar, picture)
    if size is None:
        return "not_an_image"
    caption = _caption(tar, parts)
    if not caption:
        return "no caption"
    if unwanted.pictures is not None:
        if size[0] * size[1] > unwanted.most_pixels:
            return "too_many_pixels"
        tar.seek(picture.data)
        cause = unwanted.pictures.cause_of(tar.read(picture.size))
        if cause is not None:
            return cause
    return *size, len(caption)


def _size_of(tar: BinaryIO, member: TarMember) -> tuple[int, int] | None:
    for most in dict.fromkeys((min(member.size, PICTURE_HEAD_BYTES), member.size)):
        tar.seek(member.data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
                with Image.open(io.BytesIO(tar.read(most)), formats=("JPEG", "PNG", "WEBP")) as picture:
                    return picture.size
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return None


def _caption(tar: BinaryIO, parts: Mapping[str, TarMember]) -> str:
    """Of the txt member, or the json member's ``caption``; empty if there is none."""
    for extension in ("txt", "json"):
        member = parts.get(extension)
        if member is None or member.size > LARGEST_TEXT_BYTES:
            continue
        tar.seek(member.data)
        text = tar.read(member.size).decode("utf-8", "replace")
        if extension == "json":
            try:
                meta = json.loads(text)
            except ValueError:
                continue
            text = meta.get("caption", "") if isinstance(meta, dict) else ""
        if isinstance(text, str) and text.strip():
            return text.strip()
    return ""


def _read_tars(root_url: str, names: list[str], everything: bool, unwanted: Unwanted) -> dict[str, TarNotes]:
    """Notes on every tar; those with notes and the same size as then, held against the same lists, stay."""
    url = storage.join(root_url, NOTES)
    sizes = layout.file_sizes(root_url, ".tar")
    before = _notes_before(url)
    notes = {
        name: note
        for name, note in before.items()
        if not everything and sizes.get(name) == note.bytes and unwanted.fingerprint == note.excluded
    }
    missing = [name for name in names if name not in notes]

    def note_down() -> None:
        if any(before.get(name) != note for name, note in notes.items()):
            # It fits other notes, and how many samples a tar has does not tell which.
            layout.remove(storage.join(root_url, INDEX_NAME))
        layout.write_json(url, {name: asdict(notes[name]) for name in names if name in notes})

    saved = time.monotonic()
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _read_tar(root_url, name, unwanted), missing)
        for name, note in progress(zip(missing, found, strict=True), "verify", total=len(missing), unit="tar"):
            notes[name] = note
            if time.monotonic() - saved > NOTE_SECONDS:
                note_down()
                saved = time.monotonic()
    if before != notes:
        note_down()
    return {name: notes[name] for name in names}


def _notes_before(url: str) -> dict[str, TarNotes]:
    """What an earlier run has noted. Raises UserError if that cannot be read."""
    try:
        return {name: TarNotes(**note) for name, note in (layout.read_json(url) or {}).items()}
    except TypeError as error:
        raise UserError(f"{url} is damaged ({error}); remove it, and every tar is read again") from error


def _read_tar(root_url: str, name: str, unwanted: Unwanted) -> TarNotes:
    url = storage.join(root_url, name)
    with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as local:
        fetch_tar(url, local)  # type: ignore[arg-type]
        size = local.tell()
        try:
            note = check_foreign_tar(local, name, unwanted)  # type: ignore[arg-type]
        except DamagedTar as error:
            log.warning("damaged tar", tar=name, reason=str(error))
            return TarNotes(bytes=size, fault=str(error), excluded=unwanted.fingerprint)
    counts = layout.read_json(f"{url.removesuffix('.tar')}{layout.STATS_SUFFIX}") or {}
    claimed = counts.get("successes")
    if claimed is not None and claimed != note.samples + sum(note.causes.values()):
        note.fault = f"it holds {note.samples} samples where its counts say {claimed}"
    return note


def _index(root_url: str, names: list[str], notes: Mapping[str, TarNotes]) -> int:
    if layout.exists(storage.join(root_url, INDEX_NAME)):
        index = storage.patiently(SampleIndex.load, root_url)
        expected = [(name, notes[name].bytes, notes[name].samples) for name in names]
        if [(shard.name, shard.size, shard.samples) for shard in index.shards] == expected:
            return len(index)
    index = storage.patiently(build_index, root_url, names)
    usable = np.ones(len(index), np.bool_)
    for number, name in enumerate(names):
        if notes[name].unusable:
            keys = np.array([hash_key(key) for key in notes[name].unusable], np.uint64)
            usable &= (index.shard != number) | ~np.isin(index.key, keys)
    if not usable.all():
        # The index knows members by their names only; here it is known what is in them.
        index = replace(
            index,
            shards=[replace(shard, samples=notes[shard.name].samples) for shard in index.shards],
            offset=index.offset[usable],
            length=index.length[usable],
            key=index.key[usable],
        )
        storage.patiently(index.save)
    return len(index)


def _report(root_url: str, notes: Mapping[str, TarNotes], samples: int, seconds: float) -> Report:
    sound = {name: note for name, note in notes.items() if note.fault is None}
    survey, causes = Survey(), Counter[str]()
    for note in sound.values():
        causes.update(note.causes)
        if note.samples:
            survey.sides += np.array(note.sides)
            survey.aspects += np.array(note.aspects)
            survey.captions += np.array(note.captions)
    survey.causes = causes
    got = sum(note.samples for note in sound.values())
    return Report(
        source=sources.MIRROR,
        list_url=root_url,
        list_sha256="",
        metadata_sha256=None,
        published_rows=None,
        list_rows=got + causes.total(),
        left_out={},
        expected=got + causes.total(),
        got=got,
        failures=dict(causes.most_common()),
        pending=0,
        retried=0,
        shards=len(sound),
        bytes=sum(note.bytes for note in sound.values()),
        samples=samples,
        verified={name: note.sha256 for name, note in sound.items()},
        left_aside={name: note.fault for name, note in notes.items() if note.fault is not None},
        survey=survey.as_dict(),
        seconds={"verify": round(seconds, 1)},
    )


def _write(root_url: str, report: Report) -> None:
    url, page = storage.join(root_url, layout.REPORT), storage.join(root_url, layout.PAGE)
    before = layout.read_json(url) or {}
    if {**before, "seconds": None} != {**asdict(report), "seconds": None} or not layout.exists(page):
        write_page(page, report)
        layout.write_json(url, asdict(report))


def _first_fault(notes: Mapping[str, TarNotes]) -> str:
    for name, note in notes.items():
        if note.fault or note.causes:
            return f"{posixpath.basename(name)}: {note.fault or ', '.join(note.causes)}"
    return "each tar is empty"
