"""The stages of a download, for the whole list or a part of it: each looks first at what is already there."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from data_prep import layout, sources
from data_prep.config import DownloadConfig
from data_prep.fetch import fetch, pin_pictures
from data_prep.lock import Busy
from data_prep.page import write_page
from data_prep.parts import Part, note_verified, read_verified, remove_notes
from data_prep.prepare import Plan, fitting_plan, prepare, read_plan
from data_prep.report import Report, as_table, count_failures, make_report, read_stats
from data_prep.retry import Round, plan_round, read_rounds, retried_later, shard_count
from data_prep.verify import TarFacts, require_sound, verify
from pacl_scale import storage
from pacl_scale.data.index import INDEX_NAME, SampleIndex, build_index
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

REPAIRS = 2
"""How often damaged shards are made again before the run gives up."""

PAUSE_SECONDS = (1.0, 4.0)
"""Least and greatest pause before looking again whether another run has ended."""

SAY_SECONDS = 60.0

_chance = random.Random()


@dataclass
class Work:
    """A run on a data set: its plan, and how long each stage took in seconds."""

    config: DownloadConfig
    plan: Plan
    rounds: list[Round]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return self.config.output

    @property
    def shards(self) -> range:
        """All shards planned, retries included."""
        return range(shard_count(self.plan, self.rounds))

    def unfinished(self) -> list[int]:
        """Shards that are still to be made."""
        return sorted(set(self.shards) - set(layout.finished_shards(self.root)))


def begin(config: DownloadConfig) -> Work:
    """Prepare the list, or read the plan that was made from it."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        source = sources.get(config.source)
        plan = prepare(config.url_list, source, config.output, config.prepare, config.metadata, config.expect)
    return Work(config, plan, read_rounds(config.output), seconds)


def resume(config: DownloadConfig) -> Work:
    """Read the plan at the output; the list itself is not needed.

    Raises:
        UserError: nothing was prepared there.
    """
    return Work(config, read_plan(config.output), read_rounds(config.output))


def resume_part(config: DownloadConfig) -> Work | None:
    """As :func:`resume`, after a look whether the plan fits the settings; ``None`` if there is none yet."""
    plan = fitting_plan(config.output, sources.get(config.source), config.prepare)
    return None if plan is None else Work(config, plan, read_rounds(config.output))


def plan_retry(work: Work) -> bool:
    """Plan a round of retries once everything else is there. Returns whether there is something to ask again."""
    causes = work.config.retry.causes
    planned = plan_round(work.root, work.plan, work.rounds, work.plan.samples_per_shard, causes)
    if planned is not None:
        work.rounds.append(planned)
    return planned is not None


def fetch_and_verify(work: Work, part: Part, verified: dict[str, str]) -> dict[int, TarFacts]:
    """Make what is missing of a part, read back what was not read back before, make again what is damaged.

    Args:
        verified: checksums of tars that were read to their end before, by name.
    """
    root, backoff_s = work.root, work.config.retry.backoff_seconds
    mine = part.shards(len(work.shards))
    sound: dict[int, TarFacts] = {}
    for repair in range(REPAIRS + 1):
        with _timed(work.seconds, "fetch"):
            missing = [shard for shard in work.unfinished() if shard in mine]
            if missing:
                pin_pictures(root, work.config.fetch)
            _fetch(work, [shard for shard in missing if shard < work.plan.shards], 0.0)
            _fetch(work, [shard for shard in missing if shard >= work.plan.shards], backoff_s)
        with _timed(work.seconds, "verify"):
            trusted = {} if work.config.verify == "all" and not repair else verified
            sound |= known_sound(root, mine, trusted)
            fresh, broken = verify(root, sorted(set(mine) - set(sound)))
            sound |= fresh
        if not broken:
            return dict(sorted(sound.items()))
        if repair < REPAIRS:
            set_aside(root, broken, "it is made again")
    require_sound(broken)
    return sound


def _fetch(work: Work, shards: Sequence[int], backoff_s: float) -> None:
    if not shards:
        return
    config = work.config
    skipped = {shard: retried_later(config.output, work.plan, work.rounds, shard) for shard in shards}
    is_retry = shards[0] >= work.plan.shards
    faults = fetch(config.output, skipped, work.plan.samples_per_shard, config.fetch, backoff_s, is_retry)
    if faults:
        shard = min(faults)
        raise RunFailed(
            f"{len(faults)} of {len(shards)} shards could not be made, {layout.shard_name(shard)} because: "
            f"{faults[shard]}; the same command continues"
        )


def known_sound(root: str, shards: Sequence[int], verified: dict[str, str]) -> dict[int, TarFacts]:
    """Shards that were read to their end before and whose tar still has the size and the counted checksum."""
    sizes = layout.file_sizes(root, ".tar")
    facts: dict[int, TarFacts] = {}
    known = [shard for shard in shards if f"{layout.shard_name(shard)}.tar" in verified]
    for shard, stats in read_stats(root, known).items():
        name = f"{layout.shard_name(shard)}.tar"
        if stats.get("tar_sha256") == verified[name] and stats.get("tar_bytes") == sizes.get(name):
            facts[shard] = TarFacts(name, stats["successes"], stats["tar_bytes"], stats["tar_sha256"])
    return facts


