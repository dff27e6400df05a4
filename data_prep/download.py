"""URL list -> verified, indexed WebDataset tars: ``python data_prep/download.py cc3m --output s3://bucket/cc3m``.

The name is short for ``--config configs/data/cc3m.yaml``. The stages are prepare, fetch, verify, index and report. Each
looks first at what is already there, so that the same command continues a run that was killed and does nothing once all
is done. A verb before the name (``download.py verify cc3m --output ...``) does one stage by itself.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

if not __package__:
    # Run as a file: the checkout around it comes first, not this folder with its everyday names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pacl_scale.errors import end_quietly_when_interrupted

    end_quietly_when_interrupted()

from data_prep import layout, mirror, slurm, stages
from data_prep.config import DownloadConfig
from data_prep.lock import Busy, only_run
from data_prep.parts import WHOLE, Part, read_verified
from data_prep.uploads import abort_unfinished
from pacl_scale import storage
from pacl_scale.config import SHIPPED, parse
from pacl_scale.errors import RunFailed, UserError, run_command
from pacl_scale.log import configure, get_logger

log = get_logger(__name__)

PROG = "data_prep/download.py"

LEAVE_SECONDS = 60.0
"""The list can be read a moment before who prepared it gives back the claim on the whole: so long a part waits."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    configure()
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(words))


def command(words: list[str]) -> None:
    """Do what the words say, here or, with ``--slurm`` among them, on a Slurm cluster."""
    verb = words[0] if words and words[0] in VERBS else ""
    rest = with_config_of_name([word for word in words[bool(verb) :] if word != "--slurm"])
    config: DownloadConfig = parse(DownloadConfig, rest, PROG)
    _refuse_what_is_ignored(verb, config)
    if "--slurm" not in words:
        slurm.end_when_asked()
        VERBS[verb](config)
        return
    if verb not in ("", "retry") or config.is_mirror or config.parts > 1:
        raise UserError(
            "--slurm queues downloads and retries of whole lists; leave out part and parts, see slurm.parts"
        )
    if verb != "retry":
        config.require_list()
    elif missing := stages.resume(config).unfinished():
        raise UserError(f"{len(missing)} shards are not made yet; a retry comes after a download: leave out retry")
    slurm.submit(config.slurm, config.output, rest, again=config.again or verb == "retry")


def _refuse_what_is_ignored(verb: str, config: DownloadConfig) -> None:
    """Raise UserError for a setting that a verb would not look at."""
    if config.again and verb in ("verify", "index", "report"):
        raise UserError(f"again: {verb} asks for nothing")
    if config.verify == "all" and verb in ("index", "report"):
        raise UserError(f"verify=all: {verb} reads no shards back; download, retry and the verb verify do")


def with_config_of_name(words: list[str]) -> list[str]:
    """``words`` with a first one such as ``cc3m`` replaced by ``--config`` and its file."""
    names = {path.stem: str(path) for path in (SHIPPED / "data").glob("*.yaml")}
    return ["--config", names[words[0]], *words[1:]] if words and words[0] in names else words


def download(config: DownloadConfig) -> None:
    """Bring the data set of ``config`` to its end and print the account.

    Raises:
        UserError: any fault of the input or the store; what is at the output is then complete shards or nothing.
    """
    if config.is_mirror:
        mirror.adopt(config.output, config.expect, config.fetch, everything=config.verify == "all")
        return
    if config.own_part.is_whole:
        config.require_list()
        with only_run(config.output):
            _complete(stages.begin(config))
    else:
        _take_part(config)


def _complete(work: stages.Work) -> None:
    """All that is missing, the retry that may be asked for, index and report."""
    root = work.root
    abort_unfinished(root, WHOLE)
    sound = stages.fetch_and_verify(work, WHOLE, read_verified(root))
    if work.config.again:
        # Nothing but failures: the data set is discarded instead of asked for again.
        if not any(facts.samples for facts in sound.values()):
            stages.finish(work, sound)
        stages.remember(root, WHOLE, sound)
        if stages.plan_retry(work):
            sound = stages.fetch_and_verify(work, WHOLE, read_verified(root))
    stages.finish(work, sound)


def _take_part(config: DownloadConfig) -> None:
    """Make one part of the shards; whoever makes the last of all brings the data set to its end."""
    part = config.own_part
    work = stages.resume_part(config)
    patience = stages.Patience("wait for another run that prepares the list")
    while work is None:
        config.require_list()
        try:
            with only_run(config.output):
                work = stages.begin(config)
        except Busy as error:
            patience.wait(error)
            work = stages.resume_part(config)
    with ExitStack() as claims:
        _claim_part(claims, config.output, part)
        abort_unfinished(config.output, part)
        sound = stages.fetch_and_verify(work, part, read_verified(config.output))
        stages.remember(config.output, part, sound)
    print(f"{part}: {len(sound)} shards, {sum(facts.samples for facts in sound.values()):,} samples: {config.output}")
    complete_if_last(config.output, work)


