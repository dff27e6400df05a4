"""URL list -> verified, indexed WebDataset tars: ``python data_prep/download.py cc3m --output s3://bucket/cc3m``.

The name is short for ``--config configs/data/cc3m.yaml``.

The stages are prepare, fetch, verify, index and report. Each looks first at what is already there, so that the same
command continues a run that was killed and does nothing once all is done.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

if not __package__:
    # Run as a file: the checkout around it comes first, not this folder with its everyday names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import layout, sources
from data_prep.fetch import FetchConfig, fetch
from data_prep.lock import only_run
from data_prep.prepare import Plan, PrepareConfig, prepare
from data_prep.report import as_table, count_failures, make_report, read_stats
from data_prep.retry import RetryConfig, Round, plan_round, read_rounds, shard_count
from data_prep.verify import TarFacts, require_sound, verify
from pacl_scale import storage
from pacl_scale.config import parse
from pacl_scale.data.index import INDEX_NAME, SampleIndex, build_index
from pacl_scale.errors import UserError, run_command
from pacl_scale.log import configure, get_logger

log = get_logger(__name__)

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"

REPAIRS = 2
"""How often damaged shards are made again before the run gives up."""


@dataclass
class DownloadConfig:
    """Download the pictures of a URL list into WebDataset tars, verify and index them.

    Credentials of an object store come from its own environment variables (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL).
    """

    output: str
    """Where the data set goes: a folder, as a path or fsspec URL (s3://bucket/name)."""
    url_list: str = ""
    """The list: a path or fsspec URL of a .tsv, .csv or .parquet file (.tsv.gz, .csv.gz); not given, the file in the
    current folder that is named as the source's page names it (Train_GCC-training.tsv for cc3m)."""
    source: str = "pairs"
    """What kind of list it is, which tells its columns: pairs (your own, caption TAB url), cc3m, cc12m or yfcc15m."""
    metadata: str | None = None
    """Second file of a source that needs one: YFCC100M's yfcc100m_dataset.bz2 for yfcc15m."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How the list becomes shards."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How pictures are downloaded and stored."""
    again: bool = False
    """Ask again for what failed for a cause that may pass (retry.causes): one round a call, once all else is there."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """Which failures are asked for again and how."""
    verify: Literal["new", "all"] = "new"
    """Which finished shards are read back: those not verified before, or all."""

    def __post_init__(self) -> None:
        source = sources.get(self.source)
        self.url_list = self.url_list or source.file
        if not self.url_list:
            raise ValueError(f"url_list is missing: a list of {source.name} has no usual name")
        if source.needs_metadata and self.metadata is None:
            raise ValueError(f"metadata is missing: {source.name} needs {source.metadata_file}")
        if self.metadata is not None and not source.needs_metadata:
            raise ValueError(f"metadata is given, but {source.name} has no second file")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    configure()
    words = with_config_of_name(list(sys.argv[1:] if argv is None else argv))
    return run_command(lambda: download(parse(DownloadConfig, words, "data_prep/download.py")))


def with_config_of_name(words: list[str]) -> list[str]:
    """``words`` with a first one such as ``cc3m`` replaced by ``--config`` and its file."""
    names = {path.stem: str(path) for path in CONFIGS.glob("*.yaml")}
    return ["--config", names[words[0]], *words[1:]] if words and words[0] in names else words


def download(config: DownloadConfig) -> None:
    """Bring the data set of ``config`` to its end and print the account.

    Raises:
        UserError: any fault of the input or the store; what is at the output is then complete shards or nothing.
    """
    with only_run(config.output):
        _download(config)


def _download(config: DownloadConfig) -> None:
    root, source = config.output, sources.get(config.source)
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        plan = prepare(config.url_list, source, root, config.prepare, config.metadata)
    before = layout.read_json(storage.join(root, layout.REPORT)) or {}
    rounds = read_rounds(root)
    sound = _fetch_and_verify(config, plan, rounds, before.get("verified", {}), seconds)
    stats = read_stats(root, sound)
    if not any(shard.get("successes") for shard in stats.values()):
        _discard(root, plan)
        causes = ", ".join(f"{cause} {count}" for cause, count in count_failures(stats).items())
        raise UserError(f"none of the {plan.rows} URLs of {config.url_list} gave a picture ({causes})")
    if config.again:
        again = plan_round(root, plan, rounds, config.prepare.samples_per_shard, config.retry.causes)
        if again is not None:
            rounds = [*rounds, again]
            verified = {facts.name: facts.sha256 for facts in sound.values()}
            sound = _fetch_and_verify(config, plan, rounds, verified, seconds)
            stats = read_stats(root, sound)
    with _timed(seconds, "index"):
        samples = _index(root, sound)
    report = make_report(plan, rounds, source.rows, stats, sound, samples, seconds)
    if {**before, "seconds": None} != {**asdict(report), "seconds": None}:
        layout.write_json(storage.join(root, layout.REPORT), asdict(report))
    print(as_table(report, root))


def _fetch_and_verify(
    config: DownloadConfig,
    plan: Plan,
    rounds: Sequence[Round],
    verified: dict[str, str],
    seconds: dict[str, float],
) -> dict[int, TarFacts]:
    """Make what is missing, read back what was not read back before, and make again what is damaged."""
    root, count = config.output, shard_count(plan, rounds)
    sound: dict[int, TarFacts] = {}
    for repair in range(REPAIRS + 1):
        with _timed(seconds, "fetch"):
            missing = set(range(count)) - set(layout.finished_shards(root))
            _fetch(config, sorted(shard for shard in missing if shard < plan.shards), 0.0)
            _fetch(config, sorted(shard for shard in missing if shard >= plan.shards), config.retry.backoff_seconds)
        with _timed(seconds, "verify"):
            trusted = {} if config.verify == "all" and not repair else verified
            sound |= known_sound(root, count, trusted)
            fresh, broken = verify(root, sorted(set(range(count)) - set(sound)))
            sound |= fresh
        if not broken:
            return dict(sorted(sound.items()))
        if repair < REPAIRS:
            for shard, reason in broken.items():
                log.warning("shard is damaged and is made again", shard=layout.shard_name(shard), reason=reason)
                layout.set_aside(root, shard)
    require_sound(broken)
    return sound


def _fetch(config: DownloadConfig, shards: Sequence[int], backoff_s: float) -> None:
    if not shards:
        return
    faults = fetch(config.output, shards, config.prepare.samples_per_shard, config.fetch, backoff_s)
    if faults:
        shard = min(faults)
        raise UserError(
            f"{len(faults)} of {len(shards)} shards could not be made, {layout.shard_name(shard)} because: "
            f"{faults[shard]}; the same command continues"
        )


def known_sound(root: str, shards: int, verified: dict[str, str]) -> dict[int, TarFacts]:
    """Shards that were read to their end before and whose tar still has the size and the counted checksum."""
    sizes = layout.file_sizes(root, ".tar")
    facts: dict[int, TarFacts] = {}
    known = [shard for shard in range(shards) if f"{layout.shard_name(shard)}.tar" in verified]
    for shard, stats in read_stats(root, known).items():
        name = f"{layout.shard_name(shard)}.tar"
        if stats.get("tar_sha256") == verified[name] and stats.get("tar_bytes") == sizes.get(name):
            facts[shard] = TarFacts(name, stats["successes"], stats["tar_bytes"], stats["tar_sha256"])
    return facts


def _index(root: str, sound: dict[int, TarFacts]) -> int:
    """Number of samples in the index; it is built unless it fits the shards."""
    expected = [(facts.name, facts.bytes, facts.samples) for facts in sound.values()]
    if storage.exists(storage.join(root, INDEX_NAME)):
        index = SampleIndex.load(root)
        if [(shard.name, shard.size, shard.samples) for shard in index.shards] == expected:
            return len(index)
    return len(build_index(root, [facts.name for facts in sound.values()]))


def _discard(root: str, plan: Plan) -> None:
    """Leave nothing of a data set without a single sample, so that the next attempt starts afresh."""
    for shard in range(plan.shards):
        layout.remove_shard(root, shard)
    storage.remove(storage.join(root, layout.LIST_FOLDER))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
