"""timm's towers against timm's own forward passes, with random weights."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pacl_scale.encoders import Placement, Preprocess, VisionConfig, VisionEncoder, build_vision
from pacl_scale.encoders.cpu_block import CpuBlock, PackedLinear, PlainLinear, is_plain, linear
from pacl_scale.encoders.from_timm import encoder_of_timm_model
from pacl_scale.encoders.vision import preprocess_for
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.errors import UserError

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ViT: one position table for all tokens": {},
    "DINOv2: layer scales": {"init_values": 0.5},
    "DINOv2 with registers: positions for the patches alone": {"reg_tokens": 4, "no_embed_class": True},
    "CLIP: a norm before the blocks": {"pre_norm": True},
    "SigLIP: no prefix tokens": {"class_token": False, "global_pool": "map"},
}
OTHERS = ["eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"]


def uneven(model: Any) -> Any:
    """Random weights such that a token taken for another would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def small(**options: Any) -> VisionTransformer:
    return uneven(VisionTransformer(**SMALL, **options, dynamic_img_size=True))


def encoder_of(model: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> VisionEncoder:
    config = VisionConfig(source="timm", model="small", **settings)
    plain = Preprocess(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return encoder_of_timm_model(copy.deepcopy(model), config, plain, Placement(torch.device("cpu"), dtype))


def tokens_of(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(images)[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_timms_own_at_any_size(layout: str) -> None:
    model = small(**LAYOUTS[layout])
    encoder = encoder_of(model)
    assert isinstance(encoder, FrozenViT) and (encoder.width, encoder.patch_size) == (64, 16)
    for height, width in ((64, 64), (80, 112), (32, 16)):
        images = torch.randn(2, 3, height, width)
        tokens, grid = encoder.encode(images)
        assert grid == (height // 16, width // 16)
        torch.testing.assert_close(tokens, tokens_of(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_towers_that_are_not_plain_give_timms_tokens(name: str, tmp_path: Path) -> None:
    model = uneven(timm.create_model(name, num_classes=0, dynamic_img_size=True))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = build_vision(VisionConfig(source="timm", model=name, weights=str(tmp_path / "weights.safetensors")))
    images = torch.randn(1, 3, encoder.patch_size * 3, encoder.patch_size * 5)
    tokens, grid = encoder.encode(images)
    assert grid == (3, 5)
    torch.testing.assert_close(tokens, tokens_of(model, images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="stride"):
        encoder.encode(images, stride=7)


@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_in_the_middle(norm: bool) -> None:
    model = small()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(
            images, indices=[1], norm=norm, output_fmt="NLC", intermediates_only=True
        )
    for layer in (1, -2):
        tokens = encoder_of(model, layer=layer, final_norm=norm).encode(images).tokens
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_a_finer_stride() -> None:
    model = small(reg_tokens=2)
    encoder = encoder_of(model)
    images = torch.randn(1, 3, 64, 80)
    assert torch.equal(encoder.encode(images, stride=16).tokens, encoder.encode(images).tokens)
    tokens, grid = encoder.encode(images, stride=4)
    assert grid == (13, 17)
    model.patch_embed.proj.stride = (4, 4)
    torch.testing.assert_close(tokens, tokens_of(model, images), rtol=1e-4, atol=1e-4)


def test_many_pictures_are_encoded_in_passes_that_change_nothing() -> None:
    encoder = encoder_of(small())
    images = torch.randn(19, 3, 64, 64)
    one_by_one = torch.cat([encoder.encode(image[None]).tokens for image in images])
    torch.testing.assert_close(encoder.encode(images).tokens, one_by_one, rtol=1e-4, atol=1e-4)


def test_a_named_model_with_a_checkpoint(tmp_path: Path) -> None:
    model = uneven(timm.create_model("vit_tiny_patch16_224", num_classes=10, dynamic_img_size=True))
    # The classifier of a checkpoint is not needed, and no reason to refuse it.
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = build_vision(
        VisionConfig(source="timm", model="vit_tiny_patch16_224", weights=str(tmp_path / "weights.pt"))
    )
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(encoder.encode(images).tokens, tokens_of(model, images), rtol=1e-4, atol=1e-4)


def test_dinov2_layouts_are_224_pixels_unless_told_otherwise() -> None:
    native = Preprocess(518, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for model, told, size in (
        ("vit_small_patch14_dinov2", None, 224),
        ("vit_small_patch14_dinov2", 448, 448),
        ("vit_tiny_patch16_384", None, 518),
    ):
        config = VisionConfig(source="timm", model=model, image_size=told)
        assert preprocess_for(config, native) == dataclasses.replace(native, image_size=size)


def test_wrong_names_end_in_one_sentence(tmp_path: Path) -> None:
    save_file({"cls_token": torch.zeros(1, 1, 192)}, tmp_path / "half.safetensors")
    for settings, complaint in (
        ({"model": "vit_of_another_planet"}, "timm has no"),
        ({"model": "resnet18", "weights": "random"}, "no vision transformer"),
        ({"model": "vit_tiny_patch16_224", "weights": str(tmp_path / "absent.pt")}, "no file"),
        ({"model": "vit_tiny_patch16_224", "weights": str(tmp_path / "half.safetensors")}, "another architecture"),
        ({"model": "vit_tiny_patch16_224", "weights": "random", "layer": -13}, "blocks 0 to 11"),
    ):
        with pytest.raises(UserError, match=complaint):
            build_vision(VisionConfig(source="timm", **settings))


@pytest.mark.parametrize("tokens", [20, 1100])
def test_the_cpu_block_is_timms_block(tokens: int) -> None:
    block = timm.models.vision_transformer.Block(128, num_heads=2, qkv_bias=True, init_values=0.5).eval()
    with torch.no_grad():
        block.ls1.gamma.copy_(torch.randn(128))
        x = torch.randn(2, tokens, 128).bfloat16()
        expected = block(x.float())
        kept = x.clone()
        actual = CpuBlock(block)(x).float()
    assert is_plain(block) and torch.equal(x, kept)
    # bfloat16 keeps 8 bits: the error is of that order, and has no drift.
    difference = actual - expected
    assert difference.abs().mean() < 0.01 and difference.mean().abs() < 0.001
    assert difference.abs().max() < 0.15


def test_blocks_with_more_in_them_are_left_alone() -> None:
    make = timm.models.vision_transformer.Block
    assert not is_plain(make(64, num_heads=2, qk_norm=True))
    assert not is_plain(make(64, num_heads=2, act_layer=nn.ReLU))
    assert not is_plain(nn.Identity())


@pytest.mark.parametrize("gelu", [False, True])
def test_packed_and_plain_linear_layers_agree(gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 96)
    scale = torch.randn(96)
    x, residual = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 5, 96).bfloat16()
    with torch.no_grad():
        here = linear(layer, scale, gelu)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert isinstance(here, PackedLinear), "this CPU and torch can pack, yet the packed layer was given up"
        monkeypatch.setattr(PackedLinear, "forward", lambda *_: None)
        fallen_back = linear(layer, scale, gelu)
        monkeypatch.undo()
        assert isinstance(fallen_back, PlainLinear)
        expected = nn.functional.linear(x.float(), layer.weight * scale[:, None], layer.bias * scale)
        expected = nn.functional.gelu(expected) if gelu else expected
        for each in (here, fallen_back):
            torch.testing.assert_close(each(x).float(), expected, rtol=0.03, atol=0.03)
            if not gelu:
                torch.testing.assert_close(each(x, residual).float(), expected + residual, rtol=0.03, atol=0.03)


def test_a_bfloat16_tower_on_a_cpu_gives_the_same_tokens() -> None:
    model = small(init_values=0.5)
    images = torch.randn(3, 3, 64, 64)
    exact, rounded = encoder_of(model).encode(images).tokens, encoder_of(model, torch.bfloat16).encode(images).tokens
    assert rounded.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.99
