"""Small data sets for tests: pictures that can be told apart by their colour, in tars as img2dataset writes them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.encoders.vision import Preprocess

PREPROCESS = Preprocess(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def picture(number: int, width: int = 24, height: int = 20, format: str = "JPEG") -> bytes:
    """A picture of noise that depends on ``number``."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def sample(number: int, **members: Any) -> dict[str, Any]:
    """Members of one sample; ``members`` replace or add to them, None leaves one out."""
    texts = {"captions": [f"caption {number}", f"another {number}"], "nouns": [f"noun{number % 3}"]}
    content = {"jpg": picture(number), "txt": f"caption {number}".encode(), "json": json.dumps(texts).encode()}
    content |= members
    return {"__key__": f"{number:07d}"} | {name: value for name, value in content.items() if value is not None}


def write_tar(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """A tar as webdataset writes it."""
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for one in samples:
            tar.write(one)


def write_pairs(root: Path, shard_sizes: Sequence[int], first: int = 0) -> SampleIndex:
    """An indexed data set of pictures; sample n of all has key ``first + n``."""
    root.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, size in enumerate(shard_sizes):
        write_tar(root / f"{shard:05d}.tar", [sample(n) for n in range(number, number + size)])
        number += size
    return build_index(str(root))
