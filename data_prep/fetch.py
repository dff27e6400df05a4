"""Download the pictures of prepared lists with img2dataset, shard by shard, in supervised processes."""

import functools
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import psutil

import pacl_scale
from data_prep import layout
from data_prep.bar import shown
from data_prep.decoder import WatchedResizer
from data_prep.decontaminate import check_distance, describe_lists
from data_prep.distribute import distribute, require
from data_prep.guard import FIRST_BYTES, Limits, install
from data_prep.imports import light_img2dataset
from data_prep.tracking import reported
from data_prep.workers import Outcome
from pacl_scale import storage
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

USER_AGENT_TOKEN = "pacl-scale"
"""The name that a server's X-Robots-Tag can address."""

SCRATCH_PREFIX = "pacl-scale-fetch-"

LEAST_HELD_BYTES = 1 << 28
"""Of bodies, that each process may hold at a time."""

BLIND_SHARDS = 3
"""So many shards in a row of which no URL could be reached are this machine's fault, not the list's."""

UNREACHABLE = frozenset({"connection", "dns", "timeout"})


@dataclass
class FetchConfig:
    """How pictures are downloaded and stored."""

    processes: int = 4
    """Processes that each download one shard at a time."""
    distributor: Literal["processes", "multiprocessing", "pyspark", "ray"] = "processes"
    """Who starts them: processes supervises them on this machine and replaces those that hang or die; the others are
    img2dataset's own (pyspark and ray are extras and use the session or cluster that they find)."""
    threads: int = 32
    """Requests under way in each process."""
    image_size: int = 256
    """Pixels of the stored picture's side that resize_mode means."""
    resize_mode: Literal["keep_ratio", "center_crop", "border", "keep_ratio_largest", "no"] = "keep_ratio"
    """As img2dataset's: keep_ratio makes the shorter side image_size, keep_ratio_largest the longer one."""
    upscale: bool = False
    """Also enlarge pictures that are smaller than image_size."""
    jpeg_quality: int = 95
    """Quality of the stored JPEG, 1 to 100."""
    request_seconds: float = 30.0
    """A request that is not finished by then, redirects included, is given up."""
    silence_seconds: float = 10.0
    """A server that says nothing for this long is given up."""
    shard_seconds: float = 7200.0
    """A shard that takes longer is abandoned with its process and done again."""
    largest_body_mb: float = 32.0
    """MB; a longer body is refused."""
    largest_megapixels: float = 100.0
    """Megapixels; a larger picture is refused before it is decoded."""
    largest_aspect_ratio: float = 20.0
    """A picture longer than this in one direction is refused."""
    smallest_side: int = 16
    """Pixels; a picture with a shorter side is refused."""
    exclude: list[str] = field(default_factory=list)
    """Lists of hashes of pictures that must not be in the data set, such as those of data sets to evaluate on; paths
    or fsspec URLs, made by data_prep/decontaminate.py."""
    exclude_distance: int = 4
    """Bits of 64 in which a perceptual hash may differ from a listed one."""
    allowed_networks: list[str] = field(default_factory=list)
    """Networks that may be asked although their addresses are not public: [10.0.0.0/8] on an intranet."""
    honour_opt_out: bool = True
    """Leave out pictures whose server, or a redirect to it, says noai, noimageai, noindex, noimageindex or none in
    X-Robots-Tag."""
    contact: str | None = None
    """An address (URL or e-mail) that the user agent names, so that a server's owner can write to you."""
    scratch: str | None = None
    """Local folder for shards in the making, room for one a process; the system's temporary folder by default."""
    wandb_project: str | None = None
    """Project of Weights & Biases to report speed, success and causes to, as img2dataset does; null reports nothing."""

    def __post_init__(self) -> None:
        for name in ("processes", "threads", "image_size", "request_seconds", "silence_seconds", "shard_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"fetch.{name} must be positive")
        if self.largest_body_mb <= 0 or self.largest_megapixels <= 0 or self.largest_aspect_ratio < 1:
            raise ValueError("fetch.largest_body_mb and largest_megapixels must be positive, aspect ratio >= 1")
        check_distance("fetch.exclude_distance", self.exclude_distance)
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError("fetch.jpeg_quality must be between 1 and 100")
        try:
            [ip_network(network) for network in self.allowed_networks]
        except ValueError as error:
            raise ValueError(f"fetch.allowed_networks: {error}") from error
        if self.contact is not None and not self.contact.isprintable():
            raise ValueError("fetch.contact must be printable")


def fetch(
    root_url: str,
    shards: Mapping[int, frozenset[int]],
    samples_per_shard: int,
    config: FetchConfig,
    backoff_s: float = 0.0,
    is_retry: bool = False,
) -> dict[int, str]:
    """Make shards from their prepared lists, letting failing hosts rest if ``backoff_s`` is not 0.

    Args:
        shards: numbers, each with the ids of rows that must not be asked for.
        is_retry: their rows have failed before.

    Returns:
        What went wrong, by number, with the shards that could not be made in three attempts.

    Raises:
        RunFailed: nothing can be reached from here; the shards that tell so are removed.
    """
    faults: dict[int, str] = {}
    require(config.distributor)
    skipped = {shard: ids for shard, ids in shards.items() if ids}
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch_folder(config.scratch))
        made = distribute(
            config.distributor,
            functools.partial(download_shard, root_url, scratch, samples_per_shard, config, backoff_s, skipped),
            list(shards),
            config.processes,
            config.shard_seconds,
            functools.partial(layout.finished_shards, root_url),
            functools.partial(_counts_of, root_url),
            scratch,
        )
        # Whatever ends the loop ends the workers, before their folder goes.
        outcomes: Iterable[Outcome] = stack.enter_context(closing(made))
        if not is_retry:
            outcomes = _while_seeing(root_url, outcomes, len(shards))
        for outcome in shown(reported(outcomes, root_url, config), len(shards)):
            if outcome.fault is not None:
                faults[outcome.task] = outcome.fault
                log.warning("shard failed", shard=layout.shard_name(outcome.task), reason=outcome.fault)
    return faults


