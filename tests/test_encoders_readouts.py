"""Other readings of a tower's pass: against open_clip's own heads and against attention written out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from colours import write_captions, write_pictures
from PIL import Image
from safetensors.torch import save_file

from pacl_scale import checkpoint
from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import PAPER_TEMPLATES, TextEncoderConfig, VisionConfig, build_text, build_vision
from pacl_scale.encoders.cpu_block import CpuBlock
from pacl_scale.encoders.readouts import Readouts
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedConfig
from pacl_scale.evaluate.classification import class_vectors_of, shaping
from pacl_scale.evaluate.command import EvaluateConfig, evaluate
from pacl_scale.evaluate.methods import load_methods
from pacl_scale.evaluate.pictures import AnnotatedConfig
from pacl_scale.evaluate.protocol import normalised
from pacl_scale.model import build_embedder

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def clip() -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return open_clip.CLIP(**MODEL).eval()


@pytest.fixture
def config(tmp_path: Path, clip: open_clip.CLIP) -> VisionConfig:
    (tmp_path / "small.json").write_text(json.dumps(MODEL))
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    return VisionConfig(model=str(tmp_path / "small.json"), weights=str(tmp_path / "clip.safetensors"))


def entered_last(clip: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """What enters the last block, the class token first."""
    caught: list[torch.Tensor] = []
    handle = clip.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    clip.visual(images)
    handle.remove()
    return caught[0]


@torch.no_grad()
def test_readings_are_clips_own_head_projection_and_values(config: VisionConfig, clip: open_clip.CLIP) -> None:
    images = torch.randn(11, 3, 64, 64)
    tower = build_vision(config)
    both = Readouts(tower, ["tokens", "head", "projected", "values", "projected_values"])
    tokens, grid = both.encode(images)
    assert grid == (4, 4) and tokens.shape == (11, 16, both.width) and both.width == 64 + 24 + 24 + 64 + 24
    read = {name: tokens[..., channels] for name, channels in both.columns.items()}
    torch.testing.assert_close(read["tokens"], tower.encode(images).tokens)
    for patch in (0, 15):
        torch.testing.assert_close(read["head"][:, patch], clip.encode_image(images))
    torch.testing.assert_close(read["projected"], tower.encode(images).tokens @ clip.visual.proj)

    # MaskCLIP's last layer written out: value and output projection of each token, residual, MLP, norm, projection.
    x = entered_last(clip, images)[:, 1:]
    block = clip.visual.transformer.resblocks[-1]
    _, _, weight = block.attn.in_proj_weight.chunk(3)
    _, _, bias = block.attn.in_proj_bias.chunk(3)
    x = x + block.attn.out_proj(block.ln_1(x) @ weight.T + bias)
    x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(read["values"], clip.visual.ln_post(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        read["projected_values"], clip.visual.ln_post(x) @ clip.visual.proj, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(read["values"], read["tokens"], atol=0.05)


def test_no_reading_outlives_its_pass(config: VisionConfig) -> None:
    tower = build_vision(config)
    readouts = Readouts(tower, ["tokens", "values"])
    readouts.encode(torch.randn(1, 3, 64, 64))
    assert not tower.blocks[-1]._forward_hooks and not tower.blocks[-1]._forward_pre_hooks
    with pytest.raises(ValueError, match="multiples"):
        readouts.encode(torch.randn(1, 3, 60, 64))
    assert not tower.blocks[-1]._forward_hooks and not tower.blocks[-1]._forward_pre_hooks
    assert readouts.fingerprint() == tower.fingerprint()


def test_the_fast_block_reads_values_as_the_plain_one() -> None:
    settings = VisionConfig(source="timm", model="vit_tiny_patch16_224", weights="random", image_size=64)
    plain, fast = build_vision(settings), build_vision(settings, dtype=torch.bfloat16)
    assert isinstance(fast.blocks[-1], CpuBlock)  # type: ignore[attr-defined]
    images = torch.randn(2, 3, 64, 64)
    expected, found = (Readouts(tower, ["values"]).encode(images, 8).tokens.float() for tower in (plain, fast))
    assert torch.cosine_similarity(expected, found, dim=-1).min() > 0.995


@pytest.mark.parametrize("change", [{"layer": 1}, {"final_norm": False}])
def test_readings_that_clip_was_not_trained_for_are_refused(config: VisionConfig, change: dict) -> None:
    tower = build_vision(dataclasses.replace(config, **change))
    Readouts(tower, ["tokens", "values"])
    with pytest.raises(UserError, match="last block with final_norm"):
        Readouts(tower, ["tokens", "projected"])


def write_clip_run(run: Path, config: VisionConfig, text: TextEncoderConfig) -> Path:
    """A run whose embedder is CLIP's own projection: PACL and `clip` must then say the same."""
    vision, words = build_vision(config), build_text(text)
    embedder = build_embedder(EmbedderConfig(), vision.width, words.width)
    for parameter in embedder.parameters():
        torch.nn.init.zeros_(parameter)
    joint = vision.joint_DE  # type: ignore[attr-defined]
    with torch.no_grad():
        embedder.skip.weight.copy_(torch.eye(vision.width) if joint.shape[1] == vision.width else joint.T)
    settings = {
        "vision": dataclasses.asdict(config),
        "text": dataclasses.asdict(text),
        "embedder": EmbedderConfig().__dict__,
        "loss": {"attention_scale": 10.0, "pooling": "cosine"},
    }
    state = {"master": {f"embedder.{n}": w for n, w in embedder.state_dict().items()}, "exp_avg": {}, "exp_avg_sq": {}}
    towers = {"vision": vision.fingerprint(), "text": words.fingerprint()}
    info = {"config": settings, "width_in": vision.width, "width_out": words.width, "data": {}, "towers": towers}
    checkpoint.save(str(run / "checkpoints"), 1, state, info, keep_last=1)
    return run


