"""Weights from files that nobody vouched for: safetensors, or PyTorch files of nothing but tensors."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pacl_scale.errors import UserError

RANDOM = "random"
"""The value of ``weights`` that asks for a seeded random initialisation."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU.

    A file named ``.safetensors`` is read as such; any other through torch's restricted unpickler, which knows
    tensors and plain containers and runs no code. A ``state_dict`` inside and DDP's ``module.`` are unwrapped.

    Raises:
        UserError: no such file, or one that holds something else than named tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"weights: there is no file {path}") from error
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"weights: {path} is no checkpoint of tensors alone, or is damaged") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights: {path} holds no state dict (tensors by name)")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy ``state`` into ``module``; every name and every shape must fit.

    Raises:
        UserError: they do not: the checkpoint is of another architecture.
    """
    own = module.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    reshaped = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        examples = ", ".join(sorted([*missing, *unexpected, *reshaped])[:3])
        raise UserError(
            f"{origin} is of another architecture than the model: {len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected, {len(reshaped)} of another shape (such as {examples})"
        )
    module.load_state_dict(state)


def hash_of(module: nn.Module) -> str:
    """16 hexadecimal digits that identify the names and values of a module's tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def freeze(module: nn.Module) -> nn.Module:
    """``module`` in evaluation mode, its parameters without gradients."""
    return module.eval().requires_grad_(False)
