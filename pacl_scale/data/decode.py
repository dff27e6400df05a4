"""Bytes of a picture to the numbers its encoder expects.

JPEGs go through simplejpeg (libjpeg-turbo with Pillow's settings, so Pillow's pixels in two thirds of the time); every
other format, and JPEGs of a kind that simplejpeg refuses, through Pillow. The resize is Pillow's to the last bit, in
the order of open_clip's transform: compiled where numba is installed (:mod:`pacl_scale.data.resize`), else by Pillow.
"""

import functools
import importlib.util
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image

if TYPE_CHECKING:
    from pacl_scale.encoders.vision import Preprocess

MOST_PIXELS = 64 << 20
"""A picture of more pixels (8192 x 8192) is refused before it is decoded: a decompression bomb, or no use
to us."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may open. Its other readers (EPS calls Ghostscript) are no business of web pictures."""

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

SCALED_DECODE_FROM = 4
"""Pictures whose shorter side is at least this many times the encoder's are decoded at a fraction of their
size."""


class BadPicture(Exception):
    """Bytes that give no picture; the message is the cause under which it is counted."""


@dataclass
class PictureConfig:
    """From the bytes of a picture to pixels."""

    exact: bool = False
    """Give the same numbers as open_clip's transform to the last bit for large pictures too, as evaluation always does.
    Otherwise JPEGs of at least 4 times the encoder's size are decoded at a fraction of theirs, in a fraction of the
    time; all others are the same either way."""

    crop_share: float = 1.0
    """Smallest share of the centre square's area that a random crop keeps; 1 crops the centre as the
    encoder was trained with. Any other value draws square crops anywhere in the picture, from (seed, epoch,
    key)."""

    flip: bool = False
    """Mirror half of the pictures, drawn from (seed, epoch, key). Captions that say left or right become
    wrong."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share is a share above 0 and up to 1, not {self.crop_share}")

    @property
    def augments(self) -> bool:
        """Whether anything is drawn."""
        return self.flip or self.crop_share < 1


def decode(
    content: bytes | memoryview, preprocess: "Preprocess", config: PictureConfig, draws: list[float] | None
) -> np.ndarray:
    """The picture, resized and cropped.

    Args:
        content: an encoded picture from anywhere; not trusted.
        preprocess: the encoder's.
        config: how to decode and augment.
        draws: four numbers in [0, 1) that decide the augmentation; None does not augment.

    Returns:
        (image_size, image_size, 3) uint8 RGB; a view of any strides.

    Raises:
        BadPicture: not a picture, cut short, too large, or so thin that it would be when it is resized.
    """
    pixels = _read_jpeg(content, preprocess.image_size, config.exact) if content[:3] == b"\xff\xd8\xff" else None
    pixels = _read_any(content) if pixels is None else pixels
    size = preprocess.image_size
    height, width = size, size
    if draws is not None and config.crop_share < 1:
        pixels = _random_square(pixels, config.crop_share, draws)
    elif preprocess.resize == "shortest":
        height, width = _shortest_size(pixels.shape[0], pixels.shape[1], size)
    # The centre, placed as torchvision's CenterCrop does.
    top, left = round((height - size) / 2), round((width - size) / 2)
    if pixels.shape[:2] == (height, width):
        pixels = pixels[top : top + size, left : left + size]
    else:
        pixels = resizer()(pixels, height, width, top, left, size, preprocess.interpolation)
    return pixels[:, ::-1] if draws is not None and config.flip and draws[3] < 0.5 else pixels


def normalise(pixels_HWC: np.ndarray, preprocess: "Preprocess", out_CHW: np.ndarray) -> None:
    """Write pixels as the numbers that the encoder expects, float32.

    In NumPy, because PyTorch would start threads of its own in every decode thread for arrays of this size.
    """
    out_CHW[...] = pixels_HWC.transpose(2, 0, 1)
    np.divide(out_CHW, np.float32(255), out=out_CHW)
    np.subtract(out_CHW, _per_channel(preprocess.mean), out=out_CHW)
    np.divide(out_CHW, _per_channel(preprocess.std), out=out_CHW)


@functools.cache
def _per_channel(values: tuple[float, float, float]) -> np.ndarray:
    return np.array(values, np.float32)[:, None, None]


def _read_jpeg(content: bytes | memoryview, size: int, exact: bool) -> np.ndarray | None:
    """The picture, or None where simplejpeg cannot say; Pillow then has the last word."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        # At twice the size that is wanted, the filter after it still sees more than it can keep.
        least = 2 * size if not exact and min(width, height) >= SCALED_DECODE_FROM * size else 0
        return simplejpeg.decode_jpeg(content, fastdct=False, fastupsample=False, min_height=least, min_width=least)
    except ValueError:
        return None


def _read_any(content: bytes | memoryview) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(*image.size)
            return np.array(image.convert("RGB"))
    except BadPicture:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadPicture("not a picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPicture("picture too large") from error
    except Exception as error:
        # Pillow's readers raise whatever their parsing runs into: OSError, SyntaxError, struct.error, ...
        raise BadPicture("damaged picture") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BadPicture("picture too large")


Resizer = Callable[[np.ndarray, int, int, int, int, int, str], np.ndarray]


@functools.cache
def resizer() -> Resizer:
    """What resizes pictures here (:func:`pacl_scale.data.resize.resize` or the like), ready to run at once."""
    if importlib.util.find_spec("numba") is None:
        return _resize_with_pillow
    from pacl_scale.data.resize import resize

    # Compiling takes seconds, and loading what was compiled before a part of one.
    resize(np.zeros((4, 4, 3), np.uint8), 8, 8, 0, 0, 8, "bicubic")
    return resize


def _resize_with_pillow(
    pixels_HWC: np.ndarray, height: int, width: int, top: int, left: int, size: int, interpolation: str
) -> np.ndarray:
    """The same as :func:`pacl_scale.data.resize.resize`, where numba is not installed."""
    resized = np.asarray(Image.fromarray(pixels_HWC).resize((width, height), FILTERS[interpolation]))
    return resized[top : top + size, left : left + size]


def _shortest_size(height: int, width: int, target: int) -> tuple[int, int]:
    """Height and width with the shorter side at ``target``, rounded as torchvision's ``Resize`` does.

    Raises BadPicture where the longer one grows beyond all use: a line of a few bytes would take gigabytes.
    """
    longer = int(target * max(height, width) / min(height, width))
    if longer * target > MOST_PIXELS:
        raise BadPicture("picture too thin")
    return (longer, target) if width <= height else (target, longer)


def _random_square(pixels_HWC: np.ndarray, crop_share: float, draws: list[float]) -> np.ndarray:
    """A square anywhere in the picture, of ``crop_share`` to all of the centre square's area."""
    height, width, _ = pixels_HWC.shape
    side = max(1, round(min(height, width) * math.sqrt(crop_share + (1 - crop_share) * draws[0])))
    left, top = round(draws[1] * (width - side)), round(draws[2] * (height - side))
    return pixels_HWC[top : top + side, left : left + side]
