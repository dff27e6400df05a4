"""From a body of strange bytes to a JPEG of the wanted size: img2dataset's resizer behind a look at the header."""

import io
import re
import warnings
from typing import Any

from img2dataset.resizer import Resizer
from PIL import Image, UnidentifiedImageError

from data_prep.causes import FetchError
from data_prep.decontaminate import Excluded
from data_prep.orientation import orientation, upright

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PNG_DEPTH_AT = 24
"""Offset of the bit depth in a PNG: eight bytes of signature, then length, type, width and height of IHDR."""


class PictureResizer(Resizer):
    """Decides from the header alone whether a body is decoded, so that a bomb never unfolds.

    Also mends what OpenCV's decoder gets wrong: it ignores EXIF's orientation (and the tag is lost with the
    re-encoding, so the picture would lie on its side for good), it turns 16-bit pictures white, and it pads the
    missing part of a truncated JPEG with grey.

    Args:
        most_pixels: largest number of pixels that is decoded.
        smallest_side: least width and height of a picture that is kept.
        largest_aspect_ratio: of the longer to the shorter side.
        excluded: pictures that are refused.
        options: those of img2dataset's Resizer.
    """

    def __init__(
        self,
        most_pixels: int,
        smallest_side: int,
        largest_aspect_ratio: float,
        excluded: Excluded | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._excluded = excluded
        self._most_pixels = most_pixels
        self._smallest_side = smallest_side
        self._largest_aspect_ratio = largest_aspect_ratio

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """Returns img2dataset's six values: JPEG, width, height, original width and height, error or None."""
        try:
            img_stream.seek(0)
            picture = self._checked(img_stream.read())
        except FetchError as error:
            return None, None, None, None, None, str(error)
        except Exception as error:
            # img2dataset would lose the row of an error that leaves here, and with it the whole shard.
            return None, None, None, None, None, f"not_an_image: {type(error).__name__} {error}"
        *result, error_message = super().__call__(picture, blurring_bbox_list)
        if error_message is not None:
            error_message = f"not_an_image: {error_message}"
        return *result, error_message

    def _checked(self, content: bytes) -> io.BytesIO:
        """The picture, upright and in 8 bits; raises FetchError for one that must not be decoded."""
        size = _size_of_plain_jpeg(content)
        if size is not None:
            self._check_size(*size)
            _check_scans(content, *size)
            if self._excluded is not None:
                self._excluded.check(content)
            return io.BytesIO(content)
        try:
            with warnings.catch_warnings():
                # Of size, where the limit below is the caller's own and nothing is decoded before it, and of EXIF.
                warnings.simplefilter("ignore")
                picture = Image.open(io.BytesIO(content), formats=FORMATS)
            with picture:
                self._check_size(*picture.size)
                if picture.format in ("JPEG", "MPO"):
                    _check_scans(content, *picture.size)
                deep = picture.format == "PNG" and content[PNG_DEPTH_AT] == 16
                turned = orientation(picture) != 1
                if self._excluded is not None:
                    self._excluded.check(content)
                if deep or turned:
                    return _redrawn(picture)
        except Image.DecompressionBombError as error:
            raise FetchError("too_many_pixels", str(error)) from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
            raise FetchError("not_an_image", f"{type(error).__name__}, it begins {content[:16]!r}") from error
        return io.BytesIO(content)

    def _check_size(self, width: int, height: int) -> None:
        size = f"{width} x {height}"
        if width * height > self._most_pixels:
            raise FetchError("too_many_pixels", size)
        if min(width, height) < self._smallest_side:
            raise FetchError("too_small", size)
        if max(width, height) > self._largest_aspect_ratio * min(width, height):
            raise FetchError("aspect_ratio", size)


def _size_of_plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that needs no mending; ``None`` for whatever needs a closer look.

    Most of the web is this. Walking over its segments takes a tenth of Pillow's look at it, and unlike a call of
    libjpeg it does not let go of the interpreter, which a process of many threads gets back late.
    """
    if not content.startswith(b"\xff\xd8"):
        return None
    at = 2
    while content[at : at + 1] == b"\xff" and at + 9 <= len(content):
        kind = content[at + 1]
        if kind in _FRAMES:
            return int.from_bytes(content[at + 7 : at + 9], "big"), int.from_bytes(content[at + 5 : at + 7], "big")
        if kind not in _SEGMENTS:
            return None
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a frame's header, which tells the size."""

_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}) - {0xE1}
"""Markers that may come before it: tables, comments and applications' data, but not EXIF's, which may say "turn me"."""


MOST_SCANS = 100
"""A progressive JPEG comes in about ten; each of them is a pass over all its pixels, and may be 50 bytes long."""

MOST_SCANNED_PIXELS = 2_000_000_000
"""Pixels times scans: about four seconds of decoding."""

_END, _SCAN = b"\xff\xd9", b"\xff\xda"
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""Whatever follows 0xFF but for fill bytes and what belongs to a scan: an escaped 0xFF, restart markers."""


def _check_scans(content: bytes, width: int, height: int) -> None:
    """Raise FetchError for a JPEG without an end, or one that takes too many passes to decode."""
    most = min(MOST_SCANS, MOST_SCANNED_PIXELS // max(width * height, 1))
    if content.endswith(_END) and content.count(_SCAN) <= most:
        return  # nearly all; the walk below takes longer
    at, scans = 2, 0
    while (marker := _MARKER.search(content, at)) and marker[0] != _END:
        scans += marker[0] == _SCAN
        if scans > most:
            raise FetchError("too_many_pixels", f"{width} x {height} in more than {most} scans")
        # Only a second start and TEM have no length.
        alone = marker[0] in (b"\xff\xd8", b"\xff\x01")
        at = marker.end() + (0 if alone else max(int.from_bytes(content[marker.end() : marker.end() + 2], "big"), 2))
    if marker is None:
        raise FetchError("truncated", "the JPEG has no end")


def _redrawn(picture: Image.Image) -> io.BytesIO:
    """The same picture upright, on white, in 8 bits, as a BMP (the next decoder's cheapest format)."""
    turned = upright(picture)
    if turned.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips instead of scaling.
        turned = turned.convert("I").point(lambda value: value / 256).convert("L")
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        layer = turned.convert("RGBA")
        turned = Image.new("RGB", layer.size, "white")
        turned.paste(layer, mask=layer)
    stream = io.BytesIO()
    turned.convert("RGB").save(stream, "BMP")
    stream.seek(0)
    return stream
