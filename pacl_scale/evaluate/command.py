"""The command: configuration in, rows and examples in the run directory and a table on the terminal out."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pacl_scale import config, log, storage
from pacl_scale.cores import usable_cores
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedConfig, CaptionedPictures, open_captioned
from pacl_scale.evaluate.checks import checked
from pacl_scale.evaluate.classification import Answers, data_of, evaluate_classification, protocol_of
from pacl_scale.evaluate.examples import write_examples
from pacl_scale.evaluate.labelled import LabelledConfig, LabelledPictures, open_labelled
from pacl_scale.evaluate.methods import (
    MAJORITY,
    PACL,
    PATCH_ORACLE,
    TOWER_METHODS,
    UNTRAINED,
    Method,
    Towers,
    choose_device,
    load_methods,
)
from pacl_scale.evaluate.pictures import AnnotatedConfig, AnnotatedPictures, open_annotated
from pacl_scale.evaluate.progress import Progress, folder_for, forget
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.evaluate.retrieval import data_of as captions_of
from pacl_scale.evaluate.retrieval import evaluate_retrieval, retrieval_protocol
from pacl_scale.evaluate.rows import VERSION, Row, by_cell, checkpoint_of, towers_of, write_row
from pacl_scale.evaluate.segmentation import check_segmentation, evaluate_segmentation
from pacl_scale.evaluate.views import recorded

PROG = "python -m pacl_scale.evaluate"


@dataclass
class EvaluateConfig:
    """Zero-shot segmentation, classification and retrieval of checkpoints and controls on one pass of their towers."""

    checkpoint: str | None = None
    """Run directory or checkpoint of the method `pacl`; the same as `methods.pacl`, and wins over it."""

    methods: dict[str, str] = field(default_factory=dict)
    """Method name to run directory or checkpoint, e.g. `{pacl: runs/a, mean_pooled: runs/b}`. All must have been
    trained on the same towers. `pacl`, or else the first, is the one that examples are chosen by."""

    controls: list[Literal["untrained", "clip", "maskclip", "value_path", "majority_class", "patch_oracle"]] = field(
        default_factory=lambda: [UNTRAINED, MAJORITY, PATCH_ORACLE]  # type: ignore[list-item]
    )
    """untrained: the main method's architecture with random weights. clip: the same towers without PACL. maskclip: the
    value path of their last layer (both need open_clip towers of one model). value_path: the main method on that path;
    any plain transformer. majority_class: the data set's most frequent true class everywhere. patch_oracle: the true
    majority class of each patch, the patch grid's upper bound."""

    untrained_seed: int = 0
    """Seed of the random weights of `untrained`."""

    segmentation: dict[str, AnnotatedConfig] = field(default_factory=dict)
    """Name to annotated pictures; override one key with e.g. `segmentation.voc_annotated.root=FOLDER`."""

    retrieval: dict[str, CaptionedConfig] = field(default_factory=dict)
    """Name to captioned pictures."""

    classification: dict[str, LabelledConfig] = field(default_factory=dict)
    """Name to labelled pictures."""

    check_data: bool = False
    """Measure nothing: read every file of every data set, count, and list what is wrong."""

    part: int = 0
    """Number of this process, from 0, where several share the data sets; e.g. `part=$SLURM_ARRAY_TASK_ID`."""

    parts: int = 1
    """So many processes share each data set; the one that finishes last writes the rows."""

    protocol: Protocol = field(default_factory=Protocol)
    """How segmentation is measured; part of every row."""

    output: str | None = None
    """Run directory that gets `evals/`; not given, the main method's own."""

    examples: int = 3
    """So many best, median and worst pictures of each segmentation data set are drawn; 0 draws none."""

    batch_size: int = 16
    """Pictures that pass the vision tower together."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of the towers; embedder and scores are float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is a GPU."""

    threads: int = 0
    """CPU threads of torch; 0 takes all cores of the process."""

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            self.methods = {**self.methods, PACL: self.checkpoint}
        if not self.methods and not self.check_data:
            raise ValueError("name a checkpoint (--checkpoint RUN) or methods")
        if taken := sorted({UNTRAINED, MAJORITY, PATCH_ORACLE, *TOWER_METHODS} & set(self.methods)):
            raise ValueError(f"methods: {', '.join(taken)} is the name of a control")
        sets = [*self.segmentation, *self.retrieval, *self.classification]
        for name in [*self.methods, *sets]:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"{name!r}: names may hold letters, digits, '_' and '.' only, as they name files")
        if both := sorted(name for name in set(sets) if sets.count(name) > 1):
            raise ValueError(f"two tasks have a data set {both[0]!r}; results of one name would overwrite each other")
        if not 0 <= self.part < self.parts:
            raise ValueError("part counts from 0 and must be below parts")
        if self.batch_size < 1 or self.examples < 0 or self.threads < 0:
            raise ValueError("batch_size must be at least 1, examples and threads not negative")


