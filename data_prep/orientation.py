"""Which way up a picture is: EXIF's word for it, and the picture turned accordingly."""

import warnings

from PIL import Image

TAG = 0x0112

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by the tag's value; 1, and whatever is not listed, is upright."""


def orientation(picture: Image.Image) -> int:
    """The tag's value, 1 where there is none or EXIF is damaged: cameras and editors write all kinds of it."""
    if "exif" not in picture.info:
        return 1  # getexif() of a PNG without the tag would decode it, to look for one behind its pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is damaged
            value = picture.getexif().get(TAG, 1)
    except Exception:  # struct.error, TypeError, KeyError, ...: Pillow's parser promises nothing
        return 1
    return value if value in TURNS else 1


def upright(picture: Image.Image) -> Image.Image:
    """``picture`` as it is to be looked at. EXIF is not written anew, which fails on what others wrote."""
    turn = TURNS.get(orientation(picture))
    return picture if turn is None else picture.transpose(turn)
