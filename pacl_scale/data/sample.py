"""The members of one sample, from the bytes that the index names."""

import io
from collections.abc import Mapping

from pacl_scale.data.tar import (
    BLOCK,
    PAX_HEADER,
    REGULAR_FILE,
    ZERO_BLOCK,
    DamagedTar,
    padded,
    parse_header,
    read_members,
    split_name,
)

Members = Mapping[str, memoryview]
"""Content of a sample's members, by extension."""


def read_sample(content: bytes) -> tuple[str, dict[str, memoryview]]:
    """The sample's key, and its members' content by extension.

    The checksums of the headers were verified when the tar was indexed; here the key tells whether these are the
    bytes that were indexed.

    Args:
        content: from the first header of the sample to the end of its last member's padding.

    Raises:
        DamagedTar: the bytes are not tar members, or hold none.
    """
    view, members, key, offset = memoryview(content), {}, None, 0
    while offset < len(content):
        try:
            name, size, kind = parse_header(content[offset : offset + BLOCK])
        except (ValueError, IndexError) as error:
            raise DamagedTar(f"a sample that is no part of a tar ({error})") from error
        data = offset + BLOCK
        offset = data + padded(size)
        if offset > len(content):
            raise DamagedTar("a sample that ends in the middle of a member")
        if kind == PAX_HEADER and not _renames(content[data:offset]):
            continue
        if kind not in REGULAR_FILE:
            return _read_unusual(content)
        found, extension = split_name(name)
        key = found if key is None else key
        members[extension] = view[data : data + size]
    if key is None:
        raise DamagedTar("a sample without members")
    return key, members


def _renames(record: bytes) -> bool:
    """Whether a pax header says more of the member than its times, which is all that webdataset has it say."""
    return b"path=" in record or b"size=" in record


def _read_unusual(content: bytes) -> tuple[str, dict[str, memoryview]]:
    """The same where members have long names, or are links."""
    view, members, key = memoryview(content), {}, None
    for member in read_members(io.BytesIO(content + 2 * ZERO_BLOCK), "a sample"):
        found, extension = split_name(member.name)
        key = found if key is None else key
        members[extension] = view[member.data : member.data + member.size]
    if key is None:
        raise DamagedTar("a sample without members")
    return key, members