def test_methods_stand_side_by_side_on_one_checkpoint(tmp_path: Path, config: VisionConfig) -> None:
    text = TextEncoderConfig(model=config.model, weights=config.weights)
    run = write_clip_run(tmp_path / "run", config, text)
    rows = evaluate(
        EvaluateConfig(
            str(run),
            controls=["untrained", "clip", "maskclip", "value_path", "majority_class", "patch_oracle"],
            segmentation={"blocks": AnnotatedConfig(str(write_pictures(tmp_path / "data")))},
            retrieval={"texts": CaptionedConfig(str(write_captions(tmp_path / "captions")))},
            precision="fp32",
            threads=1,
            examples=1,
        )
    )
    by_name = {row.method: row for row in rows if row.task == "segmentation"}
    names = ["untrained", "clip", "maskclip", "value_path", "pacl", "majority_class", "patch_oracle"]
    assert list(by_name) == names
    # The embedder is the projection, so each pair must agree to the pixel, and the pairs must not.
    assert by_name["clip"].confusion == by_name["pacl"].confusion
    assert by_name["maskclip"].confusion == by_name["value_path"].confusion
    assert by_name["clip"].confusion != by_name["maskclip"].confusion
    retrieval = {row.method: row for row in rows if row.task == "retrieval"}
    assert retrieval["clip"].checkpoint["head"].startswith("CLIP's own")
    assert retrieval["pacl"].checkpoint["attention_scale"] == 10


@torch.no_grad()
def test_clips_own_head_scores_pictures_as_open_clip_does(
    tmp_path: Path, config: VisionConfig, clip: open_clip.CLIP
) -> None:
    run = write_clip_run(tmp_path / "run", config, TextEncoderConfig(model=config.model, weights=config.weights))
    towers, methods = load_methods({"pacl": str(run)}, None, torch.device("cpu"), torch.float32, ["clip", "maskclip"])
    words = ["dog", "lawn mower", "teapot", "a very old castle"]
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((90, 70))

    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    templates = [lambda word, each=each: each.format(word) for each in PAPER_TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(clip, tokenizer, words, templates, device="cpu", use_tqdm=False)
    transform = open_clip.image_transform(
        64, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    expected = clip.encode_image(transform(picture)[None], normalize=True) @ theirs

    preprocess = towers.vision.preprocess
    tokens = towers.vision.encode(normalised(np.asarray(shaping(preprocess)(picture)), preprocess)[None]).tokens
    by_name = {method.name: method for method in methods}
    vectors = class_vectors_of(towers, words, PAPER_TEMPLATES)
    found = by_name["clip"].compare(tokens, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3
    assert not torch.allclose(
        by_name["pacl"].compare(tokens, class_vectors_of(towers, words, PAPER_TEMPLATES)), expected
    )


def test_towers_that_share_no_space_are_refused(tmp_path: Path, config: VisionConfig) -> None:
    text = TextEncoderConfig(model=config.model, weights="random")
    run = write_clip_run(tmp_path / "run", config, text)
    data = {"texts": CaptionedConfig(str(write_captions(tmp_path / "captions")))}
    with pytest.raises(UserError, match="share no space"):
        evaluate(EvaluateConfig(str(run), controls=["maskclip"], retrieval=data, precision="fp32", threads=1))
