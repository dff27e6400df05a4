"""The data stream beside other loaders: the same JPEGs, the same S3 server, the same cores, in the same run.

    python benchmarks/loader.py [--quick] [--json FILE] [--clients]

Every candidate delivers (b, 3, 224, 224) float tensors, normalised for CLIP, from pictures of 256 px on the shorter
side. Each runs in a process of its own, forked from one that has started no threads. Counting begins after some
batches, so that as much is under way at its end as at its beginning. "Per core" is images by CPU seconds of the loader
and all its processes; the S3 server's are not counted. Figures beside decoding alone are medians of rounds in which
both ran one after the other, whichever is first. ``--clients`` adds the table by which the S3 client was chosen.
``--quick`` takes under 50 s on two cores that have nothing else to do. ``opening.py`` measures more of how a
stream begins.
"""

import argparse
import gc
import importlib
import io
import itertools
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import apart, describe, rotated, write
from opening import CORES, PREPROCESS, encoded, thirty_million

from pacl_scale.data.decode import PictureConfig, decode, normalise, resizer
from pacl_scale.data.index import Shard, build_index
from pacl_scale.data.order import EpochOrder
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.quickstart.store import ObjectStore

BATCH = 64
SHARDS = 4
WARM_UP = 6
"""Batches before counting begins: what the stream makes ahead, and then some."""
SHUFFLE_BUFFER = 1000
"""webdataset's usual shuffle: all shards, then a buffer of this many samples."""

Batches = Iterator[Tensor]
Candidate = Callable[[dict[str, str]], Batches]


def main() -> int:
    """Run everything and write the results."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures; under a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--clients", action="store_true", help="also compare S3 clients on ranged reads")
    options = parser.parse_args()
    amount = Amount(512, 5, 1, 1.5, 12) if options.quick else Amount(2048, 7, 3, 8.0, 30)
    import_what_peers_need()
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        store = resources.enter_context(ObjectStore(folder / "store", buckets=("bench",)))
        os.environ.update(store.environment)
        places = prepare(folder, store, per_shard=64 if options.quick else 1024)
        results: dict[str, Any] = {"machine": describe(), "batch": BATCH, "amount": asdict(amount)}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "compare": lambda: compare(places, amount),
            "training": lambda: apart(training, places, amount.steps),
            "thirty_million": lambda: apart(thirty_million, folder),
            "memory": lambda: apart(memory_over_epochs, places),
            "neighbours": neighbours,
        }
        if options.clients:
            parts["clients"] = lambda: {"clients": apart(clients, store.endpoint)}
        took_s = {"start": round(time.perf_counter() - started, 1)}
        for name, part in parts.items():
            began = time.perf_counter()
            results |= part()
            took_s[name] = round(time.perf_counter() - began, 1)
        results |= {"took_s": took_s, "load_after": round(os.getloadavg()[0], 2)}
    write(results, options.json)
    return 0


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    pictures: int
    """Of one candidate in one round."""
    rounds: int
    """Of ours and of decoding alone."""
    peer_rounds: int
    peer_s: float
    """Longest time of a peer in one round."""
    steps: int
    """Of training."""


def import_what_peers_need() -> None:
    """Once, before anything is forked, rather than in each child."""
    for module in ("open_clip.transform", "s3fs", "timm", "streaming"):
        if importable(module.split(".")[0]):
            importlib.import_module(module)
    resizer()


def compare(places: dict[str, str], amount: Amount) -> dict[str, Any]:
    """Images per CPU second of every candidate, and ours beside the best other one and beside decoding alone."""
    own: dict[str, Candidate] = {"pacl_scale": ours, "decode alone": decode_alone}
    peers: dict[str, Candidate] = {
        "webdataset pipe:curl": through_webdataset,
        "s3fs + tarfile loop": through_s3fs,
        "DataLoader, local files": through_data_loader,
    }
    missing = []
    if "mosaic" in places:
        peers["MosaicML streaming"] = through_mosaic
    else:
        missing.append("MosaicML streaming: not installed (pip install mosaicml-streaming)")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in own | peers}
    for number in range(amount.rounds):
        for name in rotated(list(own), number):
            runs[name].append(apart(timed, own[name], places, amount.pictures, 60.0))
        for name, open_batches in peers.items():
            if number < amount.peer_rounds:
                runs[name].append(apart(timed, open_batches, places, amount.pictures, amount.peer_s))
    per_core = {name: statistics.median(run["per_cpu_s"] for run in found) for name, found in runs.items()}
    wall = {name: statistics.median(run["per_s"] for run in found) for name, found in runs.items()}
    best = max(peers, key=lambda name: per_core[name])
    pairs = zip(runs["pacl_scale"], runs["decode alone"], strict=True)
    shares = sorted(ours["per_cpu_s"] / alone["per_cpu_s"] for ours, alone in pairs)
    return {
        "images_per_s_per_core": round(per_core["pacl_scale"], 1),
        "over_best_peer": round(per_core["pacl_scale"] / per_core[best], 3),
        "over_decode_alone": round(statistics.median(shares), 3),
        "over_decode_alone_rounds": [round(share, 3) for share in shares],
        "best_peer": best,
        "per_core": {name: round(value, 1) for name, value in per_core.items()},
        "images_per_s": {name: round(value, 1) for name, value in wall.items()},
        "missing_peers": missing,
    }


def timed(
    open_batches: Callable[[dict[str, str]], Batches], places: dict[str, str], pictures: int, longest_s: float
) -> dict[str, float]:
    """Images per second and per CPU second of one candidate, when it runs evenly, over at most ``longest_s``."""
    batches = open_batches(places)
    began = time.perf_counter()
    for _ in range(WARM_UP):
        next(batches)
        if time.perf_counter() - began > longest_s:
            break
    count, cpu, started = 0, cpu_seconds(), time.perf_counter()
    while count < pictures and time.perf_counter() - started < longest_s:
        count += len(next(batches))
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    batches.close()  # type: ignore[attr-defined]
    return {"per_s": count / seconds, "per_cpu_s": count / cpu}


def cpu_seconds() -> float:
    """Of this process and of all below it, those that ended included."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0.0
    for process in family:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


