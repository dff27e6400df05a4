"""Cached patch tokens are the encoder's, and a cache is finished by whoever comes next."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import PREPROCESS, picture, sample, write_pairs, write_tar

from pacl_scale import cache as cache_module
from pacl_scale.cache import CacheConfig, cache, main
from pacl_scale.data.captions import TextConfig
from pacl_scale.data.decode import PictureConfig
from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.data.vectors import VectorFormat
from pacl_scale.distributed import World
from pacl_scale.encoders import TextEncoderConfig, build_text
from pacl_scale.encoders.vision import PatchTokens
from pacl_scale.errors import UserError, run_command
from pacl_scale.step import encode

ALONE = World(0, 1, 0, torch.device("cpu"))


class Letters:
    """A text encoder whose vectors are the mean codes of every fourth letter, in four channels."""

    width = 4
    fails = False

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        assert not Letters.fails, "the text tower was asked"
        rows = [[sum(map(ord, text[n::4])) / len(text) / 100 for n in range(4)] for text in texts]
        return torch.tensor(rows, dtype=torch.float32)

    def fingerprint(self) -> dict[str, Any]:
        return {"source": "letters"}


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
    monkeypatch.setattr(cache_module, "build_text", lambda *_: Letters())
    yield


def settings(root: Path, output: Path, **changes: Any) -> CacheConfig:
    options: dict[str, Any] = {"batch_size": 4, "shard_samples": 8, "data": DataConfig(root=str(root))}
    return CacheConfig(output=str(output), **(options | changes))


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.02), ("bfloat16", 0.02), ("float32", 1e-6)])
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


def test_the_vector_is_that_of_the_drawn_text(tmp_path: Path) -> None:
    """Captions and noun prompts, over several epochs, one rank or two, and after a resume."""
    write_pairs(tmp_path / "pairs", [11, 9])
    cache(settings(tmp_path / "pairs", tmp_path / "out"), ALONE)
    read = ReadConfig(chunk_samples=4, window_chunks=2)
    config = DataConfig(root=str(tmp_path / "out"), read=read)
    seen: set[str] = set()
    for rank in range(2):
        with PairStream(config, 3, 10, World(rank, 2, rank, torch.device("cpu"))) as stream:
            assert stream.vectors is not None
            assert stream.vectors.tower == {"source": "letters"}
            for _, batch in zip(range(16), stream, strict=False):
                assert batch.text_vectors is not None
                assert torch.equal(batch.text_vectors, Letters().encode(batch.texts).half().float())
                seen |= {text.split(" ")[0] for text in batch.texts}
    assert {"caption", "another", "itap", "art"} <= seen
    with PairStream(config, 3, 10, ordered=True) as stream:
        batch = next(iter(stream))
        assert batch.texts == [captions[0] for captions in batch.captions]
        assert torch.equal(batch.text_vectors, Letters().encode(batch.texts).half().float())  # type: ignore[arg-type]
    without = DataConfig(root=str(tmp_path / "out"), read=read, text=TextConfig(cached_vectors=False))
    with PairStream(without, 3, 10) as stream:
        assert next(iter(stream)).text_vectors is None


def test_pictures_may_stay_pictures_beside_their_text_vectors(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [11, 9])
    index = cache(settings(tmp_path / "pairs", tmp_path / "out", patch_tokens=False), ALONE)
    assert index is not None and index.kind == "pictures"
    assert Squares.encoded == 0
    found = []
    for root in ("pairs", "out"):
        with PairStream(DataConfig(root=str(tmp_path / root), patch_sample=3), 3, 10) as stream:
            stream.prepare_pictures_for(PREPROCESS)
            found += [[batch for _, batch in zip(range(4), stream, strict=False)]]
    pairs, cached = ({key: (batch, row) for batch in part for row, key in enumerate(batch.keys)} for part in found)
    assert pairs.keys() == cached.keys()
    for key, (batch, row) in cached.items():
        other, other_row = pairs[key]
        assert torch.equal(batch.images[row], other.images[other_row])
        assert torch.equal(batch.text_vectors[row], Letters().encode([batch.texts[row]])[0].half().float())
    with pytest.raises(ValueError, match="nothing to keep"):
        settings(tmp_path / "pairs", tmp_path / "out", patch_tokens=False, text_vectors=False)


def test_vectors_that_are_not_one_a_text_are_no_sample(tmp_path: Path) -> None:
    """A tar whose captions were changed after its texts were encoded."""
    write_pairs(tmp_path / "pairs", [20])
    index = cache(settings(tmp_path / "pairs", tmp_path / "out", shard_samples=20), ALONE)
    assert index is not None
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    rows: dict[str, dict[str, Any]] = {}
    for name, content in members.items():
        key, _, extension = name.partition(".")
        rows.setdefault(key, {"__key__": key})[extension] = content
    rows["0000007"]["vectors"] = rows["0000007"]["vectors"][:-2]
    write_tar(tmp_path / "out" / "00000.tar", list(rows.values()))
    build_index(str(tmp_path / "out"), kind="features", extra=index.extra)
    with PairStream(DataConfig(root=str(tmp_path / "out")), 0, 20) as stream:
        batch = next(iter(stream))
    assert batch.skipped == {"text vectors of the wrong size": 1}
    assert "0000007" not in batch.keys
    assert torch.equal(batch.text_vectors, Letters().encode(batch.texts).half().float())  # type: ignore[arg-type]


@pytest.mark.weights
def test_a_texts_vector_does_not_depend_on_its_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tower, in bfloat16, over other batches and shards: the same bytes."""
    monkeypatch.setattr(cache_module, "build_text", build_text)
    write_pairs(tmp_path / "pairs", [5])
    text = TextEncoderConfig(source="package", model="all-minilm-l6-v2", batch_size=4)
    found = []
    for name, batch_size, shard_samples in (("a", 1, 1), ("b", 5, 5)):
        changes = {"text": text, "batch_size": batch_size, "shard_samples": shard_samples}
        cache(settings(tmp_path / "pairs", tmp_path / name, **changes), ALONE)
        with PairStream(DataConfig(root=str(tmp_path / name)), 0, 5, ordered=True) as stream:
            found.append(next(iter(stream)).text_vectors)
    assert torch.equal(found[0], found[1])
    assert found[0].norm(dim=1).sub(1).abs().max() < 0.01


