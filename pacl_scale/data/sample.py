"""The members of one sample, from the bytes that the index names."""

import io

from pacl_scale.data.index import DamagedTar, read_members, split_name


def read_sample(content: bytes, shard: str) -> tuple[str, dict[str, bytes]]:
    """The sample's key, and its members' content by extension.

    Args:
        content: from the first header of the sample to the end of its last member's padding.
        shard: what to call it in an error.

    Raises:
        DamagedTar: the bytes are not tar members, or hold none.
    """
    members = {}
    key = None
    for member in read_members(io.BytesIO(content), shard, whole=False):
        found, extension = split_name(member.name)
        key = found if key is None else key
        members[extension] = content[member.data : member.data + member.size]
    if key is None:
        raise DamagedTar(f"{shard}: a sample without members")
    return key, members
