"""One row of figures: a method on a data set under a protocol, with everything needed to get it again."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pacl_scale import storage
from pacl_scale.errors import UserError

VERSION = 1
FOLDER = "evals"
"""Folder of the rows below a run directory."""


@dataclass
class Row:
    """A cell of the table; written as ``<run>/evals/<data_set>-<protocol>-<method>.json``."""

    task: str
    """"segmentation", "classification" or "retrieval"."""
    data_set: str
    protocol: dict[str, Any]
    method: str
    checkpoint: dict[str, Any]
    towers: dict[str, Any]
    pictures: int
    scores: dict[str, Any]
    """The figures. Segmentation: miou, pixel_accuracy, mean_class_accuracy, miou_per_picture, boundary_iou,
    patch_accuracy, intervals, groups, per_class, and foreground where background is a class.
    Classification: top1, top5, mean_per_class, intervals, per_class.
    Retrieval: image_to_text and text_to_image with R@k."""
    per_picture: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scores of each picture by its name, rounded to 6 digits."""
    confusion: list[list[int]] | None = None
    """Pixels by true class (row) and predicted class (column), in mask order; rows of runs over parts of a data
    set may be added."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data set's layout, split and special mask values; how many pictures the split has ("of")."""
    seconds: float = 0.0
    """Wall clock of the pass that gave this row (methods evaluated together share one pass)."""
    version: int = VERSION

    @property
    def file_name(self) -> str:
        """Name of the row's file."""
        return f"{self.data_set}-{self.protocol['name']}-{self.method}.json"


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
            raise UserError(f"{address} was written by another version; evaluate again")
        rows.append(row)
    return rows
