"""How a download fares, while it lasts: shards done, time left, images/s and the share that succeeded."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from data_prep.workers import Outcome
from pacl_scale.log import PLAIN_PROGRESS_SECONDS, get_logger

log = get_logger(__name__)


def shown(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """Yield outcomes of shards, whose values begin with rows and samples, under a bar, or with a line now and then.

    Args:
        total: number of shards.
    """
    if sys.stderr.isatty():
        with tqdm(desc="download", total=total, unit="shard", dynamic_ncols=True, leave=False) as bar:
            for outcome, rates in _with_rates(outcomes, total):
                bar.set_postfix_str(
                    f"{rates['images_per_s']:,.0f} img/s, {rates['success']:.0%} success", refresh=False
                )
                bar.update()
                yield outcome
        return
    last = time.monotonic()
    for outcome, rates in _with_rates(outcomes, total):
        yield outcome
        if time.monotonic() - last >= PLAIN_PROGRESS_SECONDS:
            last = time.monotonic()
            log.info("download", **rates)


def _with_rates(outcomes: Iterable[Outcome], total: int) -> Iterator[tuple[Outcome, dict[str, Any]]]:
    rows = samples = 0
    started = time.monotonic()
    for done, outcome in enumerate(outcomes, start=1):
        if outcome.value is not None:
            rows, samples = rows + outcome.value[0], samples + outcome.value[1]
        seconds = max(time.monotonic() - started, 1e-6)
        yield (
            outcome,
            {
                "done": done,
                "total": total,
                "eta_s": round((total - done) * seconds / done),
                "images_per_s": round(rows / seconds, 1),
                "success": round(samples / rows, 3) if rows else 0.0,
            },
        )
