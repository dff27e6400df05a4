"""A picture of how a training scales from one GPU to a thousand."""

from collections.abc import Sequence
from pathlib import Path

from pacl_scale.plan.estimate import Estimate

INKS = {"gpu": "#1b6ca8", "network": "#c8553d", "store": "#3a7d44", "decoding": "#8a5a9e"}


def draw(scaling: Sequence[Estimate], gpu: str, steps: int, path: Path) -> None:
    """Hours of the run, and milliseconds of a step by resource, over the number of GPUs; SVG or PNG by the name."""
    # Imported here: it takes a second that a plan without a picture need not spend.
    import matplotlib
    from matplotlib.figure import Figure

    gpus = [one.gpus for one in scaling]
    with matplotlib.rc_context({"svg.hashsalt": "plan", "font.size": 11}):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        hours, parts = figure.subplots(1, 2)
        best, worst = ([one.seconds[which] * steps / 3600 for one in scaling] for which in (0, 1))
        hours.fill_between(gpus, best, worst, color="#1b6ca8", alpha=0.25, label="best to worst")
        hours.plot(
            gpus, [best[0] * gpus[0] / number for number in gpus], color="#777777", linestyle=":", label="linear"
        )
        hours.set_title(f"hours of {steps:,} steps on {gpu}")
        for name, ink in INKS.items():
            values = [1e3 * sum(one.parts_s[name]) / 2 for one in scaling]
            if any(values):
                parts.plot(gpus, [value or None for value in values], color=ink, label=name, marker="o", markersize=3)
        parts.set_title("ms of a step, each resource alone")
        for axes in (hours, parts):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(gpus, [str(number) for number in gpus], rotation=60)
            axes.set_xlabel("GPUs")
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
