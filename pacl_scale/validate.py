"""Looking on while a run trains: a small evaluation every so many steps, pictures drawn, the best checkpoint kept.

The main rank measures, with the same code as ``python -m pacl_scale.evaluate``, while the others wait: keep the data
sets small. ``<run>/evals/<step>/`` gets rows and drawings, ``validation.jsonl`` a line, ``<checkpoints>/best.json``
says which step was best.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacl_scale import log, storage
from pacl_scale.encoders import TextEncoder, VisionEncoder, build_text, build_vision
from pacl_scale.evaluate.captioned import CaptionedConfig, open_captioned
from pacl_scale.evaluate.examples import write_examples
from pacl_scale.evaluate.methods import PACL, Method, Towers
from pacl_scale.evaluate.pictures import AnnotatedConfig, open_annotated
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.evaluate.retrieval import RANKS, evaluate_retrieval
from pacl_scale.evaluate.rows import write_row
from pacl_scale.evaluate.segmentation import evaluate_segmentation
from pacl_scale.loss import LossConfig
from pacl_scale.metrics import MetricsFile
from pacl_scale.model import EMBEDDER, build_embedder
from pacl_scale.unfreeze import UnfreezeConfig, named, trained_towers

logger = log.get_logger("pacl_scale.validate")

BEST = "best.json"


@dataclass
class ValidateConfig:
    """A small evaluation while training goes on."""

    every_steps: int | None = None
    """Steps between evaluations (and one after the last step); null evaluates never."""

    segmentation: AnnotatedConfig | None = None
    """A few annotated pictures; set `limit`."""

    retrieval: CaptionedConfig | None = None
    """Held-out captioned pictures; set `limit`."""

    protocol: Protocol = field(default_factory=Protocol)
    """How segmentation is measured."""

    examples: int = 2
    """So many best, median and worst pictures of the segmentation are drawn."""

    best_by: str | None = None
    """Figure whose best checkpoint is kept for good: "miou", "image_to_text_R@1", "text_to_image_R@10", ...; null takes
    miou where there is segmentation, else the recall of pictures by texts at 1."""

    batch_size: int = 16
    """Pictures that pass the vision tower together."""

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            if self.every_steps < 1:
                raise ValueError("validate.every_steps must be at least 1, or null")
            if not self.segmentation and not self.retrieval:
                raise ValueError("validate.every_steps needs validate.segmentation or validate.retrieval")
            if self.figure not in self.figures:
                raise ValueError(f"validate.best_by: there is no {self.figure}; there are {', '.join(self.figures)}")
        if self.batch_size < 1 or self.examples < 0:
            raise ValueError("validate.batch_size must be at least 1, validate.examples not negative")

    def due(self, step: int, last: bool) -> bool:
        """Whether to evaluate after this step."""
        return self.every_steps is not None and (last or step % self.every_steps == 0)

    @property
    def figures(self) -> list[str]:
        """What is measured and can be compared by."""
        recalls = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in RANKS]
        return (["miou"] if self.segmentation else []) + (recalls if self.retrieval else [])

    @property
    def figure(self) -> str:
        """What checkpoints are compared by."""
        return self.best_by or ("miou" if self.segmentation else "text_to_image_R@1")


class Validation:
    """The data sets, towers and best step of a run; made by the main rank.

    Args:
        config: what and how often.
        towers: configurations ``vision`` and ``text`` of the run, for those that training itself does not hold.
        vision, text: the encoders that training holds, if any.
        unfreeze: what of them is trained.
        run: the run directory.
        folder: where checkpoints lie.
        device, dtype: where and in which type towers compute.
        begun: steps taken before this attempt.

    Raises:
        UserError: a data set or a tower cannot be had, or is of another kind than the one trained on.
    """

    def __init__(
        self,
        config: ValidateConfig,
        towers: dict[str, Any],
        vision: VisionEncoder | None,
        text: TextEncoder | None,
        unfreeze: UnfreezeConfig,
        run: Path,
        folder: str,
        device: torch.device,
        dtype: torch.dtype,
        begun: int,
    ) -> None:
        self.config, self._unfreeze, self._run, self._folder = config, unfreeze, run, folder
        self._lines = MetricsFile(run / "validation.jsonl", begun)
        self._annotated = open_annotated(config.segmentation) if config.segmentation else None
        self._captioned = open_captioned(config.retrieval) if config.retrieval else None
        vision = vision or build_vision(towers["vision"], device, dtype)
        text = text or build_text(towers["text"], device, dtype)
        self._towers = Towers(vision, text, device)
        self.best_step, self.best_value = _read_best(folder, config.figure)

    def measure(
        self, step: int, weights: dict[str, Tensor], widths: tuple[int, int], model: Any, loss: LossConfig
    ) -> dict[str, float]:
        """Evaluate float32 ``weights`` by parameter name, write what came out, and return the figures.

        Args:
            step: optimizer steps taken.
            weights: of the trainable module, as a checkpoint holds them.
            widths: of the vision tower's tokens and of text vectors.
            model: the embedder's configuration.
            loss: attention scale and pooling.
        """
        # Building an embedder draws weights; training's random numbers go on as if nothing had been built.
        with torch.random.fork_rng(devices=[]):
            embedder = build_embedder(model, *widths)
            held = self._towers
            vision, text = trained_towers(self._unfreeze, held.vision, held.text, weights, str(self._run), held.device)
        towers = replace(held, vision=vision, text=text)
        embedder.load_state_dict(named(weights, EMBEDDER))
        embedder.requires_grad_(False).eval().to(towers.device)
        method = Method(PACL, embedder, loss.attention_scale, loss.pooling, {"step": step, "path": str(self._run)})
        output = str(self._run / "evals" / f"{step:08d}")
        figures: dict[str, float] = {}
        size = self.config.batch_size
        if self._annotated:
            (row,) = evaluate_segmentation(
                "validation", self._annotated, towers, [method], self.config.protocol, size, controls=()
            )
            write_row(output, row)
            if self.config.examples:
                examples = self.config.examples
                write_examples(output, [row], self._annotated, towers, [method], self.config.protocol, examples)
            figures["miou"] = row.scores["miou"]
        if self._captioned:
            (row,) = evaluate_retrieval("validation_captions", self._captioned, towers, [method], size)
            write_row(output, row)
            for way in ("image_to_text", "text_to_image"):
                figures |= {f"{way}_{name}": value for name, value in row.scores[way].items()}
        self._lines.write({"step": step, **figures})
        logger.info("validated", step=step, **{name: round(value, 4) for name, value in figures.items()})
        return figures

    def is_best(self, step: int, figures: dict[str, float]) -> bool:
        """Whether these are the best figures so far; remembers them."""
        value = figures[self.config.figure]
        if self.best_value is not None and value <= self.best_value:
            return False
        self.best_step, self.best_value = step, value
        return True

    def note_best(self) -> Callable[[], None]:
        """What writes down which checkpoint is the best now; to be called when that one is written."""
        note = {"step": self.best_step, "figure": self.config.figure, "value": self.best_value}
        url, content = storage.join(self._folder, BEST), json.dumps(note).encode()
        return lambda: storage.patiently(storage.write_bytes, url, content)


def _read_best(folder: str, figure: str) -> tuple[int | None, float | None]:
    """What an earlier attempt noted, if it was about the same figure."""
    url = storage.join(folder, BEST)
    if not storage.exists(url):
        return None, None
    note = json.loads(storage.read_bytes(url))
    return (int(note["step"]), float(note["value"])) if note.get("figure") == figure else (None, None)
