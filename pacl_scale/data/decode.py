"""Bytes of a picture to the tensor its encoder expects, the same as open_clip's own transform gives.

JPEGs go through simplejpeg (libjpeg-turbo with Pillow's settings, so Pillow's pixels in two thirds of the time); every
other format, and JPEGs of a kind that simplejpeg refuses, through Pillow. Resizing is Pillow's, in the order of
open_clip's transform, so that the result is the same to the last bit.
"""

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

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

Box = tuple[float, float, float, float]


class BadPicture(Exception):
    """Bytes that give no picture; the message is the cause under which it is counted."""


@dataclass
class PictureConfig:
    """From the bytes of a picture to pixels."""

    scaled_decoding: bool = True
    """Decode pictures of at least 4 times the encoder's size at a fraction of it, but at least twice the
    encoder's size; several times faster, and not to the last bit what open_clip's transform gives."""

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


def decode(content: bytes, preprocess: "Preprocess", config: PictureConfig, draws: list[float] | None) -> np.ndarray:
    """The picture, resized and cropped.

    Args:
        content: an encoded picture from anywhere; not trusted.
        preprocess: the encoder's.
        config: how to decode and augment.
        draws: four numbers in [0, 1) that decide the augmentation; None does not augment.

    Returns:
        (image_size, image_size, 3) uint8 RGB.

    Raises:
        BadPicture: not a picture, cut short, or too large.
    """
    shrink_to = 2 * preprocess.image_size if config.scaled_decoding else None
    image = _read_jpeg(content, shrink_to) if content[:3] == b"\xff\xd8\xff" else None
    image = _read_any(content) if image is None else image
    size, kernel = preprocess.image_size, FILTERS[preprocess.interpolation]
    if draws is not None and config.crop_share < 1:
        image = image.resize((size, size), kernel, box=_random_box(image.size, config.crop_share, draws))
    elif preprocess.resize == "squash":
        image = image.resize((size, size), kernel)
    else:
        image = _crop_centre(image.resize(_shortest_size(image.size, size), kernel), size)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if draws is not None and config.flip and draws[3] < 0.5 else pixels


def normalise_(images_BCHW: Tensor, preprocess: "Preprocess") -> Tensor:
    """Pixel values 0..255, as float, to what the encoder expects; in place."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return images_BCHW.div_(255).sub_(mean).div_(std)


def _read_jpeg(content: bytes, shrink_to: int | None) -> Image.Image | None:
    """The picture, or None where simplejpeg cannot say; Pillow then has the last word."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        scaled = shrink_to is not None and min(width, height) >= SCALED_DECODE_FROM * (shrink_to // 2)
        least = shrink_to if scaled else 0
        pixels = simplejpeg.decode_jpeg(content, fastdct=False, fastupsample=False, min_height=least, min_width=least)
    except ValueError:
        return None
    return Image.fromarray(pixels)


def _read_any(content: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(*image.size)
            return image.convert("RGB")
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


def _shortest_size(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Width and height with the shorter side at ``target``, rounded as torchvision's ``Resize`` does."""
    width, height = size
    return (target, int(target * height / width)) if width <= height else (int(target * width / height), target)


def _crop_centre(image: Image.Image, target: int) -> Image.Image:
    """The centre square, placed as torchvision's ``CenterCrop`` does."""
    left, top = round((image.width - target) / 2), round((image.height - target) / 2)
    return image.crop((left, top, left + target, top + target))


def _random_box(size: tuple[int, int], crop_share: float, draws: list[float]) -> Box:
    width, height = size
    side = min(width, height) * math.sqrt(crop_share + (1 - crop_share) * draws[0])
    left, top = draws[1] * (width - side), draws[2] * (height - side)
    return (left, top, left + side, top + side)
