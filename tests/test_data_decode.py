"""Pictures become the tensors that open_clip would make of them, and bombs and rubbish are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data_sets import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image

from pacl_scale.data.decode import BadPicture, PictureConfig, _resize_with_pillow, decode, normalise, resizer
from pacl_scale.data.resize import resize
from pacl_scale.encoders.vision import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EXACT = PictureConfig(exact=True)


def smooth(width: int, height: int) -> Image.Image:
    """A picture without noise, whose scaled versions look alike."""
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = [np.sin(across), np.cos(down), np.sin(across + down)]
    return Image.fromarray((127 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(256, 256), (301, 200), (200, 333), (64, 40), (31, 500), (120, 500)])
def test_same_as_open_clip_to_the_last_bit(interpolation: str, resize: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(112, MEAN, STD, interpolation, resize)  # type: ignore[arg-type]
    theirs = image_transform(112, is_train=False, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize)
    for content in (picture(1, *size), picture(2, *size, format="PNG"), encoded(smooth(*size), "WEBP")):
        ours = np.empty((3, 112, 112), np.float32)
        normalise(decode(content, preprocess, EXACT, None), preprocess, ours)
        assert torch.equal(torch.from_numpy(ours), theirs(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 30}])
def test_jpeg_kinds_are_as_pillow_reads_them(mode: str, options: dict[str, int]) -> None:
    content = encoded(smooth(90, 70).convert(mode), **options)
    preprocess = Preprocess(70, MEAN, STD, resize="squash")
    wanted = Image.open(io.BytesIO(content)).convert("RGB").resize((70, 70), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(content, preprocess, EXACT, None), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA", "1", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = smooth(40, 40).convert("L").convert("I;16") if mode == "I;16" else smooth(40, 40).convert(mode)
    assert decode(encoded(image, "PNG"), Preprocess(16, MEAN, STD), EXACT, None).shape == (16, 16, 3)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(0, 150), st.integers(0, 150)),
    st.integers(1, 100),
    st.sampled_from(["bicubic", "bilinear"]),
    st.data(),
)
def test_the_compiled_resize_is_pillows_to_the_last_bit(
    source: tuple[int, int], beyond: tuple[int, int], size: int, interpolation: str, data: st.DataObject
) -> None:
    """Up and down, and any square of the result. Black and white reach furthest beyond 8 bits between the passes."""
    height, width = size + beyond[0], size + beyond[1]
    top, left = (data.draw(st.integers(0, most)) for most in beyond)
    levels = data.draw(st.sampled_from([2, 256]))
    pixels = np.random.default_rng(0).integers(0, levels, (*source, 3), dtype=np.uint8) * (255 // (levels - 1))
    wanted = _resize_with_pillow(pixels, height, width, top, left, size, interpolation)
    assert np.array_equal(resize(pixels, height, width, top, left, size, interpolation), wanted)
    crop = pixels[source[0] // 3 :, source[1] // 3 :]
    wanted = _resize_with_pillow(np.ascontiguousarray(crop), height, width, top, left, size, interpolation)
    assert np.array_equal(resize(crop, height, width, top, left, size, interpolation), wanted)


def test_pillow_resizes_where_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(112, MEAN, STD)
    wanted = decode(picture(0, 200, 333), preprocess, EXACT, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    resizer.cache_clear()
    try:
        assert resizer() is _resize_with_pillow
        assert np.array_equal(decode(picture(0, 200, 333), preprocess, EXACT, None), wanted)
        assert decode(picture(0, 20, 4), preprocess, EXACT, [0, 0, 0, 0]).shape == (112, 112, 3)
    finally:
        resizer.cache_clear()


def test_large_pictures_are_decoded_at_a_fraction_of_their_size() -> None:
    preprocess = Preprocess(32, MEAN, STD)
    noise = picture(0, 400, 300)
    # Noise shows what a smooth picture hides: averaging before the filter is another filter.
    difference = np.abs(
        decode(noise, preprocess, PictureConfig(), None).astype(int) - decode(noise, preprocess, EXACT, None)
    )
    assert difference.max() > 2
    large = encoded(smooth(400, 300), quality=95)
    difference = np.abs(
        decode(large, preprocess, PictureConfig(), None).astype(int) - decode(large, preprocess, EXACT, None)
    )
    assert difference.max() < 8


@pytest.mark.parametrize("config", [PictureConfig(crop_share=0.25), PictureConfig(crop_share=0.25, exact=True)])
def test_crops_follow_the_draws(config: PictureConfig) -> None:
    preprocess = Preprocess(32, MEAN, STD)
    content = encoded(smooth(100, 80), quality=95)
    whole = Image.open(io.BytesIO(content)).convert("RGB")

    def is_crop(draws: list[float], *box: float) -> bool:
        wanted = np.asarray(whole.crop(box).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(decode(content, preprocess, config, draws) - wanted)
        return difference.max() == 0

    assert is_crop([0, 0, 0, 0], 0, 0, 40, 40)
    assert is_crop([1, 1, 1, 0], 20, 0, 100, 80)
    assert is_crop([0, 0.5, 0.5, 0], 30, 20, 70, 60)
    assert not is_crop([0, 0.5, 0.5, 0], 31, 20, 71, 60)


def test_flips_follow_the_draws() -> None:
    preprocess, config = Preprocess(32, MEAN, STD), PictureConfig(flip=True)
    content = encoded(smooth(100, 80))
    straight = decode(content, preprocess, PictureConfig(), None)
    assert np.array_equal(decode(content, preprocess, config, [0, 0, 0, 0.6]), straight)
    assert np.array_equal(decode(content, preprocess, config, [0, 0, 0, 0.4]), straight[:, ::-1])
    assert np.array_equal(decode(content, preprocess, config, None), straight)


def png_bomb() -> bytes:
    """A PNG whose header claims 30,000 x 30,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def jpeg_bomb() -> bytes:
    """A JPEG whose frame header claims 65,000 x 65,000 pixels."""
    content = bytearray(picture(0))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(b"", "not a picture", id="empty"),
        pytest.param(b"<html>gone</html>", "not a picture", id="html"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture", id="postscript"),
        pytest.param(picture(0)[:200], "damaged picture", id="head of a JPEG"),
        pytest.param(picture(0, 64, 64)[:-400], "damaged picture", id="JPEG cut short"),
        pytest.param(picture(0, format="PNG")[:-300], "damaged picture", id="PNG cut short"),
        pytest.param(png_bomb(), "picture too large", id="PNG bomb"),
        pytest.param(jpeg_bomb(), "picture too large", id="JPEG bomb"),
    ],
)
def test_what_is_no_picture_says_why(content: bytes, cause: str) -> None:
    with pytest.raises(BadPicture, match=f"^{cause}$"):
        decode(content, Preprocess(16, MEAN, STD), PictureConfig(), None)


def test_a_thin_picture_is_refused_before_it_grows() -> None:
    """88 bytes that would take two gigabytes."""
    for format in ("PNG", "JPEG"):
        for width, height in ((1, 3000), (3000, 1)):
            content, preprocess = encoded(smooth(width, height), format), Preprocess(224, MEAN, STD)
            for config in (PictureConfig(), EXACT):
                with pytest.raises(BadPicture, match="^picture too thin$"):
                    decode(content, preprocess, config, None)


def test_noise_in_a_picture_never_fails_otherwise() -> None:
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = np.frombuffer(picture(0, format=format), np.uint8)
        for _ in range(40):
            noisy = whole.copy()
            noisy[rng.integers(0, len(noisy), 3)] = rng.integers(0, 256, 3)
            try:
                pixels = decode(noisy.tobytes(), Preprocess(16, MEAN, STD), PictureConfig(), None)
            except BadPicture:
                continue
            assert pixels.shape == (16, 16, 3)


def test_impossible_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_share"):
        PictureConfig(crop_share=0)