def test_training_needs_no_text_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training takes for a batch's texts: the cached vectors where there are some, else the tower's."""
    write_pairs(tmp_path / "pairs", [20])
    cache(settings(tmp_path / "pairs", tmp_path / "out"), ALONE)
    with PairStream(DataConfig(root=str(tmp_path / "out")), 0, 20) as stream:
        batch = next(iter(stream))
    (with_tower,) = encode(batch, None, Letters(), torch.device("cpu"), 20)
    monkeypatch.setattr(Letters, "fails", True)
    (without,) = encode(batch, None, None, torch.device("cpu"), 20)
    assert torch.equal(without.texts, with_tower.texts.half().float())


def test_vectors_of_another_tower_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [8])
    cache(settings(tmp_path / "pairs", tmp_path / "a"), ALONE)
    cache(settings(tmp_path / "pairs", tmp_path / "b", text_vectors=False), ALONE)
    index = SampleIndex.load(str(tmp_path / "a"))
    assert VectorFormat.of(SampleIndex.load(str(tmp_path / "b"))) is None
    vectors = VectorFormat.of(index)
    assert vectors is not None
    vectors.check_tower({"source": "open_clip", "model": "ViT-B-16"})
    other = TextEncoderConfig(source="huggingface", model="some/folder/bert")
    with pytest.raises(UserError, match="vectors of open_clip ViT-B-16, but text names huggingface bert; name the"):
        vectors.check_tower(other.named)
    mixed = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0}
    with pytest.raises(UserError, match="must all hold text vectors of one tower, or none"):
        PairStream(DataConfig(mix=mixed), 0, 4)
    with PairStream(DataConfig(mix=mixed, text=TextConfig(cached_vectors=False)), 0, 4) as stream:
        assert stream.vectors is None
    entry = index.extra["text_vectors"]
    build_index(str(tmp_path / "a"), kind="features", extra=index.extra | {"text_vectors": entry | {"templates": []}})
    with pytest.raises(UserError, match="text vectors of other noun prompts; run the cache step again"):
        PairStream(DataConfig(root=str(tmp_path / "a")), 0, 4)
    build_index(str(tmp_path / "a"), kind="features", extra=index.extra | {"text_vectors": {"width": 4}})
    with pytest.raises(UserError, match="does not describe its text vectors"):
        PairStream(DataConfig(root=str(tmp_path / "a")), 0, 4)


def test_vectors_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(UserError, match="beyond 65,504"):
        VectorFormat(2, {}, {}).pack(torch.tensor([[1.0, 7e4]]))


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
    tokens = cache_module.probe_format(Squares(), "int8")  # type: ignore[arg-type]
    layout = cache_module.Layout(tokens, cache_module.vector_format(config.text, Letters()))
    cache_module.claim_output(config, layout, SampleIndex.load(str(tmp_path / "pairs")), ALONE)
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
    with pytest.raises(UserError, match="differs in precision; choose"):
        cache(settings(tmp_path / "pairs", tmp_path / "out", precision="fp32"), ALONE)
    write_pairs(tmp_path / "pairs", [8], first=8)
    with pytest.raises(UserError, match="differs in index; choose"):
        cache(settings(tmp_path / "pairs", tmp_path / "out"), ALONE)
    with pytest.raises(UserError, match="holds patch tokens already"):
        cache(settings(tmp_path / "out", tmp_path / "again"), ALONE)
    with pytest.raises(ValueError, match="as they are"):
        settings(tmp_path, tmp_path, data=DataConfig(picture=PictureConfig(crop_share=0.5)))