def run(argv: Sequence[str] | None) -> int:
    """Parse, evaluate, print; returns 0."""
    settings: EvaluateConfig = config.parse(EvaluateConfig, argv, PROG)
    if not settings.segmentation and not settings.retrieval and not settings.classification:
        # Not refused by the configuration itself: a file may hold a protocol alone.
        raise UserError(
            f"name a data set under segmentation, retrieval or classification, see configs/eval ({PROG} --help)"
        )
    log.configure()
    if settings.check_data:
        sentences, wrong = checked(settings.segmentation, settings.classification, settings.retrieval)
        print("\n".join(sentences))
        if wrong:
            raise UserError(f"{wrong} of {len(sentences)} data sets cannot be used as they are; see above")
        return 0
    if settings.parts > 1:
        log.get_logger(__name__).info(f"counts part {settings.part} of {settings.parts}")
    rows = evaluate(settings)
    print(table(rows) if rows else f"part {settings.part} of {settings.parts} is done; the last part writes the rows")
    return 0


def evaluate(settings: EvaluateConfig) -> list[Row]:
    """Measure all methods and controls on all data sets; rows and examples are written under the output.

    Raises:
        UserError: a checkpoint or a data set is missing or of the wrong kind.
    """
    annotated = {name: open_annotated(data) for name, data in settings.segmentation.items()}
    captioned = {name: open_captioned(data) for name, data in settings.retrieval.items()}
    labelled = {name: open_labelled(data) for name, data in settings.classification.items()}
    main = PACL if PACL in settings.methods else next(iter(settings.methods))
    checkpoints = {main: settings.methods[main], **settings.methods}
    device = choose_device(settings.device)
    torch.set_num_threads(settings.threads or usable_cores())
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    seed = settings.untrained_seed if UNTRAINED in settings.controls else None
    beside = [name for name in settings.controls if name in TOWER_METHODS]
    towers, methods = load_methods(checkpoints, seed, device, dtype, beside)
    output = settings.output or run_of(checkpoints[main])
    storage.check_writable(output)
    # Before hours are spent on the first data set, not after.
    for name, data in annotated.items():
        check_segmentation(name, data.classes, towers, settings.protocol)

    rows: list[Row] = []
    for name, data in annotated.items():
        progress = _progress(output, name, data, towers, methods, settings)
        found = evaluate_segmentation(
            name, data, towers, methods, settings.protocol, settings.batch_size, settings.controls, progress
        )
        if found and settings.examples:
            write_examples(output, found, data, towers, methods, settings.protocol, settings.examples)
        for row in found:
            write_row(output, row)
        if found:
            progress.forget()
        rows += found
    for name, pictures in labelled.items():
        rows += _classify(output, name, pictures, towers, methods, settings)
    for name, captions in captioned.items():
        rows += _retrieve(output, name, captions, towers, methods, settings)
    return rows


