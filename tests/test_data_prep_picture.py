"""From bodies of strange bytes to JPEGs: what is turned, what is refused, and what a decoder dies of."""

import io
import ipaddress
import time
import urllib.request
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from web_farm import WebFarm, draw, encoded, with_exif

from data_prep.causes import cause_of
from data_prep.decontaminate import perceptual_hash
from data_prep.guard import GuardedOpener, Limits

with warnings.catch_warnings():
    # img2dataset imports a module of the standard library that is on its way out.
    warnings.simplefilter("ignore")
    from data_prep import picture
    from data_prep.picture import PictureResizer


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        running.warm_up()
        yield running


def fetch(url: str) -> bytes:
    limits = Limits(30.0, 200_000, (ipaddress.ip_network("127.0.0.0/8"),), "tests/1")
    with GuardedOpener(limits).open(urllib.request.Request(url), timeout=30) as body:
        return body.read()


@pytest.fixture(scope="module")
def resizer() -> PictureResizer:
    return PictureResizer(
        most_pixels=2_000_000,
        smallest_side=16,
        largest_aspect_ratio=20,
        image_size=48,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
    )


def resized(resizer: PictureResizer, content: bytes) -> tuple[Image.Image | None, str | None]:
    encoded_picture, width, height, _, _, error = resizer(io.BytesIO(content))
    if error is not None:
        return None, error
    picture = Image.open(io.BytesIO(encoded_picture))
    assert picture.format == "JPEG" and picture.size == (width, height)
    return picture, None


def looks_like(picture: Image.Image | None, original: Image.Image) -> bool:
    assert picture is not None
    wanted = np.asarray(original.convert("RGB").resize(picture.size), np.float32)
    return float(np.abs(np.asarray(picture.convert("RGB"), np.float32) - wanted).mean()) < 12


@pytest.mark.parametrize("path", ["ok/5", "png/5", "webp/5", "gif/5", "cmyk/5", "wrongtype/5"])
def test_kinds_of_pictures(farm: WebFarm, resizer: PictureResizer, path: str) -> None:
    picture, _ = resized(resizer, fetch(farm.url(path)))
    assert picture is not None and picture.size == (72, 48)
    assert looks_like(picture, draw(5))


def test_grey_pictures_of_8_and_16_bits(farm: WebFarm, resizer: PictureResizer) -> None:
    for path in ("grey/5", "deeppng/5"):
        picture, _ = resized(resizer, fetch(farm.url(path)))
        assert looks_like(picture, draw(5).convert("L"))


def test_a_rotated_picture_is_put_upright(farm: WebFarm, resizer: PictureResizer) -> None:
    picture, _ = resized(resizer, fetch(farm.url("rotated/5")))
    assert picture is not None and picture.size == (48, 72)
    assert looks_like(picture, draw(5, (64, 96)))


def test_damaged_exif_turns_what_can_be_turned_and_loses_nothing(farm: WebFarm, resizer: PictureResizer) -> None:
    picture, _ = resized(resizer, fetch(farm.url("badexif/5")))
    assert picture is not None and picture.size == (48, 72)
    assert looks_like(picture, draw(5, (64, 96)))
    assert perceptual_hash(fetch(farm.url("badexif/5")))


@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0\x04\0", b"MM\0*\0\0\0\x08\0\4\x01\x12"]))
def test_no_exif_upsets_a_picture(resizer: PictureResizer, tail: bytes, start: bytes) -> None:
    picture, error = resized(resizer, with_exif(encoded(draw(5)), start + tail))
    assert picture is not None or cause_of(error or "") == "not_an_image"


def test_what_is_behind_a_jpeg_is_not_part_of_it(farm: WebFarm, resizer: PictureResizer) -> None:
    whole = fetch(farm.url("trailing/5"))
    assert looks_like(resized(resizer, whole)[0], draw(5))
    _, error = resized(resizer, whole[: len(encoded(draw(5))) - 2] + b"\xff\xda")
    assert error is not None and cause_of(error) == "truncated"


def test_an_unexpected_error_is_a_state_of_its_row(resizer: PictureResizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "_size_of_plain_jpeg", lambda content: 1 / 0)
    _, error = resized(resizer, encoded(draw(5)))
    assert error is not None and error.startswith("not_an_image: ZeroDivisionError")


def test_transparency_becomes_white(farm: WebFarm, resizer: PictureResizer) -> None:
    picture, _ = resized(resizer, fetch(farm.url("clearpng/5")))
    assert looks_like(picture, Image.new("RGB", (96, 64), "white"))


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("text/1", "not_an_image"),
        ("corrupt/1", "not_an_image"),
        ("unannounced/1", "truncated"),
        ("bomb/1", "too_many_pixels"),
        ("hugejpeg/1", "too_many_pixels"),
        ("scans/1", "too_many_pixels"),
        ("tiny/1", "too_small"),
        ("strip/1", "aspect_ratio"),
    ],
)
def test_pictures_that_are_refused(farm: WebFarm, resizer: PictureResizer, path: str, cause: str) -> None:
    content = fetch(farm.url(path))
    started = time.monotonic()
    _, error = resized(resizer, content)
    assert error is not None and cause_of(error) == cause
    assert time.monotonic() - started < 2


# The quick look at a JPEG's header


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"comment": b"x" * 300}, {"icc_profile": b"x" * 100_000}, {"dpi": (72, 72)}],
    ids=["plain", "progressive", "comment", "profile", "dpi"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_plain_jpeg_is_measured_without_pillow(mode: str, options: dict) -> None:
    content = encoded(draw(1, (97, 61)).convert(mode), **options)
    assert picture._size_of_plain_jpeg(content) == (97, 61)
    for end in range(0, 40):
        assert picture._size_of_plain_jpeg(content[:end]) is None


def test_what_needs_a_closer_look_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (encoded(draw(1), exif=exif), encoded(draw(1), "PNG"), b"\xff\xd8\xff\xda" + b"x" * 50, b""):
        assert picture._size_of_plain_jpeg(content) is None


@given(st.binary(max_size=40))
def test_no_bytes_upset_the_quick_look(tail: bytes) -> None:
    size = picture._size_of_plain_jpeg(b"\xff\xd8\xff" + tail)
    assert size is None or len(size) == 2
