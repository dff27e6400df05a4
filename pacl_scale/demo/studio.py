"""What the page does, without the page: pictures in, labels and scores out, one picture at a time.

H x W the picture as it is shown, N words.
"""

import base64
import io
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay
from pacl_scale.evaluate.heat import palette
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.pictures import PICTURE_SUFFIXES, open_picture
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.look import Found, Seen, find, see

SIDE = 1000
"""Longest side in pixels of pictures as they are shown and labelled; the tower sees less than that anyway."""

WORDS = 60
"""Most words of one search."""

LONGEST = 16
"""So many times longer than wide may a picture be: everybody waits while it passes the tower, and a strip of few pixels
would ask for any number of patches."""

LETTERS = 100
"""Most letters of one word."""

EXAMPLES = 8


@dataclass(frozen=True)
class Sheet:
    """One uploaded picture after its pass of the tower."""

    name: str
    picture: Image.Image
    seen: Seen


@dataclass(frozen=True)
class Answer:
    """Where words were found on a sheet."""

    words: list[str]
    """Those with a colour."""
    found: Found
    scores_NHW: np.ndarray
    """Each word's cosines, those of the rest too, at the picture's size."""
    low: float
    high: float
    """Least and largest cosine of a pixel's best word."""

    def labels(self, threshold: float) -> np.ndarray:
        """Position of the best word of each pixel; ``overlay.NOTHING`` below the threshold or where the rest wins."""
        labels_HW = np.where(self.found.best_HW >= threshold, self.found.labels_HW, overlay.NOTHING)
        return np.where(labels_HW < len(self.words), labels_HW, overlay.NOTHING)

    def at(self, x: float, y: float) -> list[tuple[str, float]]:
        """Words and cosines at a pixel, the best first; empty outside the picture."""
        height, width = self.scores_NHW.shape[1:]
        if not (0 <= x < width and 0 <= y < height):
            return []
        scores_N = self.scores_NHW[: len(self.words), int(y), int(x)]
        return [(self.words[n], float(scores_N[n])) for n in np.argsort(-scores_N, kind="stable")]


@dataclass
class Studio:
    """A model that many pages share; it does one thing at a time."""

    towers: Towers
    method: Method
    protocol: Protocol
    most_pixels: int
    examples: list[Path]
    checkpoint: str
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, content: bytes, name: str) -> Sheet:
        """Decode a picture from anywhere and pass it through the tower.

        Raises:
            UserError: it is no picture, is damaged, too large, or far longer than wide.
        """
        picture = ImageOps.exif_transpose(open_picture(content, name, self.most_pixels)).convert("RGB")
        if max(picture.size) > LONGEST * min(picture.size):
            raise UserError(f"{name} is more than {LONGEST} times longer than wide; cut it, please")
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        with self._lock, torch.no_grad():
            return Sheet(name, picture, see(picture, self.towers, self.method, self.protocol))

    def look(self, sheet: Sheet, words: list[str], rest: list[str]) -> Answer:
        """Look for words; those of ``rest`` compete for pixels and get no colour.

        Raises:
            UserError: a word twice, or too many or too long ones.
        """
        asked = [*words, *rest]
        if len(set(asked)) < len(asked):
            twice = next(word for word in asked if asked.count(word) > 1)
            raise UserError(f"“{twice}” is there twice; each word counts once")
        if len(asked) > WORDS or max(map(len, asked), default=0) > LETTERS:
            raise UserError(f"at most {WORDS} words of {LETTERS} letters, please")
        with self._lock:
            found = find(sheet.seen, asked, self.towers, self.protocol)
        size = (sheet.picture.height, sheet.picture.width)
        low, high = float(found.best_HW.min()), float(found.best_HW.max())
        return Answer(list(words), found, found.scores(size), low, high)


def words_in(text: str) -> list[str]:
    """The words of a line, between commas; empty ones and repeats are dropped."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def drawn(sheet: Sheet, answer: Answer | None, threshold: float, opacity: float, word: str | None) -> Image.Image:
    """The picture with masks of all words, or, with ``word``, with how well that word fits each part."""
    if answer is None:
        return sheet.picture
    if word is None or word not in answer.words:
        labels_HW = answer.labels(threshold)
        colours = overlay.colours(len(answer.words))
        return overlay.draw_labels(overlay.blend(sheet.picture, labels_HW, colours, opacity), labels_HW, answer.words)
    scores_HW = answer.scores_NHW[answer.words.index(word)]
    low, high = float(answer.scores_NHW.min()), float(answer.scores_NHW.max())
    shares_HW = (scores_HW - low) / max(high - low, 1e-6)
    heat = Image.fromarray(palette()[(shares_HW * 255).round().astype(np.uint8)])
    return Image.blend(sheet.picture, heat, opacity)


def as_url(picture: Image.Image) -> str:
    """A JPEG that a page can show without asking for it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def examples_in(folder: str | None, run: str) -> list[Path]:
    """Pictures to try: of a folder, or those that an evaluation left in a run on this machine.

    Raises:
        UserError: the folder is not there or holds no picture.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: there is no such folder")
        found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        if not found:
            raise UserError(f"{folder} has no picture")
        return found[:EXAMPLES]
    if not storage.is_local(run):
        return []
    return sorted(Path(run.removeprefix("file://")).glob("evals/*-examples/*.jpg"))[:EXAMPLES]