def set_aside(root: str, broken: dict[int, str], consequence: str) -> None:
    """Bring damaged shards to ``broken/``, with a word about each."""
    for shard, reason in broken.items():
        log.warning(f"shard is damaged; {consequence}", shard=layout.shard_name(shard), reason=reason)
        layout.set_aside(root, shard)


def read_back(work: Work, everything: bool) -> tuple[dict[int, TarFacts], dict[int, str]]:
    """Read finished shards to their end: all of them, or those that were not before. Damaged ones are set aside."""
    finished = sorted(set(layout.finished_shards(work.root)) & set(work.shards))
    with _timed(work.seconds, "verify"):
        sound = {} if everything else known_sound(work.root, finished, read_verified(work.root))
        fresh, broken = verify(work.root, sorted(set(finished) - set(sound)))
    set_aside(work.root, broken, "the next download makes it again")
    return dict(sorted((sound | fresh).items())), broken


def remember(root: str, part: Part, sound: dict[int, TarFacts]) -> None:
    """Write down which shards were read to their end, unless it is known already."""
    verified = {facts.name: facts.sha256 for facts in sound.values()}
    known = read_verified(root)
    if any(known.get(name) != sha256 for name, sha256 in verified.items()):
        note_verified(root, part, verified)


def finish(work: Work, sound: dict[int, TarFacts]) -> Report:
    """Index what is sound, write the report if it tells something new, and print it."""
    stats = read_stats(work.root, sound)
    if not any(shard.get("successes") for shard in stats.values()) and not work.unfinished():
        discard(work.root, work.plan)
        causes = ", ".join(f"{cause} {count}" for cause, count in count_failures(stats).items())
        raise UserError(f"none of the {work.plan.rows} URLs of {work.plan.list_url} gave a picture ({causes})")
    samples = 0
    if any(facts.samples for facts in sound.values()):
        with _timed(work.seconds, "index"):
            samples = index(work.root, sound)
    return account(work, sound, samples)


def index(root: str, sound: dict[int, TarFacts]) -> int:
    """Number of samples in the index; it is built unless it fits the shards."""
    expected = [(facts.name, facts.bytes, facts.samples) for facts in sound.values()]
    if layout.exists(storage.join(root, INDEX_NAME)):
        found = storage.patiently(SampleIndex.load, root)
        if [(shard.name, shard.size, shard.samples) for shard in found.shards] == expected:
            return len(found)
    return len(storage.patiently(build_index, root, [facts.name for facts in sound.values()]))


def indexed(root: str) -> int:
    """Number of samples in the index, 0 if there is none."""
    return len(storage.patiently(SampleIndex.load, root)) if layout.exists(storage.join(root, INDEX_NAME)) else 0


def account(work: Work, sound: dict[int, TarFacts], samples: int) -> Report:
    """Write and print the report on the ``sound`` shards; nothing is written if it says the same as before."""
    url = storage.join(work.root, layout.REPORT)
    before = layout.read_json(url) or {}
    published = sources.get(work.plan.source).rows
    report = make_report(work.root, work.plan, work.rounds, published, sound, samples, work.seconds, before)
    if not report.adds_up:
        raise RunFailed(f"{work.root}: the account does not add up, please report this: {as_table(report, work.root)}")
    page = storage.join(work.root, layout.PAGE)
    if {**before, "seconds": None} != {**asdict(report), "seconds": None} or not layout.exists(page):
        write_page(page, report)
        layout.write_json(url, asdict(report))
    remove_notes(work.root)
    print(as_table(report, work.root))
    return report


def is_complete(work: Work) -> bool:
    """Whether the report tells of every shard, as it was read back last."""
    told = (layout.read_json(storage.join(work.root, layout.REPORT)) or {}).get("verified", {})
    verified = read_verified(work.root)
    names = [f"{layout.shard_name(shard)}.tar" for shard in work.shards]
    return all(name in told and told[name] == verified[name] for name in names)


class Patience:
    """Pauses between attempts that another run stands in the way of; of random length, lest two keep meeting."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said_at = float("-inf")

    def wait(self, error: Busy) -> None:
        """One pause, with a word about it every minute."""
        if time.monotonic() - self._said_at > SAY_SECONDS:
            self._said_at = time.monotonic()
            log.info(self._what, because=str(error))
        time.sleep(_chance.uniform(*PAUSE_SECONDS))


def discard(root: str, plan: Plan) -> None:
    """Leave nothing of a data set without a single sample, so that the next attempt starts afresh."""
    for shard in range(plan.shards):
        layout.remove_shard(root, shard)
    layout.remove(storage.join(root, layout.LIST_FOLDER))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started
