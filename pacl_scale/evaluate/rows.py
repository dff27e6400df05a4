"""One row of figures: a method on a data set under a protocol, with everything needed to get it again."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import nn

from pacl_scale import checkpoint, storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate.methods import Method, Towers

VERSION = 2
FOLDER = "evals"
"""Folder of the rows below a run directory."""

PACKAGES = ("pacl-scale", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "pillow", "numpy")
"""Packages whose versions a row records: they resize, tokenize and compute."""


def software() -> dict[str, str]:
    """Package to its version, for the rows."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class Row:
    """A cell of the table; written as ``<run>/evals/<data_set>-<protocol>-<key>-<method>.json``."""

    task: str
    """"segmentation", "classification" or "retrieval"."""
    data_set: str
    protocol: dict[str, Any]
    """Every setting, resolved: what a configuration leaves to the tower stands here as a number."""
    method: str
    checkpoint: dict[str, Any]
    towers: dict[str, Any]
    pictures: int
    scores: dict[str, Any]
    """The figures. Segmentation: miou, pixel_accuracy, mean_class_accuracy, miou_per_picture, boundary_iou,
    patch_accuracy, intervals, groups, per_class, and foreground where background is a class.
    Classification: top1, top5, mean_per_class, intervals, per_class, most_confused.
    Retrieval: image_to_text and text_to_image with R@k, intervals."""
    per_picture: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scores of each picture by its name, rounded to 6 digits."""
    confusion: list[list[int]] | None = None
    """Pixels by true class (row) and predicted class (column), in mask order; rows of runs over parts of a data
    set may be added."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data set's layout, split, classes with their words, special mask values; how many pictures the split has
    ("of"), and a digest of the names of those that were measured."""
    seconds: float = 0.0
    """Wall clock of the pass that gave this row (methods evaluated together share one pass)."""
    software: dict[str, str] = field(default_factory=software)
    """Versions of what resizes, tokenizes and computes."""
    version: int = VERSION

    @property
    def cell(self) -> str:
        """Eight letters for what rows must share to stand in one table: task, data, protocol and towers."""
        return digest([self.task, self.data_set, self.protocol, self.data, self.towers, self.pictures])

    @property
    def name(self) -> str:
        """``<data_set>-<protocol>-<key>``; the key stands for the cell and for where the weights come from."""
        weights = {key: self.checkpoint.get(key) for key in ("path", "step", "seed")}
        return f"{self.data_set}-{self.protocol['name']}-{digest([self.cell, weights])}"

    @property
    def file_name(self) -> str:
        """Name of the row's file."""
        return f"{self.name}-{self.method}.json"


def digest(values: Any) -> str:
    """Eight letters for plain values, the same before and after they were written as JSON."""
    plain = json.loads(json.dumps(values))
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=4).hexdigest()


def checkpoint_of(method: Method) -> dict[str, Any]:
    """Where a method's weights come from, and a digest of them: a path and a step may be trained anew.

    The checkpoint's own checksum counts too, for what it holds beside the embedder: trained parts of the towers.
    """
    modules = [getattr(method, f.name) for f in dataclasses.fields(method)]
    total = hashlib.sha256()
    for module in modules:
        if isinstance(module, nn.Module):
            for name, tensor in sorted(module.state_dict().items()):
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    path = str(method.checkpoint.get("path", ""))
    if path and storage.exists(storage.join(path, checkpoint.STATE)):
        total.update(checkpoint.read_state(path)["sha256"].get(checkpoint.MODEL, "").encode())
    has_weights = any(isinstance(module, nn.Module) and module.state_dict() for module in modules)
    return method.checkpoint | ({"weights": total.hexdigest()[:16]} if has_weights else {})


def towers_of(towers: Towers) -> dict[str, Any]:
    """The towers' configuration and what identifies their weights."""
    prints = {"vision": towers.vision.fingerprint(), "text": towers.text.fingerprint()}
    return towers.config | {"fingerprints": prints}


def by_cell(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that may stand in one table together, in the order in which they come."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row)
    return list(cells.values())


def write_row(run: str, row: Row) -> str:
    """Write ``row`` below the run directory, atomically; returns its address."""
    address = storage.join(run, FOLDER, row.file_name)
    storage.write_bytes(address, (json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n").encode())
    return address


def read_rows(run: str) -> list[Row]:
    """All rows below a run directory, in the order of their file names; none if there is no such folder.

    Raises:
        UserError: a file there is no row.
    """
    folder = storage.join(run, FOLDER)
    if not storage.exists(folder):
        return []
    files, path = storage.filesystem(folder)
    with storage.explained(folder):
        addresses = sorted(address for address in files.ls(path, detail=False) if address.endswith(".json"))
        contents = [files.cat_file(address) for address in addresses]
    rows = []
    for address, content in zip(addresses, contents, strict=True):
        try:
            row = Row(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise UserError(f"{address} is no row of an evaluation; move it away") from error
        if row.version != VERSION:
            raise UserError(f"{address} was written by another version; move it away and evaluate again")
        rows.append(row)
    return rows