# --- candidates ------------------------------------------------------------------------------------------------------


def ours(places: dict[str, str]) -> Batches:
    """The data stream, from S3."""
    # The pictures of a short run are few: with more read-ahead, reading would be counted that was not yet delivered.
    read = ReadConfig(window_chunks=16, read_ahead_mb=8)
    data = DataConfig(root=places["s3"], read=read, decode_threads=CORES)
    with PairStream(data, 0, BATCH) as stream:
        stream.prepare_pictures_for(PREPROCESS)
        for batch in stream:
            assert batch.images is not None
            yield batch.images


def decode_alone(places: dict[str, str]) -> Batches:
    """What the stream does to a picture, with the pictures in memory: the ceiling."""
    contents = [path.read_bytes() for path in sorted(Path(places["files"]).iterdir())]
    images = np.empty((BATCH, 3, 224, 224), np.float32)
    config = PictureConfig()

    def fill(row: int, content: bytes) -> None:
        normalise(decode(content, PREPROCESS, config, None), PREPROCESS, images[row])

    supply = itertools.cycle(contents)
    with ThreadPoolExecutor(CORES) as threads:
        while True:
            some = list(itertools.islice(supply, BATCH))
            list(threads.map(fill, range(BATCH), some, chunksize=8))
            yield torch.from_numpy(images)


def through_webdataset(places: dict[str, str]) -> Batches:
    """webdataset as its documentation shows it: shards through a pipe, shard and buffer shuffle, two processes."""
    urls = [f"pipe:curl -s -f '{url}'" for url in json.loads(places["presigned"])]
    transform = clip_transform()
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=webdataset.split_by_node, empty_check=False)
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(BATCH)
        .repeat()
    )
    yield from processes(dataset)


def through_s3fs(places: dict[str, str]) -> Batches:
    """A plain loop: open a tar on S3, walk it, decode with Pillow."""
    import s3fs

    files, transform = s3fs.S3FileSystem(), clip_transform()

    def pictures() -> Iterator[Tensor]:
        while True:
            for path in sorted(files.glob(f"{places['s3']}/*.tar")):
                with files.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                    for member in tar:
                        content = tar.extractfile(member)
                        if member.name.endswith(".jpg") and content is not None:
                            yield transform(Image.open(io.BytesIO(content.read())))

    supply = pictures()
    while True:
        yield torch.stack(list(itertools.islice(supply, BATCH)))


class Files(Dataset[tuple[Tensor, str]]):
    """Pictures as single files on this machine's disk."""

    def __init__(self, folder: str) -> None:
        self.paths, self.transform = sorted(Path(folder).iterdir()), clip_transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        return self.transform(Image.open(self.paths[number])), str(number)


