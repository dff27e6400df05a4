"""Cached patch tokens are the encoder's, and a cache is finished by whoever comes next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import PREPROCESS, picture, sample, write_pairs, write_tar

from pacl_scale import cache as cache_module
from pacl_scale.cache import CacheConfig, cache, main
from pacl_scale.data.decode import PictureConfig
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.distributed import World
from pacl_scale.encoders.vision import PatchTokens
from pacl_scale.errors import UserError, run_command

ALONE = World(0, 1, 0, torch.device("cpu"))


class Squares:
    """An encoder whose tokens are the means of 4 x 4 squares of the picture, in three channels."""

    width, patch_size, preprocess = 3, 4, PREPROCESS
    encoded = 0

    def encode(self, images_BCHW: torch.Tensor, stride: int | None = None) -> PatchTokens:
        Squares.encoded += len(images_BCHW)
        return PatchTokens(torch.nn.functional.avg_pool2d(images_BCHW, 4).flatten(2).transpose(1, 2), (4, 4))

    def fingerprint(self) -> dict[str, Any]:
        return {"source": "squares"}


@pytest.fixture(autouse=True)
def squares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Squares.encoded = 0
    monkeypatch.setattr(cache_module, "build_vision", lambda *_: Squares())
    yield


def settings(root: Path, output: Path, **changes: Any) -> CacheConfig:
    options: dict[str, Any] = {"batch_size": 4, "shard_samples": 8, "data": DataConfig(root=str(root))}
    return CacheConfig(output=str(output), **(options | changes))


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.02), ("bfloat16", 0.02)])
def test_training_reads_what_the_encoder_computes(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    write_pairs(tmp_path / "pairs", [11, 9])
    index = cache(settings(tmp_path / "pairs", tmp_path / "out", dtype=dtype), ALONE)
    assert index is not None
    assert [shard.samples for shard in index.shards] == [8, 8, 4]
    with PairStream(DataConfig(root=str(tmp_path / "pairs")), 0, 20, ordered=True) as stream:
        stream.prepare_pictures_for(PREPROCESS)
        (pictures,) = list(stream)
    with PairStream(DataConfig(root=str(tmp_path / "out")), 0, 20, ordered=True) as stream:
        (features,) = list(stream)
        assert stream.features is not None
        assert stream.features.vision == {"source": "squares"}
    assert features.keys == pictures.keys
    assert features.captions == pictures.captions
    assert features.nouns == pictures.nouns
    assert features.grid == (4, 4)
    assert pictures.images is not None
    assert features.patches is not None
    wanted = Squares().encode(pictures.images).tokens
    assert (features.patches - wanted).abs().max() < tolerance * wanted.abs().max()


def test_a_second_start_makes_only_what_is_missing(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [40])
    config = settings(tmp_path / "pairs", tmp_path / "out")
    assert cache(config, ALONE) is not None
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 5 + 2
    (tmp_path / "out" / "00003.tar").unlink()
    (tmp_path / "out" / "index.parquet").unlink()
    Squares.encoded = 0
    assert cache(config, ALONE) is not None
    assert Squares.encoded == 8 + 1  # one shard, and the picture that tells the format
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_ranks_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks one after the other, so that no process has to be started; barriers have nobody to wait for."""
    write_pairs(tmp_path / "pairs", [40])
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    config = settings(tmp_path / "pairs", tmp_path / "out")
    cache_module.claim_output(config, cache_module.probe_format(Squares(), "int8"), 40, ALONE)  # type: ignore[arg-type]
    assert cache(config, World(1, 2, 1, torch.device("cpu"))) is None
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00001.tar", "00003.tar"]
    index = cache(config, World(0, 2, 0, torch.device("cpu")))
    assert index is not None
    assert len(index) == 40


def test_pictures_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    rows = [sample(n, jpg=b"x" if n in (0, 1, 2, 3, 9) else picture(n)) for n in range(20)]
    write_tar(tmp_path / "pairs" / "0.tar", rows)
    build_index(str(tmp_path / "pairs"))
    data = DataConfig(root=str(tmp_path / "pairs"), max_skip_share=0.5)
    index = cache(settings(tmp_path / "pairs", tmp_path / "out", data=data), ALONE)
    assert index is not None
    assert [shard.samples for shard in index.shards] == [4, 7, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "output is not set"),
        (["output={out}"], "no data set is named"),
        (["output={out}", "data.root={none}"], "run the index step"),
        (["output={out}", "data.root={pairs}", "batch_size=3", "shard_samples=8"], "multiple of batch_size"),
        (["output={out}", "data.root={pairs}", "data.picture.flip=true"], "cached tokens are of pictures as they are"),
        (["output={out}", "data.root={pairs}", "data.patch_sample=2"], "all patches are cached"),
        (["output={pairs}", "data.root={pairs}"], "holds another data set"),
    ],
)
def test_mistakes_end_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write_pairs(tmp_path / "pairs", [4])
    places = {"out": tmp_path / "out", "pairs": tmp_path / "pairs", "none": tmp_path}
    filled = [word.format(**places) for word in words]
    assert run_command(lambda: main([*filled, "distributed.device=cpu"])) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_caches_are_never_mixed(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [8])
    cache(settings(tmp_path / "pairs", tmp_path / "out"), ALONE)
    with pytest.raises(UserError, match="holds a cache that differs in dtype; choose another output"):
        cache(settings(tmp_path / "pairs", tmp_path / "out", dtype="bfloat16"), ALONE)
    with pytest.raises(UserError, match="holds patch tokens already"):
        cache(settings(tmp_path / "out", tmp_path / "again"), ALONE)
    with pytest.raises(ValueError, match="as they are"):
        settings(tmp_path, tmp_path, data=DataConfig(picture=PictureConfig(crop_share=0.5)))
