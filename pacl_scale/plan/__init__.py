"""What a training will need, before it is paid for: ``python -m pacl_scale.plan --config FILE --nodes N --gpu NAME``.

``work`` counts arithmetic, ``wire`` bytes between ranks, ``memory`` bytes on a GPU, each as a closed form of the
settings' shapes that tests hold against counters of real runs. ``gpus`` knows machines, ``estimate`` turns counts into
time and money, which rests on assumptions that are settings.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``plan``; see :func:`pacl_scale.plan.command.main`."""
    from pacl_scale.plan.command import main as command

    return command(argv)
