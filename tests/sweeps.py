"""Small sweeps for tests: checkpoints on tiny towers of random weights, and pictures that take a moment to measure."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from colours import write_pictures

from pacl_scale import checkpoint, config
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_text, build_vision
from pacl_scale.model import build_embedder
from pacl_scale.sweep import cells
from pacl_scale.sweep.command import SweepConfig, grid_of
from pacl_scale.train import TrainConfig

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def write_runs(folder: Path, names: list[str], steps: tuple[int, ...] = (7,)) -> dict[str, str]:
    """Runs with checkpoints of random embedders; name to run directory."""
    model = folder / "small.json"
    model.write_text(json.dumps(MODEL))
    vision = VisionConfig(model=str(model), weights="random")
    text = TextEncoderConfig(model=str(model), weights="random", batch_size=8)
    with torch.random.fork_rng():
        towers = {"vision": build_vision(vision).fingerprint(), "text": build_text(text).fingerprint()}
        settings = TrainConfig(steps=max(steps), global_batch_size=16, vision=vision, text=text)
        for number, name in enumerate(names):
            for step in steps:
                torch.manual_seed(100 * number + step)
                write_checkpoint(folder / name, step, settings, towers)
    return {name: str(folder / name) for name in names}


def write_checkpoint(run: Path, step: int, settings: TrainConfig, towers: dict[str, Any]) -> None:
    """One checkpoint of a run."""
    embedder = build_embedder(settings.embedder, 64, 8)
    master = {f"embedder.{name}": weight for name, weight in embedder.state_dict().items()}
    info = {"config": config.to_dict(settings), "width_in": 64, "width_out": 8, "data": {}, "towers": towers}
    checkpoint.save(str(run / "checkpoints"), step, {"master": master, "exp_avg": {}, "exp_avg_sq": {}}, info, 10)
    run.joinpath("config.yaml").write_text(config.to_yaml(settings))


def write_data(folder: Path, names: list[str], broken: str | None = None, hanging: str | None = None) -> str:
    """Data sets of two pictures each; returns the evaluation's YAML.

    The one of name ``broken`` has a damaged mask, and who reads the first picture of ``hanging`` waits for ever.
    """
    sets = {}
    for name in names:
        root = write_pictures(folder / "data" / name, count=2)
        sets[name] = {"root": str(root)}
        if name == broken:
            (root / "masks" / "1.png").write_bytes(b"\x89PNG not at all")
        if name == hanging:
            (root / "images" / "0.png").unlink()
            os.mkfifo(root / "images" / "0.png")
    file = folder / "evaluation.yaml"
    settings = {"segmentation": sets, "controls": ["untrained"], "examples": 0, "precision": "fp32", "threads": 1}
    settings["protocol"] = {"name": "fast", "templates": "none", "boundary": 0.0}
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def words_for(folder: Path, runs: dict[str, str], evaluation: str, *more: str) -> list[str]:
    """The words of a sweep over all of these."""
    settings = {"output": str(folder / "sweep"), "checkpoints": runs, "evaluation": [evaluation]}
    settings |= {"poll_seconds": 0.3, "ask_seconds": 2.0, "gpus": 0, "cell_minutes": 1.0}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(settings))
    return ["--config", str(file), *more]


def grid(folder: Path, evaluation: str, runs: dict[str, str], **changes: Any) -> list[cells.Cell]:
    """The cells of a sweep over all of these."""
    settings = SweepConfig(output=str(folder / "sweep"), checkpoints=runs, evaluation=[evaluation], **changes)
    return grid_of(settings, folder / "sweep")[1]


def signal_cell(folder: Path, number: int) -> bool:
    """Send a signal to the process whose output is a cell's log; whether there was one."""
    log = folder / "log.txt"
    found = False
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.readlink(entry / "fd" / "1") == str(log):
                os.kill(int(entry.name), number)
                found = True
        except OSError:
            continue
    return found
