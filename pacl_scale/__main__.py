"""``pacl-scale <verb>``: the same as ``python -m pacl_scale.<verb>``."""

import importlib
import signal
import sys

from pacl_scale.errors import UserError, run_command

VERBS = {
    "train": "train the vision embedder on image-caption pairs",
    "plan": "memory, traffic, time and money of a training, before it is paid for",
    "submit": "queue a training on a Slurm cluster; it saves, requeues and resumes by itself",
    "sweep": "evaluate checkpoints x data sets x protocols, or train a grid, as arrays of Slurm jobs",
    "cache": "encode every picture once and keep its patch tokens beside the tars",
    "evaluate": "zero-shot segmentation, classification and retrieval of a checkpoint",
    "segment": "one picture and some words in, masks out",
    "demo": "a page on this machine: drop a picture, type words, see masks",
    "export": "a checkpoint to hand on, with a model card; or the average of several",
    "report": "one HTML page of a run: curves, scores, pictures with masks",
    "quickstart": "the whole pipeline on this machine (what `make demo` runs)",
}


def main() -> int:
    """Entry point of the console script; returns the exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        # `pacl-scale --help | head` ends quietly.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print("usage: pacl-scale VERB [--help] ...\n\n" + "\n".join(f"  {v:<12}{VERBS[v]}" for v in VERBS))
        return 0
    return run_command(lambda: _run(words[0], words[1:]))


def _run(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}; the verbs are {', '.join(VERBS)}")
    return importlib.import_module(f"pacl_scale.{verb}").main(words)


if __name__ == "__main__":
    sys.exit(main())
