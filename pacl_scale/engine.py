"""DeepSpeed around the trainable module, and its state as plain full tensors by parameter name.

DeepSpeed's own checkpoints are pickles laid out for one ZeRO stage and one world size. The trainable part of PACL
is a few million numbers, so we gather each parameter's float32 master and Adam moments in full instead: any
stage, precision and world size can restore what any other wrote, and the file is a safetensors.
"""

import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pacl_scale.distributed import World
from pacl_scale.errors import UserError
from pacl_scale.model import PACLModel
from pacl_scale.optim import OptimConfig, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors of each parameter."""

STATE_PARTS = ("master", *MOMENTS)


@dataclass
class EngineConfig:
    """DeepSpeed: ZeRO stage and precision."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of towers, embedder and similarity; masters and moments are always float32."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype as torch names it."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def start(
    config: EngineConfig,
    optim: OptimConfig,
    model: PACLModel,
    world: World,
    micro_batch_size: int,
    accumulation: int,
) -> Any:
    """A ``DeepSpeedEngine`` around ``model``, its optimizer state already laid out (see :func:`_lay_out_state`)."""
    deepspeed = _import_deepspeed(world)
    if not torch.distributed.is_initialized():
        raise RuntimeError("start the process group first (pacl_scale.distributed.joined)")
    backend = torch.distributed.get_backend()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(optim, model),
        config={
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "bf16": {"enabled": config.precision == "bf16"},
            "gradient_clipping": optim.gradient_clipping,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**12,
        },
    )
    _lay_out_state(engine, config, model)
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gather_state(engine: Any, config: EngineConfig) -> dict[str, dict[str, Tensor]]:
    """Full float32 master weights and moments of every trainable parameter, on the CPU.

    Collective: every rank must call it. Returns ``{"master" | "exp_avg" | "exp_avg_sq": {parameter name: tensor}}``.
    """
    state: dict[str, dict[str, Tensor]] = {part: {} for part in STATE_PARTS}
    for name, parameter in _trainable(engine):
        for part in STATE_PARTS:
            tensor = _read(engine, config, parameter, part)
            state[part][name] = tensor.detach().float().cpu().clone().contiguous()
    return state


def restore_state(engine: Any, config: EngineConfig, state: dict[str, dict[str, Tensor]], step: int) -> None:
    """Put back what :func:`gather_state` returned, whatever stage, precision or world size wrote it.

    Raises:
        UserError: the names or shapes are those of another architecture.
    """
    parameters = dict(_trainable(engine))
    found = {name: tuple(tensor.shape) for name, tensor in state["master"].items()}
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    if found != wanted:
        odd = sorted(set(found.items()) ^ set(wanted.items()))
        raise UserError(f"the checkpoint is of another architecture: {odd[0][0]} differs (it has {found})")
    for name, parameter in parameters.items():
        for part in STATE_PARTS:
            _write(engine, config, parameter, part, state[part][name].to(engine.device, torch.float32))
        _write_compute_weight(config, parameter, state["master"][name].to(engine.device))
    _set_step(engine, step)


def _import_deepspeed(world: World) -> Any:
    # DeepSpeed guesses the accelerator from what is installed; a CUDA build of torch on a machine without a GPU
    # makes it guess wrongly.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    # DeepSpeed calls collectives by names that torch is about to retire; the user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # On CPU DeepSpeed compiles a shared-memory all-reduce at start-up. Gloo does that job without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _trainable(engine: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _lay_out_state(engine: Any, config: EngineConfig, model: PACLModel) -> None:
    """Take one optimizer step that changes nothing, so that every stage has allocated and linked its moments.

    The moments come into being at the first ``step()``. With learning rate 0 and a gradient of 0 that step leaves
    weights and moments exactly as they are; only Adam's step counter moves, and it is put back. From here on a
    fresh run and a resumed one are the same code.
    """
    token = torch.zeros(1, 1, model.embedder.linear1.in_features, device=engine.device)
    set_learning_rate(engine, 0.0)
    for _ in range(engine.gradient_accumulation_steps()):
        patches, scale = engine(token)
        engine.backward((patches.sum() + scale.sum()) * 0.0)
        engine.step()
    if config.zero_stage in (1, 2):
        # DeepSpeed links the moments after the first parameter group's step, when the second group has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    _set_step(engine, 0)
    engine.global_steps = engine.micro_steps = engine.global_samples = 0


def _set_step(engine: Any, step: int) -> None:
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(step)


def _read(engine: Any, config: EngineConfig, parameter: Tensor, part: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if config.zero_stage == 0:
        return _unsharded(engine, config, parameter, part)
    if part == "master":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, part)


def _write(engine: Any, config: EngineConfig, parameter: Tensor, part: str, value: Tensor) -> None:
    from deepspeed import utils

    if config.zero_stage == 0:
        _unsharded(engine, config, parameter, part).data.copy_(value)
    elif config.zero_stage == 3:
        # The setter of full values refuses parameters whose last shard is padded; shards always fit.
        shard = _own_shard(parameter, value)
        if part == "master":
            utils.safe_set_local_fp32_param(parameter, shard)
        else:
            utils.safe_set_local_optimizer_state(parameter, shard, part)
    elif part == "master":
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, part)


def _write_compute_weight(config: EngineConfig, parameter: Tensor, value: Tensor) -> None:
    """The weight that forward reads, in the compute dtype; DeepSpeed renews it only at the next step."""
    if config.zero_stage < 3:
        parameter.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value)


def _unsharded(engine: Any, config: EngineConfig, parameter: Tensor, part: str) -> Tensor:
    """Master or moment of ``parameter`` under ZeRO 0, where nothing is sharded."""
    master = parameter if config.precision == "fp32" else _unsharded_master(engine, parameter)
    return master if part == "master" else engine.basic_optimizer.state[master][part]


def _unsharded_master(engine: Any, parameter: Tensor) -> Tensor:
    optimizer = engine.optimizer
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for candidate, master in zip(low, high, strict=True):
            if candidate is parameter:
                return master
    raise AssertionError("a trainable parameter without a float32 master")


def _own_shard(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a parameter that ZeRO 3 cuts into equal flat shards, the last one padded with zeros."""
    size = parameter.ds_tensor.numel()
    start = torch.distributed.get_rank() * size
    padded = torch.nn.functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
    return padded[start : start + size]
