"""A URL list of the drawn pictures as such lists are in the wild: some links are dead, some lead elsewhere."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pacl_scale.quickstart.scenes import Manifest
from pacl_scale.quickstart.web import GONE_FOLDER, PAGE_FOLDER


@dataclass(frozen=True)
class UrlFaults:
    """How many lines of the list, beside the good ones, are of which kind."""

    missing: int = 24
    """Links to pictures that never were (404)."""

    gone: int = 8
    """Links to pictures that were taken away (410)."""

    pages: int = 12
    """Links that end in ``.jpg`` and lead to a web page."""

    duplicates: int = 16
    """Lines that occur twice."""

    def __post_init__(self) -> None:
        if min(self.missing, self.gone, self.pages, self.duplicates) < 0:
            raise ValueError("the numbers of faulty lines cannot be negative")


def write_url_list(
    manifest: Manifest, base_url: str, path: str | Path, faults: UrlFaults | None = None, seed: int = 0
) -> int:
    """Write a list in CC3M's layout, a caption and a URL per line with a tab between, and no header.

    Args:
        manifest: whose training pictures are named.
        base_url: where a :class:`~pacl_scale.quickstart.web.PictureServer` serves its training directory.
        path: the file to write.
        faults: faulty lines; they carry captions of the set, as a dead link's caption tells nothing.
        seed: of the order of the lines.

    Returns:
        The number of lines.
    """
    faults = faults or UrlFaults()
    rng = np.random.default_rng(seed)
    captions = [scene.captions[0] for scene in manifest.train]
    lines = [f"{scene.captions[0]}\t{base_url}/{scene.name}" for scene in manifest.train]
    again = rng.choice(len(lines), min(faults.duplicates, len(lines)), replace=False)
    lines += [lines[number] for number in again]
    for folder, count in (("missing", faults.missing), (GONE_FOLDER, faults.gone), (PAGE_FOLDER, faults.pages)):
        lines += [f"{rng.choice(captions)}\t{base_url}/{folder}/{number:05d}.jpg" for number in range(count)]
    shuffled = [lines[number] for number in rng.permutation(len(lines))]
    Path(path).write_text("".join(f"{line}\n" for line in shuffled), encoding="utf-8")
    return len(shuffled)
