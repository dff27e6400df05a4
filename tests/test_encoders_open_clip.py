"""open_clip's towers, on a small model of random weights described by a JSON file."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pacl_scale.embedder import PatchEmbedder
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_text, build_vision
from pacl_scale.errors import UserError

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(MODEL))
    return str(path)


@pytest.fixture
def clip() -> open_clip.CLIP:
    """The same architecture by open_clip's own hand, with weights that are easily told apart."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return open_clip.CLIP(**MODEL).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, clip: open_clip.CLIP) -> str:
    path = tmp_path / "clip.safetensors"
    save_file(clip.state_dict(), path)
    return str(path)


def tokens_of(visual: open_clip.transformer.VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    visual.output_tokens = True
    with torch.no_grad():
        return visual(images)[1]


def test_tokens_are_open_clips_own(config_file: str, checkpoint: str, clip: open_clip.CLIP) -> None:
    encoder = build_vision(VisionConfig(model=config_file, weights=checkpoint))
    images = torch.randn(2, 3, 64, 64)
    tokens, grid = encoder.encode(images)
    assert grid == (4, 4) and encoder.width == 64 and encoder.patch_size == 16
    assert encoder.preprocess.image_size == 64 and encoder.preprocess.mean == open_clip.OPENAI_DATASET_MEAN
    torch.testing.assert_close(tokens, tokens_of(clip.visual, images))


def test_nobody_is_warned_of_what_was_asked_for(
    config_file: str, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    for weights in ("random", checkpoint):
        build_vision(VisionConfig(model=config_file, weights=weights))
        build_text(TextEncoderConfig(model=config_file, weights=weights))
    assert "randomly" not in caplog.text


def test_projection_layer_and_norm_are_choices(config_file: str, checkpoint: str, clip: open_clip.CLIP) -> None:
    images = torch.randn(2, 3, 64, 64)
    projected = build_vision(VisionConfig(model=config_file, weights=checkpoint, projection=True))
    assert projected.width == 24
    torch.testing.assert_close(projected.encode(images).tokens, tokens_of(clip.visual, images) @ clip.visual.proj)
    middle = build_vision(VisionConfig(model=config_file, weights=checkpoint, layer=1, final_norm=False))
    with torch.no_grad():
        expected = clip.visual.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(middle.encode(images).tokens, expected["image_intermediates"][0])


def test_other_sizes_interpolate_positions_as_open_clip_does(
    config_file: str, checkpoint: str, clip: open_clip.CLIP
) -> None:
    larger = open_clip.CLIP(24, {**MODEL["vision_cfg"], "image_size": (96, 128)}, MODEL["text_cfg"]).eval()
    open_clip.load_checkpoint(larger, checkpoint)
    images = torch.randn(2, 3, 96, 128)
    tokens, grid = build_vision(VisionConfig(model=config_file, weights=checkpoint)).encode(images)
    assert grid == (6, 8)
    torch.testing.assert_close(tokens, tokens_of(larger.visual, images))


def test_a_finer_stride_is_a_finer_grid(config_file: str, checkpoint: str, clip: open_clip.CLIP) -> None:
    encoder = build_vision(VisionConfig(model=config_file, weights=checkpoint))
    images = torch.randn(2, 3, 64, 64)
    plain = encoder.encode(images)
    assert torch.equal(encoder.encode(images, stride=16).tokens, plain.tokens)
    tokens, grid = encoder.encode(images, stride=8)
    assert grid == (7, 7)
    # The same model built for a 7 x 7 grid, with its convolution slowed down by hand.
    finer = open_clip.CLIP(24, {**MODEL["vision_cfg"], "image_size": 112}, MODEL["text_cfg"]).eval()
    open_clip.load_checkpoint(finer, checkpoint)
    finer.visual.conv1.stride = (8, 8)
    torch.testing.assert_close(tokens, tokens_of(finer.visual, images))
    with pytest.raises(ValueError, match="stride"):
        encoder.encode(images, stride=17)
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder.encode(torch.randn(1, 3, 60, 64))


def test_the_tower_is_frozen_and_its_tokens_can_be_trained_on(config_file: str) -> None:
    encoder = build_vision(VisionConfig(model=config_file, weights="random"))
    tokens = encoder.encode(torch.randn(2, 3, 64, 64)).tokens
    assert not tokens.requires_grad and not tokens.is_inference()
    embedder = PatchEmbedder(encoder.width, 24)
    embedder(tokens).sum().backward()
    assert embedder.linear1.weight.grad is not None


def test_random_weights_follow_the_seed(config_file: str) -> None:
    before = torch.get_rng_state()
    prints = [
        build_vision(VisionConfig(model=config_file, weights="random", seed=seed)).fingerprint() for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(before, torch.get_rng_state())


def test_a_fingerprint_knows_what_changes_tokens(config_file: str, checkpoint: str, tmp_path: Path) -> None:
    base = VisionConfig(model=config_file, weights=checkpoint)
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(Path(checkpoint).read_bytes())
    same = build_vision(VisionConfig(model=config_file, weights=str(moved))).fingerprint()
    original = build_vision(base).fingerprint()
    assert same == original == json.loads(json.dumps(original))
    for changed in (
        {"layer": 0},
        {"final_norm": False},
        {"projection": True},
        {"image_size": 96},
        {"resize": "squash"},
    ):
        assert build_vision(VisionConfig(model=config_file, weights=checkpoint, **changed)).fingerprint() != original


def test_checkpoints_of_torch_are_read_too(
    config_file: str, checkpoint: str, clip: open_clip.CLIP, tmp_path: Path
) -> None:
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, path)
    by_torch = build_vision(VisionConfig(model=config_file, weights=str(path)))
    assert by_torch.fingerprint() == build_vision(VisionConfig(model=config_file, weights=checkpoint)).fingerprint()


class Surprise:
    def __reduce__(self) -> tuple:
        return (Path("was-run").touch, ())


def test_bad_weights_end_in_one_sentence(config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Surprise()}, tmp_path / "code.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"no tensors here")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, complaint in {
        "code.pt": "tensors alone",
        "noise.safetensors": "damaged",
        "list.pt": "no state dict",
        "other.safetensors": "another architecture",
        "absent.safetensors": "no file",
    }.items():
        with pytest.raises(UserError, match=complaint) as caught:
            build_vision(VisionConfig(model=config_file, weights=str(tmp_path / name)))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()


def test_wrong_names_end_in_one_sentence(config_file: str, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    for settings, complaint in (
        ({"model": "ViT-Z-99"}, "open_clip has no 'ViT-Z-99'"),
        ({"model": "ViT-B-16", "weights": "opnai"}, "its tags are openai"),
        ({"model": config_file}, "without weights"),
        ({"model": str(tmp_path / "absent.json")}, "cannot be read"),
        ({"model": str(tmp_path / "empty.json"), "weights": "random"}, "must hold embed_dim"),
        ({"model": config_file, "weights": "random", "layer": 3}, "blocks 0 to 2"),
        ({"model": "RN50", "weights": "random"}, "no patch tokens"),
    ):
        with pytest.raises(UserError, match=complaint):
            build_vision(VisionConfig(**settings))


def test_openai_weights_bring_their_own_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def create_model(name: str, **options: object) -> None:
        seen.update(options)
        raise RuntimeError("no hub here\nmore lines")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(UserError, match="no hub here$"):
        build_vision(VisionConfig())
    assert seen["pretrained"] == "openai" and seen["force_quick_gelu"] is True


def test_impossible_combinations_are_refused() -> None:
    for settings, complaint in (
        ({"source": "timm", "projection": True}, "projection"),
        ({"projection": True, "final_norm": False}, "projection"),
        ({"image_size": 0}, "image_size"),
        ({"source": "package", "weights": "x"}, "weights"),
    ):
        with pytest.raises(ValueError, match=complaint):
            VisionConfig(**settings)


def test_text_vectors_are_open_clips_own(config_file: str, checkpoint: str, clip: open_clip.CLIP) -> None:
    encoder = build_text(TextEncoderConfig(model=config_file, weights=checkpoint))
    texts = ["a dog", "a photo of a large red bus in a street", "word " * 40]
    with torch.no_grad():
        expected = clip.encode_text(open_clip.SimpleTokenizer(context_length=20)(texts))
    vectors = encoder.encode(texts)
    assert encoder.width == 24 and vectors.shape == (3, 24)
    torch.testing.assert_close(vectors, expected)


def test_a_text_tower_that_is_not_causal_sees_its_whole_context(tmp_path: Path) -> None:
    model = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "no_causal_mask": True}, "custom_text": True}
    path = tmp_path / "two-way.json"
    path.write_text(json.dumps(model))
    encoder = build_text(TextEncoderConfig(model=str(path), weights="random"))
    torch.testing.assert_close(encoder.encode(["a dog"]), encoder.encode(["a dog", "a longer text of words"])[:1])


def test_half_precision_still_gives_float32(config_file: str, checkpoint: str) -> None:
    settings = TextEncoderConfig(model=config_file, weights=checkpoint)
    exact, rounded = (build_text(settings, dtype=dtype).encode(["a dog"]) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)
    assert not torch.equal(rounded, exact)


def test_no_matrix_of_all_scores_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("torch's fast path holds the scores of all pairs of patches")

    monkeypatch.setattr(torch, "_native_multi_head_attention", refuse)
    # The fast path takes an even number of heads only.
    file = tmp_path / "two_heads.json"
    file.write_text(json.dumps(MODEL | {"vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}}))
    tower = build_vision(VisionConfig(model=str(file), weights="random"))
    assert tower.encode(torch.zeros(1, 3, 64, 64), stride=4).tokens.shape == (1, 13 * 13, 128)
    # Whoever else computes in this process keeps what torch had set.
    assert torch.backends.mha.get_fastpath_enabled()
