"""One shard, from its prepared list to its place: img2dataset downloads, what it leaves is checked, then it appears.

Importing this module imports img2dataset; only worker processes do.
"""

import copy
import hashlib
import json
import os
import tempfile
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from img2dataset.downloader import Downloader

from data_prep import layout
from data_prep.causes import RETRIED_SCHEME, cause_of
from data_prep.verify import BadShard
from pacl_scale import storage

WRITTEN_SUFFIX = "_written.json"
"""Of a file beside a shard in the making: what its writer put into it."""

LIST_COLUMNS = ["id", "nouns", "caption", "url"]
"""Columns of the prepared list; all of them go into the json member of a sample."""


class ShardDownloader(Downloader):
    """img2dataset's Downloader, working in a folder of this machine that readers of the data set cannot see.

    Written straight to its place, a shard that is interrupted leaves half a tar there, or on an object store the
    parts of an unfinished upload. Here tar, parquet file and counts are checked first, then brought to their place
    one by one, the counts last: they are what says that a shard is finished.

    Args:
        root_url: where the data set lies.
        scratch: local folder for shards in the making.
        skipped: ids of rows that are not asked for.
        options: those of img2dataset's Downloader.
    """

    def __init__(self, root_url: str, scratch: str, skipped: frozenset[int], **options: Any) -> None:
        super().__init__(output_folder=scratch, column_list=LIST_COLUMNS, **options)
        self.root_url = root_url
        self.skipped = skipped
        self.scratch = scratch

    def make(self, row: tuple[int, str]) -> tuple[int, int, dict[str, int]]:
        """Make the shard ``row[0]`` from the prepared list at ``row[1]``.

        Returns:
            Its rows, its samples, and its failures by cause.

        Raises:
            BadShard: what was made contradicts itself.
            UserError, RunFailed: the list cannot be read, or the store does not take the shard.
        """
        shard, list_url = row
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            arrow = os.path.join(folder, "list.feather")
            _as_feather(layout.read_bytes(list_url), arrow, self.skipped)
            # The base class writes where its output_folder says; other shards of this object must not follow.
            local = copy.copy(self)
            local.output_folder = folder
            local.download_shard((shard, arrow))
            base = os.path.join(folder, layout.shard_name(shard))
            made = _complete_stats(base)
            self._put(base, storage.join(self.root_url, layout.shard_name(shard)))
        return made

    def _put(self, local: str, remote: str) -> None:
        for suffix in (".tar", ".parquet", layout.STATS_SUFFIX):
            layout.upload_patiently(local + suffix, remote + suffix)


class _HashedFile:
    """A file that is written from its start to its end, and what it must be found to hold when it is read back."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.size += len(content)
        return self._file.write(content)

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """img2dataset's sample writer: made by its Downloader for each shard, then fed every row of the shard.

    img2dataset's own writer keeps the order in which servers happened to answer and the time of day; this one
    puts samples and rows in the order of the list and gives every member the same time, so that a shard that is
    made again is the same shard. What arrives ahead of its turn waits in memory, as JPEG of the final size.

    Args:
        shard_id: number of the shard.
        output_folder: local folder of this shard.
        save_caption: write ``.txt`` members.
        oom_shard_count: digits of the shard's number in keys and file names.
        schema: columns of the parquet file; ``cause`` is added to them.
        encode_format: extension of the pictures.
    """

    def __init__(
        self,
        shard_id: int,
        output_folder: str,
        save_caption: bool,
        oom_shard_count: int,
        schema: pa.Schema,
        encode_format: str,
    ) -> None:
        self._base = os.path.join(output_folder, layout.shard_name(shard_id))
        self._tar_file = _HashedFile(f"{self._base}.tar")
        self._tar = wds.TarWriter(self._tar_file, mtime=0)
        self._schema = schema.append(pa.field("cause", pa.string()))
        self._save_caption = save_caption
        self._extension = encode_format
        self._digits = oom_shard_count
        self._waiting: dict[int, tuple[bytes | None, str, str | None, dict[str, Any]]] = {}
        self._rows: list[dict[str, Any]] = []

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Take one row: the encoded picture, or ``None`` and ``meta["error_message"]``."""
        self._waiting[int(key[self._digits :])] = (img_str, key, caption, meta)
        while len(self._rows) in self._waiting:
            self._put(*self._waiting.pop(len(self._rows)))

    def close(self) -> None:
        """Finish both files. Called by img2dataset after the last row."""
        for position in sorted(self._waiting):
            self._put(*self._waiting[position])
        self._tar.close()
        self._tar_file.close()
        pq.write_table(pa.Table.from_pylist(self._rows, self._schema), f"{self._base}.parquet", compression="zstd")
        causes = [row["cause"] for row in self._rows]
        written = {
            "rows": len(causes),
            "successes": causes.count(None),
            "causes": dict(Counter(cause for cause in causes if cause is not None).most_common()),
            "tar_sha256": self._tar_file.sha256.hexdigest(),
            "tar_bytes": self._tar_file.size,
        }
        with open(self._base + WRITTEN_SUFFIX, "w", encoding="utf-8") as file:
            json.dump(written, file)

    def _put(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        if img_str is not None:
            sample = {"__key__": key, self._extension: img_str}
            if self._save_caption:
                sample["txt"] = (caption or "").encode()
            sample["json"] = json.dumps(meta, ensure_ascii=False).encode()
            self._tar.write(sample)
        error = meta["error_message"]
        self._rows.append({**meta, "cause": None if error is None else cause_of(error)})


def _as_feather(parquet: bytes, path: str, skipped: frozenset[int]) -> None:
    table = pq.read_table(pa.BufferReader(parquet)).select(LIST_COLUMNS)
    if skipped:
        rows = zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True)
        urls = [f"{RETRIED_SCHEME}:{url}" if number in skipped else url for number, url in rows]
        table = table.set_column(LIST_COLUMNS.index("url"), "url", pa.array(urls, pa.string()))
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _complete_stats(base: str) -> tuple[int, int, dict[str, int]]:
    """Add to img2dataset's counts what the writer knows of the finished local shard.

    Returns its rows, its samples, and its failures by cause.

    What was written is read back from its place later (:func:`data_prep.verify.verify`), to the last member, and held
    against this checksum, which was taken on the way to the disk.

    Raises:
        BadShard: a row never reached the writer, or was counted as something else.
    """
    with open(base + layout.STATS_SUFFIX, encoding="utf-8") as file:
        stats = json.load(file)
    with open(base + WRITTEN_SUFFIX, encoding="utf-8") as file:
        written = json.load(file)
    counted = (stats["count"], stats["successes"])
    if (written.pop("rows"), written.pop("successes")) != counted:
        raise BadShard(f"{os.path.basename(base)}: other rows or samples were written than its counts say: {counted}")
    with open(base + layout.STATS_SUFFIX, "w", encoding="utf-8") as file:
        json.dump(stats | written, file, indent=2)
    return *counted, written["causes"]
