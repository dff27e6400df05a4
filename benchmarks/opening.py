"""Opening a data stream: how long its first batch takes and what memory, where the data are many, mixed or on a store.

    python benchmarks/opening.py [--json FILE]

Each figure is of processes of their own. ``loader.py`` shows the first one among its own.
"""

import argparse
import importlib
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import webdataset
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import apart, describe, write

from pacl_scale.data import node_copy
from pacl_scale.data.decode import resizer
from pacl_scale.data.index import LOADED, SampleIndex, build_index
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.encoders.vision import Preprocess
from pacl_scale.quickstart.store import ObjectStore

PREPROCESS = Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CORES = len(os.sched_getaffinity(0))


def main() -> int:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    options = parser.parse_args()
    resizer()
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        store = resources.enter_context(ObjectStore(folder / "store", buckets=("bench",)))
        os.environ.update(store.environment)
        results = {"machine": describe(), "mixture": mixture(folder)}
        results |= {"index_on_the_store": index_on_the_store(folder, store)}
        results |= {"thirty_million": apart(thirty_million, folder), "load_after": round(os.getloadavg()[0], 2)}
    write(results, options.json)
    return 0


def thirty_million(folder: Path) -> dict[str, float]:
    """Seconds from opening a data set of 30 million samples to its first batch, at the start and far into it."""
    data = DataConfig(root=made_up(folder / "many", shards=3000), decode_threads=CORES)
    found = {"first_batch_s": first_batch_s(data, 0), "resume_s": first_batch_s(data, 123_456_789)}
    return {name: round(seconds, 2) for name, seconds in found.items()}


def mixture(folder: Path, weights: tuple[float, float] = (0.999, 0.001)) -> dict[str, float]:
    """Two data sets of three million samples of 64 KB, one of which gives one sample in a thousand, beside the first of
    them alone: seconds to batches, and MiB of samples that are held at most and by which the process grows."""
    roots = [made_up(folder / name, shards=3000, per_shard=1000, padding=60_000) for name in ("heavy", "light")]
    read = ReadConfig(read_ahead_mb=8)
    found = {}
    for name, count in (("alone", 1), ("mixture", 2)):
        data = DataConfig(mix=dict(zip(roots[:count], weights, strict=False)), read=read, decode_threads=CORES)
        found |= {f"{name}_{what}": value for what, value in apart(first_batch_and_memory, data).items()}
    return found


def first_batch_and_memory(data: DataConfig) -> dict[str, float]:
    """Seconds to the first batch of 64 and to the slowest of the next hundred, and what memory they take at most."""
    process, small = psutil.Process(), replace(PREPROCESS, image_size=32)
    before, taken, held = process.memory_info().rss, [time.perf_counter()], 0
    with PairStream(data, 0, 64) as stream:
        stream.prepare_pictures_for(small)
        for _ in zip(range(101), stream, strict=False):
            taken.append(time.perf_counter())
            assert stream._running is not None
            held = max(held, stream._running._ahead.held)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first, *later = np.diff(taken).tolist()
    found = {"first_batch_s": first, "longest_batch_s": max(later)}
    found |= {"held_mb": held / 2**20, "growth_mb": (peak - before) / 2**20}
    return {name: round(value, 2) for name, value in found.items()}


def first_batch_s(data: DataConfig, position: int) -> float:
    """Seconds from opening a data set to its first batch of 256 from ``position`` on."""
    started = time.perf_counter()
    with PairStream(data, 0, 256, position=position) as stream:
        stream.prepare_pictures_for(PREPROCESS)
        next(iter(stream))
        return time.perf_counter() - started


def made_up(root: Path, shards: int, per_shard: int = 10_000, padding: int = 0) -> str:
    """A data set whose shards are all the same tar of small pictures, each with so many bytes more; where it is."""
    root.mkdir()
    content = encoded(np.zeros((16, 16, 3), np.uint8)) + bytes(padding)
    first = root / "00000.tar"
    with webdataset.TarWriter(str(first), encoder=False) as tar:
        for number in range(per_shard):
            tar.write({"__key__": f"{number:05d}", "jpg": content, "txt": b"a black square"})
    index = build_index(str(root))
    for shard in range(1, shards):
        (root / f"{shard:05d}.tar").symlink_to(first)
    tiled(index, str(root), shards).save()
    return str(root)


def tiled(index: SampleIndex, root_url: str, shards: int) -> SampleIndex:
    """The index of so many shards that are all like the only one of ``index``."""
    (shard,) = index.shards
    columns = {name: np.tile(getattr(index, name), shards) for name in LOADED}
    return SampleIndex(root_url, [replace(shard, name=f"{n:05d}.tar") for n in range(shards)], **columns)


def index_on_the_store(folder: Path, store: ObjectStore, processes: int = 4) -> dict[str, Any]:
    """An index of 30 million samples on the S3 server, opened by several processes at once, as the ranks of a node do:
    each one's seconds and memory, in MiB as it counts for each (RSS) and shared evenly (PSS); once with a copy on this
    machine and, second, with the copy that is there already; and with an index of its own in each. CPU seconds are
    those of one process, and say more than time where others use the machine."""
    importlib.import_module("s3fs")
    root = folder / "tiny"
    index = SampleIndex.load(made_up(root, shards=1))
    tiled(index, str(root), 3000).save()
    content = (root / "index.parquet").read_bytes()
    store.client().put_object(Bucket="bench", Key="many/index.parquet", Body=content)
    found: dict[str, Any] = {"index_mb": round(len(content) / 2**20)}
    for name, smallest in (("first", node_copy.SMALLEST), ("again", node_copy.SMALLEST), ("each_its_own", 1 << 60)):
        found |= {f"{name}_{what}": value for what, value in opened_together(processes, smallest, folder).items()}
    return found


def opened_together(processes: int, smallest: int, folder: Path) -> dict[str, Any]:
    """Seconds and MiB of the processes that open an index at the same moment; the slowest and the largest."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    def open_it() -> None:
        node_copy.SMALLEST, tempfile.tempdir = smallest, str(folder)
        process = psutil.Process()
        before = process.memory_full_info()
        barrier.wait()
        started, cpu = time.perf_counter(), time.process_time()
        index = SampleIndex.load("s3://bench/many")
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        # As a stream does: the samples of a window.
        starts = np.random.default_rng(0).integers(0, len(index) - 32, 128)
        index.offset[starts[:, None] + np.arange(32)].sum()
        barrier.wait()
        after = process.memory_full_info()
        results.put((seconds, cpu, (after.rss - before.rss) / 2**20, (after.pss - before.pss) / 2**20))
        barrier.wait()

    children = [context.Process(target=open_it) for _ in range(processes)]
    for child in children:
        child.start()
    rows = [results.get() for _ in children]
    for child in children:
        child.join()
    largest = np.max(rows, axis=0).tolist()
    return {name: round(value, 1) for name, value in zip(("s", "cpu_s", "rss_mb", "pss_mb"), largest, strict=True)}


def encoded(pixels: np.ndarray) -> bytes:
    """As img2dataset stores it: JPEG of quality 95."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(main())