def _classify(
    output: str,
    name: str,
    data: LabelledPictures,
    towers: Towers,
    methods: Sequence[Method],
    settings: EvaluateConfig,
) -> list[Row]:
    """Measure and write one data set of labelled pictures."""
    asked = settings.classification[name]
    depends_on = {
        "labelled": [name, data_of(data)],
        "protocol": protocol_of(data, asked, towers.vision.preprocess),
    } | _models(towers, methods)
    progress = Progress.open(output, depends_on, settings.part, settings.parts, Answers)
    found = evaluate_classification(
        name, data, asked, towers, methods, settings.batch_size, settings.controls, progress
    )
    for row in found:
        write_row(output, row)
    if found:
        progress.forget()
    return found


def _retrieve(
    output: str,
    name: str,
    data: CaptionedPictures,
    towers: Towers,
    methods: Sequence[Method],
    settings: EvaluateConfig,
) -> list[Row]:
    """Measure and write one data set of captioned pictures."""
    depends_on = {
        "captioned": [name, captions_of(data), data.addresses],
        "protocol": retrieval_protocol(towers.vision.preprocess),
    } | _models(towers, methods)
    folder = folder_for(output, depends_on, settings.parts)
    parts = (settings.part, settings.parts)
    found = evaluate_retrieval(name, data, towers, methods, settings.batch_size, folder, *parts)
    for row in found:
        write_row(output, row)
    if found and folder:
        forget(folder)
    return found


def _progress(
    output: str,
    name: str,
    data: AnnotatedPictures,
    towers: Towers,
    methods: Sequence[Method],
    settings: EvaluateConfig,
) -> Progress:
    """What earlier processes counted under exactly these settings."""
    depends_on = {
        "data_set": name,
        "pairs": data.pairs,
        "classes": data.classes.record(),
        "protocol": recorded(settings.protocol, towers.vision),
        "controls": list(settings.controls),
    } | _models(towers, methods)
    return Progress.open(output, depends_on, settings.part, settings.parts)


def _models(towers: Towers, methods: Sequence[Method]) -> dict[str, Any]:
    """What identifies towers and methods."""
    return {
        "version": VERSION,
        "towers": towers_of(towers),
        "methods": {method.name: checkpoint_of(method) for method in methods},
    }


def run_of(path: str) -> str:
    """The run directory of a checkpoint's path (``<run>/checkpoints/<step>``), or the path itself."""
    parent, name = posixpath.split(path.rstrip("/"))
    if name == "checkpoints":
        return parent or "."
    above, folder = posixpath.split(parent)
    return (above or ".") if folder == "checkpoints" else path


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one block a data set and protocol."""
    blocks = []
    for own in by_cell(rows):
        lines = [["method", *columns(own[0])]] + [[row.method, *map(_cell, columns(row).values())] for row in own]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(_aligned(line, widths)) for line in lines]
        first = own[0]
        head = f"{first.data_set}: {first.pictures} pictures, protocol {first.protocol['name']}, {first.seconds:.0f} s"
        blocks.append("\n".join([head, texts[0], "-" * len(texts[0]), *texts[1:]]))
    return "\n\n".join(blocks)


def columns(row: Row) -> dict[str, float | None]:
    """The figures of a row that a table shows, by heading, as shares."""
    scores = row.scores
    if row.task == "retrieval":
        ways = {"picture to text": scores["image_to_text"], "text to picture": scores["text_to_image"]}
        return {f"{rank} {way}": value for way, recall in ways.items() for rank, value in recall.items()}
    if row.task == "classification":
        return {"top-1": scores["top1"], "top-5": scores["top5"], "mean per class": scores["mean_per_class"]}
    groups = {f"mIoU {name.replace('_', ' ')}": group["miou"] for name, group in scores["groups"].items()}
    return {
        "mIoU": scores["miou"],
        "pixel accuracy": scores["pixel_accuracy"],
        "class accuracy": scores["mean_class_accuracy"],
        "mIoU per picture": scores["miou_per_picture"],
        "boundary IoU": scores.get("boundary_iou"),
        "patch accuracy": scores.get("patch_accuracy"),
        **groups,
    }


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