def _claim_part(claims: ExitStack, root: str, part: Part) -> None:
    """Claim a part until ``claims`` ends. Who has prepared the list holds all parts for a moment longer."""
    patience = stages.Patience("wait for the run that prepared the list to leave")
    since = time.monotonic()
    while True:
        try:
            return claims.enter_context(only_run(root, part))
        except Busy as error:
            if not error.on_whole or time.monotonic() - since > LEAVE_SECONDS:
                raise
            patience.wait(error)


def complete_if_last(root: str, work: stages.Work) -> None:
    """Index and report once no shard of any part is missing; of several runs that end together, one does."""
    patience = stages.Patience("wait for the runs on the last parts")
    while not work.unfinished():
        try:
            with only_run(root):
                if not stages.is_complete(work):
                    _complete(work)
            return
        except Busy as error:
            if stages.is_complete(work):
                return
            patience.wait(error)


def prepare(config: DownloadConfig) -> None:
    """Read the list and plan the shards; with ``again``, plan a round of retries once all shards are there."""
    if config.is_mirror:
        raise UserError("a mirror has no list to prepare")
    if not config.again:
        config.require_list()
    with only_run(config.output):
        work = stages.resume(config) if config.again else stages.begin(config)
        if config.again and not work.unfinished():
            stages.plan_retry(work)
    print(f"{work.plan.rows:,} rows in {len(work.shards)} shards, {len(work.unfinished())} to be made: {config.output}")


def verify(config: DownloadConfig) -> None:
    """Read every finished shard to its end; damaged ones are set aside and leave the index.

    Raises:
        RunFailed: some were damaged.
    """
    if config.is_mirror:
        mirror.adopt(config.output, config.expect, config.fetch, everything=True)
        return
    with only_run(config.output):
        work = stages.resume(config)
        sound, broken = stages.read_back(work, everything=True)
        stages.remember(config.output, WHOLE, sound)
        if broken and any(facts.samples for facts in sound.values()) and stages.indexed(config.output):
            stages.index(config.output, sound)
    waiting = len(work.unfinished())
    samples = sum(facts.samples for facts in sound.values())
    print(f"{len(sound)} of {len(work.shards)} shards are sound, {samples:,} samples: {config.output}")
    if broken:
        names = ", ".join(f"{layout.shard_name(shard)}.tar" for shard in sorted(broken))
        raise RunFailed(f"damaged and set aside in {layout.BROKEN_FOLDER}/: {names}; download makes them again")
    if waiting:
        print(f"{waiting} are not made yet; download continues")


def index(config: DownloadConfig) -> None:
    """Index the sound shards, those of an unfinished data set too."""
    if config.is_mirror:
        mirror.adopt(config.output, config.expect, config.fetch, everything=False)
        return
    with only_run(config.output):
        work = stages.resume(config)
        sound, _ = stages.read_back(work, everything=False)
        if not any(facts.samples for facts in sound.values()):
            raise UserError(f"{config.output} has no sample to index yet")
        stages.remember(config.output, WHOLE, sound)
        samples = stages.index(config.output, sound)
    print(f"{samples:,} samples of {len(sound)} shards indexed: {config.output}")


def report(config: DownloadConfig) -> None:
    """Write the report anew from what is there, for an unfinished data set too."""
    if config.is_mirror:
        mirror.adopt(config.output, config.expect, config.fetch, everything=False)
        return
    with only_run(config.output):
        work = stages.resume(config)
        layout.remove(storage.join(config.output, layout.PAGE))
        finished = sorted(set(layout.finished_shards(config.output)) & set(work.shards))
        sound = stages.known_sound(config.output, finished, read_verified(config.output))
        stages.account(work, sound, stages.indexed(config.output))


def retry(config: DownloadConfig) -> None:
    """Ask again for what failed for a cause that may pass; the list itself is not needed."""
    if config.is_mirror:
        raise UserError("a mirror has no URLs to ask again for")
    config.again = True
    with only_run(config.output):
        _complete(stages.resume(config))


VERBS: dict[str, Callable[[DownloadConfig], None]] = {
    "": download,
    "prepare": prepare,
    "verify": verify,
    "index": index,
    "report": report,
    "retry": retry,
}


if __name__ == "__main__":
    sys.exit(main())
