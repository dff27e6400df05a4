"""Data preparation: speed and memory of a plan, images/s beside plain img2dataset, and whether all states add up.

    python benchmarks/data_prep.py [--quick] [--json FILE] [--urls N] [--list-rows N] [--rounds N]

Pictures come from a loopback web server in a process of its own; plain img2dataset downloads the same list with the
same processes and threads in the same run, by turns. ``--quick`` takes under 50 seconds on two cores; without it the
list has 100,000 URLs and the plan 12 million rows.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, write

ROOT = Path(__file__).resolve().parents[1]
PROCESSES, THREADS = 2, 16
PICTURES = 32
"""Different pictures that the web server holds ready."""

SIZE = (320, 240)

BAD_SHARE = 0.05
"""Of the URLs; they answer as the kinds below, by turns."""

BAD = {
    "missing": "http_404",
    "gone": "http_410",
    "error": "http_500",
    "busy": "http_429",
    "empty": "empty",
    "text": "not_an_image",
    "cut": "truncated",
    "loop": "redirects",
    "noai": "opt_out",
    "gibberish": "protocol",
}
"""What the web server does wrong, and the cause that a row must end with; nothing that waits, on either side."""

WORDS = ["dog", "cat", "man", "woman", "child", "horse", "table", "chair", "street", "tree", "red", "old", "near", "on"]
PLAIN = """
import img2dataset, json, sys
if __name__ == "__main__":
    img2dataset.download(**json.loads(sys.argv[1]))
