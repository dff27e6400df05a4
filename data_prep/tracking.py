"""A download's speed, success and causes in Weights & Biases: img2dataset's own loggers, for who asks for them.

img2dataset's logging process reads every JSON file of the output as counts, which the reports there are not; so its
loggers are fed here, a shard at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from data_prep import layout
from data_prep.imports import light_img2dataset
from data_prep.workers import Outcome
from pacl_scale import storage

if TYPE_CHECKING:
    from data_prep.fetch import FetchConfig


def reported(outcomes: Iterable[Outcome], root_url: str, config: "FetchConfig") -> Iterator[Outcome]:
    """Yield outcomes of shards, each after it was reported to the project that the configuration names, if any."""
    if config.wandb_project is None:
        yield from outcomes
        return
    import wandb

    with light_img2dataset():
        from img2dataset.logger import CappedCounter, SpeedLogger, StatusTableLogger

    run = wandb.init(project=config.wandb_project, config=asdict(config))
    speed, status = SpeedLogger("total", enable_wandb=True), StatusTableLogger(enable_wandb=True)
    counts = CappedCounter()
    try:
        for outcome in outcomes:
            if outcome.fault is None:
                url = storage.join(root_url, layout.shard_name(outcome.task) + layout.STATS_SUFFIX)
                stats = layout.read_json(url) or {}
                names = ("failed_to_download", "failed_to_resize", "start_time", "end_time")
                speed(stats["count"], stats["successes"], *(stats[name] for name in names))
                counts.update(CappedCounter.load(stats["status_dict"]))
                status(counts, speed.count)
            yield outcome
        speed.sync()
        status.sync()
    finally:
        run.finish()
