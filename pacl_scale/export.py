"""A checkpoint to hand on: ``python -m pacl_scale.export runs/paper_b16 --output pacl-b16``.

The folder holds the embedder's weights (safetensors), what they need to be used, and a model card; no optimizer
state, no paths of the run. Every command takes it as ``--checkpoint``, and :func:`pacl_scale.load` as its argument.
Several checkpoints are averaged, weight by weight.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacl_scale import checkpoint, config, log, storage
from pacl_scale.errors import UserError, first_line, run_command
from pacl_scale.evaluate.command import columns
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.pages import templates

PROG = "python -m pacl_scale.export"
CARD = "README.md"
KEPT = ("vision", "text", "embedder", "unfreeze", "loss", "optim", "engine", "steps", "global_batch_size", "seed")
"""Sections of the configuration that go along; the others say where things lay."""

MUST_AGREE = ("vision", "text", "embedder", "unfreeze", "loss")
"""Sections that averaged checkpoints must share."""

logger = log.get_logger("pacl_scale.export")


@dataclass
class ExportConfig:
    """Write a checkpoint, or the average of several, as a folder to hand on, with a model card."""

    output: str
    """Folder to write: a path or any fsspec URL."""

    name: str | None = None
    """Title of the model card; not given, the last part of `output`."""

    license: str | None = None
    """License named in the card's header; not given, none is named."""

    push: str | None = None
    """Hugging Face repository (`org/name`) to upload the folder to; needs a local `output` and a token in the
    environment (HF_TOKEN)."""

    def __post_init__(self) -> None:
        if self.push and not storage.is_local(self.output):
            raise ValueError("push needs a local output")


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``export``. Returns 0; raises :class:`pacl_scale.errors.UserError` for a user's mistake."""
    positionals: list[tuple[str, dict[str, Any]]] = [
        ("checkpoints", {"nargs": "+", "metavar": "checkpoint", "help": "Runs or checkpoints; several are averaged."}),
    ]
    settings, given = config.parse(ExportConfig, argv, PROG, positionals)
    log.configure()
    export(given["checkpoints"], settings)
    if settings.push:
        push(settings.output, settings.push)
    print(settings.output)
    return 0


def export(paths: Sequence[str], settings: ExportConfig) -> None:
    """Write the folder. ``paths`` are runs or checkpoints; a run's evaluations fill the card.

    Raises:
        UserError: no checkpoint, a damaged one, or several that do not belong together.
    """
    folders = [checkpoint.resolve(path) for path in paths]
    states = [checkpoint.read_state(folder) for folder in folders]
    weights = average([checkpoint.read_weights(*pair) for pair in zip(folders, states, strict=True)], paths)
    first = states[0]
    for path, state in zip(paths, states, strict=True):
        odd = [key for key in MUST_AGREE if state["config"].get(key) != first["config"].get(key)]
        if odd or state["towers"] != first["towers"]:
            raise UserError(f"{path} and {paths[0]} cannot be averaged: {', '.join(odd) or 'their towers'} differ")
    info = {key: first[key] for key in ("width_in", "width_out", "towers")}
    info |= {"step": max(state["step"] for state in states), "revision": first.get("revision", "unknown")}
    info["config"] = {key: first["config"][key] for key in KEPT if key in first["config"]}
    info["averaged"] = [state["step"] for state in states]
    checkpoint.save_weights(settings.output, weights, info)
    card = model_card(settings, info, weights, first.get("data", {}), _figures(paths) if len(paths) == 1 else [])
    storage.write_bytes(storage.join(settings.output, CARD), card.encode())
    logger.info("exported", output=settings.output, checkpoints=len(paths), step=info["step"])


def average(weights: Sequence[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each tensor over several models, summed in float64.

    Raises:
        UserError: ``names[i]`` has other tensors than ``names[0]``.
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.items()} for model in weights]
    for name, found in zip(names, shapes, strict=True):
        if found != shapes[0]:
            raise UserError(f"{name} and {names[0]} cannot be averaged: their tensors differ")
    if len(weights) == 1:
        return weights[0]
    return {
        name: torch.stack([model[name].double() for model in weights]).mean(0).to(tensor.dtype)
        for name, tensor in weights[0].items()
    }


def model_card(
    settings: ExportConfig,
    info: dict[str, Any],
    weights: dict[str, Tensor],
    data: dict[str, Any],
    figures: list[dict[str, Any]],
) -> str:
    """The card as Markdown: what it is, how to use it, recipe, and the figures of the run's evaluations."""
    return (
        templates(html=False)
        .get_template("model_card.md.j2")
        .render(
            name=settings.name or settings.output.rstrip("/").rsplit("/", 1)[-1],
            license=settings.license,
            output=settings.push or settings.output,
            info=info,
            parameters=sum(tensor.numel() for tensor in weights.values()),
            position=data.get("position"),
            figures=figures,
        )
    )


def push(folder: str, repository: str) -> None:
    """Upload ``folder`` to ``repository`` on the Hugging Face Hub.

    Raises:
        UserError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise UserError(
            f"{folder} was written, but could not be uploaded to {repository}: {first_line(error)}"
        ) from error


def _figures(paths: Sequence[str]) -> list[dict[str, Any]]:
    rows = read_rows(paths[0])
    return [
        {
            "data_set": row.data_set,
            "protocol": row.protocol["name"],
            "method": row.method,
            "pictures": row.pictures,
            "scores": {name: value for name, value in columns(row).items() if value is not None},
        }
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