"""


def prepare_speed(rows: int, folder: Path) -> dict[str, Any]:
    """Make the plan of a made-up list of CC12M's shape in a process of its own; nouns are measured elsewhere."""
    url_list, out = folder / "list.tsv", folder / "plan"
    chance = random.Random(0)
    captions = [" ".join(chance.choices(WORDS, k=20)) for _ in range(5000)]
    with url_list.open("w") as file:
        for number in range(rows):
            caption = captions[chance.randrange(5000)]
            site, twin = chance.randrange(5000), number - (number % 50 == 0)
            file.write(f"https://site{site % 50}.example.org/pictures/{twin:09d}.jpg?size=large\t{caption}\n")
    script = (
        "import re, sys, time; from data_prep import sources; from data_prep.prepare import *\n"
        "started = time.perf_counter()\n"
        "plan = prepare(sys.argv[1], sources.get('cc12m'), sys.argv[2], PrepareConfig(nouns=False))\n"
        "seconds = time.perf_counter() - started\n"
        # ru_maxrss would be that of the process that started this one, if that was larger.
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "import json; print(json.dumps([seconds, peak, plan.list_rows, plan.rows, sum(plan.left_out.values())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(url_list), str(out)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    seconds, peak, list_rows, kept, left_out = json.loads(done.stdout.splitlines()[-1])
    assert list_rows == rows == kept + left_out
    return {"rows": rows, "rows_per_s": rows / seconds, "peak_mb": peak, "list_mb": url_list.stat().st_size / 1e6}


def noun_speed(captions: int) -> float:
    """Captions a second that one process finds the nouns of."""
    script = (
        "import random, sys, time; from data_prep.nouns import extract_nouns\n"
        f"words = {WORDS!r}; n = {captions}; chance = random.Random(0)\n"
        "texts = [' '.join(chance.choices(words, k=10)) for _ in range(n)]\n"
        "next(extract_nouns(['a dog .'])); started = time.perf_counter()\n"
        "list(extract_nouns(texts)); print(n / (time.perf_counter() - started))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        path = self.rfile.readline().split()[1].decode()
        while self.rfile.readline().strip():
            pass
        kind, _, name = path.strip("/").rpartition("/")
        body = _pictures[int(name.removesuffix(".jpg")) % PICTURES]
        whole = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n" % len(body)
        answers = {
            "missing": b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "gone": b"HTTP/1.0 410 Gone\r\nContent-Length: 0\r\n\r\n",
            "error": b"HTTP/1.0 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
            "busy": b"HTTP/1.0 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
            "empty": b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            "text": b"HTTP/1.0 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>",
            "cut": whole + b"\r\n" + body[: len(body) // 2],
            "loop": b"HTTP/1.0 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % path.encode(),
            "noai": whole + b"X-Robots-Tag: noai\r\n\r\n" + body,
            "gibberish": b"\x16\x03\x01 this is no HTTP\r\n\r\n",
        }
        self.wfile.write(answers.get(kind, whole + b"\r\n" + body))


_pictures: list[bytes] = []


def _serve(pipe: Any) -> None:
    chance = random.Random(0)
    for _ in range(PICTURES):
        picture = Image.frombytes("RGB", (16, 12), chance.randbytes(16 * 12 * 3)).resize(SIZE)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        _pictures.append(stream.getvalue())
    with _Server(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send(server.server_address[1])
        pipe.recv()


@contextmanager
def web_server() -> Iterator[str]:
    """Address of a running server of pictures."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        ours.send(None)
        process.join()


def write_urls(path: Path, address: str, urls: int) -> None:
    """A list in CC3M's layout, with a header for plain img2dataset's reader in a second file beside it."""
    bad = round(urls * BAD_SHARE)
    rows = [f"a dog near a chair number {n}\t{address}/{n}.jpg" for n in range(urls - bad)]
    kinds = list(BAD)
    rows += [f"a cat that is gone {n}\t{address}/{kinds[n % len(kinds)]}/{n}" for n in range(bad)]
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(rows) + "\n")
    path.with_suffix(".headed.tsv").write_text("caption\turl\n" + "\n".join(rows) + "\n")


def ours(url_list: Path, output: Path, shard: int, scratch: Path) -> list[str]:
    """The command of this project."""
    words = [f"url_list={url_list}", f"output={output}", f"prepare.samples_per_shard={shard}", "prepare.nouns=false"]
    words += [f"fetch.processes={PROCESSES}", f"fetch.threads={THREADS}", "fetch.allowed_networks=[127.0.0.0/8]"]
    return [sys.executable, str(ROOT / "data_prep/download.py"), *words, f"fetch.scratch={scratch}"]


def plain(url_list: Path, output: Path, shard: int) -> list[str]:
    """img2dataset as its users call it, with the same work to do."""
    options = {
        "url_list": str(url_list.with_suffix(".headed.tsv")),
        "output_folder": str(output),
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "processes_count": PROCESSES,
        "thread_count": THREADS,
        "number_sample_per_shard": shard,
        "image_size": 256,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "extract_exif": False,
    }
    script = output.parent / "plain.py"
    script.write_text(PLAIN)
    return [sys.executable, str(script), json.dumps(options)]


def download_speed(command: list[str], output: Path) -> dict[str, float]:
    """Run a download; images/s while all processes are at work, from the first shard's start to the last's end, and of
    the whole command, which is what a user waits for: imports, list, verification and index included.

    The first is what a shard takes from its start until it is in its place, times the number of processes: it does
    not depend on which process was first with its imports, nor on how evenly the last shards end.
    """
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    watched, memory = psutil.Process(process.pid), []
    while process.poll() is None:
        memory.append(_memory_of(watched))
        time.sleep(0.25)
    command_s = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    stats = [(json.loads(path.read_text()), path.stat().st_mtime) for path in output.glob("*_stats.json")]
    images = sum(shard["count"] for shard, _ in stats)
    wall_s = max(end for _, end in stats) - min(shard["start_time"] for shard, _ in stats)
    busy_s = sum(end - shard["start_time"] for shard, end in stats)
    half = len(memory) // 2
    return {
        "images_per_s": images * PROCESSES / busy_s,
        "images_per_s_wall": images / wall_s,
        "images_per_s_command": images / command_s,
        "peak_mb": max(memory),
        "growth": max(memory[half:]) / max(max(memory[:half]), 1.0),
    }


def _memory_of(process: psutil.Process) -> float:
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended between two looks
    return total / 2**20


def states(url_list: Path, output: Path) -> tuple[int, int]:
    """Rows of the list, and how many of them end in exactly one state, a failure with the cause that was served."""
    listed = Counter(line.split("\t")[1] for line in url_list.read_text().splitlines())
    ended: Counter[str] = Counter()
    for path in output.glob("[0-9]*.parquet"):
        for row in pq.read_table(path, columns=["url", "status", "cause"]).to_pylist():
            cause = BAD.get(row["url"].split("/")[3])
            ended[row["url"]] += int((row["status"] == "success") == (cause is None) and row["cause"] == cause)
    left_out = sum(json.loads((output / "report.json").read_text())["left_out"].values())
    return listed.total(), sum(1 for url in listed if ended[url] == 1) + left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 50 seconds on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--urls", type=int, help="URLs to download")
    parser.add_argument("--list-rows", type=int, help="rows of the list to plan")
    parser.add_argument("--rounds", type=int, help="downloads of either side, of which the faster counts")
    arguments = parser.parse_args()
    urls = arguments.urls or (2_400 if arguments.quick else 100_000)
    list_rows = arguments.list_rows or (200_000 if arguments.quick else 12_000_000)
    rounds = arguments.rounds or (1 if arguments.quick else 2)
    with tempfile.TemporaryDirectory() as place, web_server() as address:
        folder = Path(place)
        url_list, shard = folder / "urls.tsv", max(urls // (4 if arguments.quick else 8), 1)
        write_urls(url_list, address, urls)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for turn in range(rounds):
            output = folder / f"ours{turn}"
            found["ours"].append(download_speed(ours(url_list, output, shard, folder), output))
            output = folder / f"plain{turn}"
            found["plain"].append(download_speed(plain(url_list, output, shard), output))
        rows, in_one_state = states(url_list, folder / "ours0")
        planned = prepare_speed(list_rows, folder)
        captions_per_s = noun_speed(500 if arguments.quick else 10_000)
    best = {name: max(run["images_per_s"] for run in runs) for name, runs in found.items()}
    wall = {name: max(run["images_per_s_wall"] for run in runs) for name, runs in found.items()}
    whole = {name: max(run["images_per_s_command"] for run in runs) for name, runs in found.items()}
    write(
        {
            "benchmark": "data_prep",
            "quick": arguments.quick,
            "machine": describe(),
            "over_img2dataset": best["ours"] / best["plain"],
            "over_img2dataset_wall": wall["ours"] / wall["plain"],
            "over_img2dataset_command": whole["ours"] / whole["plain"],
            "images_per_s_command": whole["ours"],
            "images_per_s_command_plain": whole["plain"],
            "urls": urls,
            "images_per_s": best["ours"],
            "images_per_s_plain": best["plain"],
            "download_peak_mb": max(run["peak_mb"] for run in found["ours"]),
            "download_peak_mb_plain": max(run["peak_mb"] for run in found["plain"]),
            "memory_second_half_over_first": max(run["growth"] for run in found["ours"]),
            "prepare_rows_per_s": planned["rows_per_s"],
            "prepare_peak_mb": planned["peak_mb"],
            "prepare_rows": planned["rows"],
            "noun_captions_per_s": captions_per_s,
            "rows": rows,
            "rows_in_exactly_one_state": in_one_state,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