def through_mosaic(places: dict[str, str]) -> Batches:
    """MosaicML's streaming from the same server, in its own format, copied to a local folder first, as it does."""
    from streaming import StreamingDataset

    transform = clip_transform()

    class Pictures(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Tensor, str]:
            sample = super().__getitem__(at)
            return transform(Image.open(io.BytesIO(sample["jpg"]))), sample["txt"]

    with tempfile.TemporaryDirectory() as local:
        pictures = Pictures(remote=places["mosaic"], local=local, shuffle=True, batch_size=BATCH)
        while True:
            for images, _ in DataLoader(pictures, BATCH, num_workers=CORES, drop_last=True):
                yield images


def through_data_loader(places: dict[str, str]) -> Batches:
    """torch's DataLoader over processes, from local files: no S3 and no tar to read."""
    loader = DataLoader(Files(places["files"]), BATCH, shuffle=True, num_workers=CORES, drop_last=True)
    while True:
        for images, _ in loader:
            yield images


def processes(dataset: IterableDataset[Any]) -> Batches:
    """Batches that as many processes as cores put together."""
    for images, _ in DataLoader(dataset, batch_size=None, num_workers=CORES):
        yield torch.as_tensor(images)


def clip_transform() -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform."""
    from open_clip.transform import image_transform

    return image_transform(224, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)


# --- other figures ---------------------------------------------------------------------------------------------------


def training(places: dict[str, str], steps: int) -> dict[str, float]:
    """Share of a step with a frozen ViT-S on CPU that is spent waiting for the next batch."""
    import timm

    torch.set_num_threads(CORES)
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval().to(torch.bfloat16)
    batches, waited = ours(places), 0.0
    with torch.inference_mode():
        model.forward_features(next(batches)[:16].bfloat16())
        started = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            images = next(batches)
            waited += time.perf_counter() - before
            model.forward_features(images[:16].bfloat16())
        total = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return {"data_wait_share": round(waited / total, 4), "step_s": round(total / steps, 3)}


def memory_over_epochs(places: dict[str, str]) -> dict[str, float]:
    """MiB by which the process grew from the end of the second to the end of the tenth epoch."""
    batches, process = ours(places), psutil.Process()
    per_epoch = len(list(Path(places["files"]).iterdir())) // BATCH
    resident = []
    for _ in range(10):
        for _ in range(per_epoch):
            next(batches)
        gc.collect()
        resident.append(process.memory_info().rss / 2**20)
    batches.close()  # type: ignore[attr-defined]
    return {"memory_mb": round(resident[-1], 1), "memory_growth_mb": round(resident[-1] - resident[1], 1)}


def neighbours(shards: int = 100, per_shard: int = 1000) -> dict[str, float]:
    """Correlation of neighbours' original positions, ours and webdataset's: 1 is no shuffling at all, 0 is the best."""

    def correlation(order: Iterable[int]) -> float:
        places = np.fromiter(order, np.int64)
        return round(float(np.corrcoef(places[:-1], places[1:])[0, 1]), 4)

    read = ReadConfig()
    order = EpochOrder([Shard("", 0, per_shard)] * shards, 0, 0, read.chunk_samples, read.window_chunks)
    shuffled = np.random.default_rng(0).permutation(shards)
    in_shards = (int(shard) * per_shard + place for shard in shuffled for place in range(per_shard))
    theirs = webdataset.filters.shuffle(SHUFFLE_BUFFER, seed=0)(in_shards)
    return {
        "neighbour_correlation": correlation(order.samples(0, len(order))),
        "neighbour_correlation_webdataset": correlation(theirs),
    }


def clients(endpoint: str) -> list[dict[str, Any]]:
    """Ranged reads of several sizes through several S3 clients, eight threads."""
    import botocore.session
    import s3fs
    from botocore.config import Config

    s3 = botocore.session.Session().create_client("s3", config=Config(max_pool_connections=8))
    s3.put_object(Bucket="bench", Key="large", Body=os.urandom(64 << 20))
    files = s3fs.S3FileSystem()
    gets: dict[str, Callable[[int, int], Any]] = {
        "botocore": lambda a, b: s3.get_object(Bucket="bench", Key="large", Range=f"bytes={a}-{b - 1}")["Body"].read(),
        "s3fs": lambda a, b: files.cat_file("bench/large", start=a, end=b),
    }
    if importable("obstore"):
        import obstore
        from obstore.store import S3Store

        options = {"endpoint": endpoint, "region": "us-east-1", "client_options": {"allow_http": True}}
        credentials = {
            "access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        }
        bucket = S3Store("bench", **options, **credentials)
        gets["obstore"] = lambda a, b: obstore.get_range(bucket, "large", start=a, end=b)
    if importable("boto3"):
        import boto3

        three = boto3.client("s3", config=Config(max_pool_connections=8))
        gets["boto3"] = lambda a, b: three.get_object(Bucket="bench", Key="large", Range=f"bytes={a}-{b - 1}")[
            "Body"
        ].read()
    if importable("s3torchconnector"):
        from s3torchconnector import S3ReaderConstructor
        from s3torchconnector._s3client import S3Client

        torch_client = S3Client("us-east-1", endpoint=endpoint)
        ranged = S3ReaderConstructor.range_based(buffer_size=0)

        def torch_get(a: int, b: int) -> Any:
            with torch_client.get_object("bench", "large", reader_constructor=ranged) as reader:
                reader.seek(a)
                return reader.read(b - a)

        gets["s3torchconnector"] = torch_get
    rows = []
    for size, count in ((64 << 10, 200), (1 << 20, 100), (4 << 20, 50)):
        starts = np.random.default_rng(0).integers(0, (64 << 20) - size, count).tolist()
        for name, get in gets.items():
            get(0, size)
            cpu, started = time.process_time(), time.perf_counter()
            with ThreadPoolExecutor(8) as threads:
                total = sum(threads.map(lambda a, get=get, size=size: len(get(a, a + size)), starts))
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            rows.append(
                {
                    "client": name,
                    "kib": size >> 10,
                    "mib_per_s": round(total / seconds / 2**20),
                    "cpu_s_per_gib": round(cpu / total * 2**30, 2),
                }
            )
    return rows


# --- the data set ----------------------------------------------------------------------------------------------------


def prepare(folder: Path, store: ObjectStore, per_shard: int) -> dict[str, str]:
    """Pictures of 256 px on the shorter side, as tars on the store and as single files; where they are."""
    files, tars, client = folder / "files", folder / "tars", store.client()
    files.mkdir()
    tars.mkdir()
    different = [encoded(landscape(number)) for number in range(32)]
    presigned = []
    for shard in range(SHARDS):
        path = tars / f"{shard:05d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for place in range(per_shard):
                number = shard * per_shard + place
                content = different[number % len(different)]
                tar.write({"__key__": f"{number:07d}", "jpg": content, "txt": f"picture {number}".encode()})
                (files / f"{number:07d}.jpg").write_bytes(content)
        client.put_object(Bucket="bench", Key=f"pairs/{path.name}", Body=path.read_bytes())
        where = {"Bucket": "bench", "Key": f"pairs/{path.name}"}
        presigned.append(client.generate_presigned_url("get_object", Params=where))
    build_index(str(tars))
    client.put_object(Bucket="bench", Key="pairs/index.parquet", Body=(tars / "index.parquet").read_bytes())
    places = {"s3": "s3://bench/pairs", "files": str(files), "presigned": json.dumps(presigned)}
    if importable("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "txt": "str"}, size_limit=8 << 20) as writer:
            for path in sorted(files.iterdir()):
                writer.write({"jpg": path.read_bytes(), "txt": f"picture {int(path.stem)}"})
        for path in (folder / "mds").iterdir():
            client.put_object(Bucket="bench", Key=f"mds/{path.name}", Body=path.read_bytes())
        os.environ["S3_ENDPOINT_URL"] = store.endpoint
        places["mosaic"] = "s3://bench/mds"
    return places


def landscape(number: int) -> np.ndarray:
    """256 x 341 pixels that compress about as a photograph does: noise of several sizes."""
    rng = np.random.default_rng(number)
    total = np.zeros((256, 341, 3), np.float32)
    for size, weight in ((4, 90), (16, 50), (64, 20), (256, 4)):
        coarse = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += weight * (np.asarray(coarse.resize((341, 256), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1)
    return np.clip(128 + total, 0, 255).astype(np.uint8)


def importable(module: str) -> bool:
    """Whether a package is installed."""
    from importlib.util import find_spec

    return find_spec(module) is not None


if __name__ == "__main__":
    sys.exit(main())