def _counts_of(root_url: str, shard: int) -> tuple[int, int, dict[str, int]]:
    """Rows, samples, and failures by cause of a shard that is at its place."""
    stats = layout.read_json(storage.join(root_url, layout.shard_name(shard) + layout.STATS_SUFFIX)) or {}
    return stats.get("count", 0), stats.get("successes", 0), stats.get("causes", {})


def _while_seeing(root_url: str, outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """The outcomes, up to where a dead network or name server would spoil shard after shard."""
    blind: dict[int, str] = {}
    for done, outcome in enumerate(outcomes, start=1):
        yield outcome
        _, samples, causes = outcome.value or (0, 0, {})
        if samples or not causes or set(causes) - UNREACHABLE:
            blind = {}
            continue
        blind[outcome.task] = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        if len(blind) >= BLIND_SHARDS and done < total:
            for shard in blind:
                layout.remove_shard(root_url, shard)
            raise RunFailed(
                f"no URL of {len(blind)} shards in a row could be reached ({blind[outcome.task]} in the last): look at "
                "this machine's network and name server; the same command continues"
            )


def download_shard(
    root_url: str,
    scratch: str,
    samples_per_shard: int,
    config: FetchConfig,
    backoff_s: float,
    skipped: Mapping[int, frozenset[int]],
    shard: int,
) -> tuple[int, int, dict[str, int]]:
    """Make one shard in this process; returns its rows, its samples, and its failures by cause.

    Raises:
        BadShard, UserError: as :meth:`ShardDownloader.download_shard`.
    """
    os.makedirs(scratch, exist_ok=True)  # on another machine than the one that distributes
    _set_environment(config)
    import data_prep.verify  # noqa: F401 - what it needs may need torch; the rest below does not

    with light_img2dataset():
        from data_prep.shard import ShardDownloader, ShardWriter

    opener = install(limits(config, backoff_s, os.path.join(scratch, "hosts")))
    note = os.path.join(scratch, f"{layout.shard_name(shard)}.decoding")
    resizer = WatchedResizer(functools.partial(resizer_of, config), note, opener.budget.give_back)
    try:
        downloader = ShardDownloader(
            root_url=root_url,
            scratch=scratch,
            skipped=skipped.get(shard, frozenset()),
            sample_writer_class=ShardWriter,
            resizer=resizer,
            thread_count=config.threads,
            save_caption=True,
            extract_exif=False,
            timeout=config.silence_seconds,
            # A key is shard number and row number; ten rows make it two digits at least.
            number_sample_per_shard=max(10, samples_per_shard),
            oom_shard_count=layout.SHARD_DIGITS,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,
            user_agent_token=USER_AGENT_TOKEN,
            disallowed_header_directives=None,  # the guard heeds them
        )
        return downloader.make((shard, layout.list_url(root_url, shard)))
    finally:
        resizer.close()


def resizer_of(config: FetchConfig) -> Any:
    """What makes a JPEG of a body, as the configuration says."""
    _set_environment(config)
    with light_img2dataset():
        from data_prep.decontaminate import read_lists
        from data_prep.picture import PictureResizer

    return PictureResizer(
        most_pixels=round(config.largest_megapixels * 1e6),
        smallest_side=config.smallest_side,
        largest_aspect_ratio=config.largest_aspect_ratio,
        excluded=read_lists(tuple(config.exclude), config.exclude_distance) if config.exclude else None,
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=not config.upscale,
        encode_quality=config.jpeg_quality,
    )


def _set_environment(config: FetchConfig) -> None:
    # Read at import; a second lock behind the look at the header.
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(round(config.largest_megapixels * 1e6))


def pin_pictures(root_url: str, config: FetchConfig) -> None:
    """Write down how the pictures of a data set are made; refuse to go on with other settings.

    Raises:
        UserError: shards that are there already were made with others.
    """
    url = storage.join(root_url, layout.PICTURES)
    shaping: dict[str, Any] = {name: getattr(config, name) for name in SHAPING}
    if config.exclude:
        shaping |= {"exclude": describe_lists(config.exclude), "exclude_distance": config.exclude_distance}
    before = layout.read_json(url)
    if before is None:
        layout.write_json(url, shaping)
        return
    both = dict.fromkeys([*before, *shaping])
    changed = [f"fetch.{name}={before.get(name)}" for name in both if before.get(name) != shaping.get(name)]
    if changed:
        raise UserError(f"{root_url} holds pictures made with {', '.join(changed)}; keep that or choose another output")


SHAPING = (
    "image_size",
    "resize_mode",
    "upscale",
    "jpeg_quality",
    "largest_body_mb",
    "largest_megapixels",
    "largest_aspect_ratio",
    "smallest_side",
    "honour_opt_out",
)
"""Settings that decide which pictures a data set has, and how they look."""


def limits(config: FetchConfig, backoff_s: float, rests: str | None = None) -> Limits:
    """What each request may take, the user agent, and where processes tell each other which hosts rest."""
    contact = f"; {config.contact}" if config.contact else ""
    body_bytes = math.floor(config.largest_body_mb * 1e6)
    return Limits(
        deadline_s=config.request_seconds,
        body_bytes=body_bytes,
        allowed_networks=tuple(ip_network(network) for network in config.allowed_networks),
        user_agent=f"{USER_AGENT_TOKEN}/{pacl_scale.__version__} (img2dataset{contact})",
        backoff_s=backoff_s,
        rests=rests,
        robot=USER_AGENT_TOKEN if config.honour_opt_out else None,
        held_bytes=max(LEAST_HELD_BYTES, config.threads * FIRST_BYTES + 2 * body_bytes),
    )


@contextmanager
def _scratch_folder(parent: str | None) -> Iterator[str]:
    """A local folder for this run; those of runs that were killed are cleared away."""
    place = Path(parent or tempfile.gettempdir())
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"fetch.scratch: {place} cannot be written to ({error.strerror})") from error
    # Other machines may share the place; only they know which of their processes live.
    ours = f"{SCRATCH_PREFIX}{socket.gethostname()}-"
    for old in place.glob(f"{ours}*"):
        owner = old.name.removeprefix(ours).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}-", dir=place) as folder:
        yield folder
