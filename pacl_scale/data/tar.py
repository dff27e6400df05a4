"""Tars, member by member and sample by sample; nothing damaged passes for whole.

A sample is a run of consecutive members with the same WebDataset key: their path up to the first dot of the base name.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pacl_scale.errors import UserError

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
REGULAR_FILE, WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
PAX_HEADER, GNU_LONG_NAME = b"x", b"L"
"""Type flags of tar headers (POSIX.1-2001, and GNU's for long names)."""
READ_BYTES = 4 << 20
LONGEST_HEADER_RECORD = 1 << 20
"""A pax or long-name record above this is taken for damage, not for a name."""


class DamagedTar(UserError):
    """A tar that cannot be read to its end: which one, at which byte, and why."""


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar: ``length`` bytes from ``offset`` hold its members with all their headers."""

    key: str
    offset: int
    length: int
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class TarMember:
    """A regular file of a tar; ``offset`` is its first header block, ``end`` the byte after its padding."""

    name: str
    offset: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + padded(self.size)


def read_members(stream: BinaryIO, name: str) -> Iterator[TarMember]:
    """Walk the regular files of a tar, reading to its end.

    The standard library's reader takes a damaged header for the end of the archive. This one does not, so a
    tar that was cut short is never taken for a complete one.

    Args:
        stream: the tar.
        name: what to call it in an error.

    Raises:
        DamagedTar: not a tar, a header whose checksum does not match, or no two zero blocks at the end and nothing
            but zeros after them.
    """
    start, offset = 0, 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedTar(f"{name} is damaged at byte {offset:,}: it ends without an end-of-archive mark")
        if block == ZERO_BLOCK:
            return _check_end(stream, name, offset)
        try:
            check_header(block)
            short_name, size, kind = parse_header(block)
        except ValueError as error:
            raise DamagedTar(f"{name} is damaged at byte {offset:,}: {error}") from error
        offset += BLOCK
        if kind in (PAX_HEADER, GNU_LONG_NAME):
            record = _read_record(stream, size, name, offset)
            offset += padded(size)
            if kind == GNU_LONG_NAME:
                long_name = _text(record)
            else:
                pax = _pax_values(record, name, offset)
                long_name = pax.get("path", long_name)
                long_size = int(pax["size"]) if pax.get("size", "").isdigit() else long_size
            continue
        # Links, folders and devices have no data, whatever size their header claims.
        size = 0 if kind in WITHOUT_DATA else size if long_size is None else long_size
        data = offset
        _skip(stream, padded(size), name, offset)
        offset += padded(size)
        if kind in REGULAR_FILE and not short_name.endswith("/"):
            yield TarMember(long_name or short_name, start, data, size)
        start, long_name, long_size = offset, None, None


def scan_tar(stream: BinaryIO, name: str) -> list[TarSample]:
    """The samples of a tar, in order. The stream is read to its end.

    Raises:
        DamagedTar: the tar is not complete; says where and why.
    """
    samples: list[TarSample] = []
    for member in read_members(stream, name):
        key, extension = split_name(member.name)
        last = samples[-1] if samples else None
        if last and last.key == key and last.offset + last.length == member.offset:
            extensions = (*last.extensions, extension)
            samples[-1] = TarSample(key, last.offset, member.end - last.offset, extensions)
        else:
            samples.append(TarSample(key, member.offset, member.end - member.offset, (extension,)))
    return samples


def split_name(name: str) -> tuple[str, str]:
    """A member's WebDataset key and its extension: ``a.b/0001.seg.png`` -> (``a.b/0001``, ``seg.png``)."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def padded(size: int) -> int:
    """``size`` rounded up to whole blocks of a tar."""
    return -(-size // BLOCK) * BLOCK


def check_header(block: bytes) -> None:
    """Raise ValueError where the checksum of a tar header is not that of its bytes."""
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156]):
        raise ValueError("a header whose checksum does not match")


def parse_header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type flag of a tar header. Raises ValueError where it is none.

    The standard library's parser builds the whole member, owner and dates included; the stream reads three to six
    headers a sample under the interpreter's lock, so it has to be quick.
    """
    name, kind = _text(block[:100]), block[156:157]
    if kind == b"S":
        raise ValueError("a sparse file, which is not supported")
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return name, _number(block[124:136]), kind


def _number(digits: bytes) -> int:
    """A number of a tar header: octal digits, or base 256 where the first bit is set."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    number = int(digits.strip(b" \0") or b"0", 8)
    if number < 0:
        raise ValueError("a negative number")
    return number


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _skip(stream: BinaryIO, size: int, name: str, offset: int) -> None:
    """Read ``size`` bytes away; a short body is damage."""
    left = size
    while left > 0:
        got = len(stream.read(min(left, READ_BYTES)))
        if got == 0:
            raise DamagedTar(f"{name} is damaged at byte {offset:,}: it ends in the middle of a member")
        left -= got


def _check_end(stream: BinaryIO, name: str, offset: int) -> None:
    """After the first zero block of the end-of-archive mark at ``offset``: a second one, then only zeros."""
    second = stream.read(BLOCK)
    if len(second) < BLOCK:
        raise DamagedTar(f"{name} is damaged at byte {offset:,}: it ends in the middle of the end-of-archive mark")
    tail = second
    while tail:
        if tail.strip(b"\0"):
            raise DamagedTar(f"{name} is damaged at byte {offset:,}: data follows the end-of-archive mark")
        tail = stream.read(READ_BYTES)


def _read_record(stream: BinaryIO, size: int, name: str, offset: int) -> bytes:
    if size > LONGEST_HEADER_RECORD:
        raise DamagedTar(f"{name} is damaged at byte {offset:,}: a header record of {size:,} bytes")
    content = stream.read(padded(size))
    if len(content) < padded(size):
        raise DamagedTar(f"{name} is damaged at byte {offset:,}: it ends in the middle of a header")
    return content[:size]


def _pax_values(record: bytes, name: str, offset: int) -> dict[str, str]:
    """The key=value pairs of a pax header: records of ``<length> <key>=<value>\\n``."""
    values: dict[str, str] = {}
    while record:
        digits, _, _ = record.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not 0 < length <= len(record) or b"=" not in record[:length]:
            raise DamagedTar(f"{name} is damaged at byte {offset:,}: a pax header that cannot be read")
        key, _, value = record[len(digits) + 1 : length - 1].partition(b"=")
        values[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        record = record[length:]
    return values
