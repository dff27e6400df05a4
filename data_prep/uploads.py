"""Uploads that a killed run left unfinished on an object store: invisible to readers, and paid for until they go."""

import posixpath
import re
from collections.abc import Iterator
from typing import Any

from data_prep import layout
from data_prep.parts import Part
from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

SHARD_FILE = re.compile(rf"(\d{{{layout.SHARD_DIGITS},}})(\.tar|\.parquet|_stats\.json)")

OTHER_FILE = re.compile(
    rf"index\.parquet|report\.(json|html)|({layout.LIST_FOLDER}|{layout.BROKEN_FOLDER})/[\w-]+\.(json|parquet|tar)"
)
"""What belongs to no part: written by whoever has the claim on all of them."""

FOLDERS = ("", layout.LIST_FOLDER, layout.BROKEN_FOLDER)


def abort_unfinished(root_url: str, part: Part) -> int:
    """Abort the multipart uploads of a part's shards, and delete half copies on a file system; returns how many.

    For the whole list also those of the index, the reports, the prepared lists and ``broken/``. Call it with the claim
    on that part: then nobody alive is uploading them.
    """
    if storage.is_local(root_url):
        return _remove_half_copies(root_url, part)
    files, path = storage.filesystem(root_url)
    if not hasattr(files, "call_s3"):
        return 0  # other stores forget unfinished uploads by themselves
    bucket, prefix, _ = files.split_path(path)
    prefix = f"{prefix}/" if prefix else ""
    aborted = 0
    try:
        with storage.explained(root_url):
            for upload in list(_uploads(files, bucket, prefix)):
                key, number = upload["Key"], upload["UploadId"]
                if _is_of(part, key.removeprefix(prefix)):
                    files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=number)
                    aborted += 1
    except UserError as error:
        # Not every key may list uploads, and not every store can: that costs money, not data.
        log.warning("unfinished uploads cannot be looked for", reason=str(error))
    if aborted:
        log.info("unfinished uploads of a killed run were removed", uploads=aborted)
    return aborted


def _uploads(files: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Unfinished uploads below a prefix, page by page."""
    markers: dict[str, str] = {}
    while True:
        page = files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _remove_half_copies(root_url: str, part: Part) -> int:
    removed = 0
    for folder in FOLDERS:
        for name in layout.file_sizes(storage.join(root_url, folder), ".part"):
            path = posixpath.join(folder, name)
            if _is_of(part, path.rsplit(".", 2)[0]):
                layout.remove(storage.join(root_url, path))
                removed += 1
    return removed


def _is_of(part: Part, name: str) -> bool:
    match = SHARD_FILE.fullmatch(name)
    if match is None:
        return part.is_whole and OTHER_FILE.fullmatch(name) is not None
    return int(match[1]) % part.of == part.number
