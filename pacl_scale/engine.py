"""DeepSpeed around the trainable module, and its state as plain full tensors by parameter name.

DeepSpeed's own checkpoints are pickles laid out for one ZeRO stage and one world size. The trainable part of PACL
is a few million numbers, so we gather each parameter's float32 master and Adam moments in full instead: any
stage, precision and world size can restore what any other wrote, and the file is a safetensors.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from pacl_scale.distributed import World
from pacl_scale.errors import UserError
from pacl_scale.model import PACLModel
from pacl_scale.optim import OptimConfig, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors of each parameter."""

STATE_PARTS = ("master", *MOMENTS)

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class EngineConfig:
    """DeepSpeed: ZeRO stage and precision."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute dtype of towers, embedder and similarity; masters and moments are always float32. fp16, for GPUs without
    bfloat16, scales the loss so that small gradients are not lost, by a factor that finds itself."""

    loss_scale_power: int = 16
    """fp16: the loss is multiplied by 2 to this power at the start."""

    loss_scale_window: int = 1000
    """fp16: steps without an overflow after which the factor is doubled; an overflow halves it. DeepSpeed takes the
    step of the doubling with half its gradient."""

    offload_optimizer: bool = False
    """Keep masters and moments in the memory of the CPU, and update there; needs zero_stage 1, 2 or 3."""

    shard_towers: bool = False
    """Each rank keeps its part of every block of the frozen vision tower, and gathers a block while it computes: for
    towers that are larger than one GPU."""

    compile_towers: str | None = None
    """torch.compile the blocks of the frozen vision tower with this backend, as in "inductor", which needs a C++
    compiler on the nodes; null compiles nothing."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")
        if self.precision == "fp16" and self.zero_stage == 0:
            # DeepSpeed 0.19 clips by another norm there: the update depends on the loss scale.
            raise ValueError("engine.precision fp16 needs engine.zero_stage 1, 2 or 3")
        if self.loss_scale_power < 0 or self.loss_scale_window < 1:
            raise ValueError("engine.loss_scale_power must be at least 0 and loss_scale_window at least 1")
        if self.shard_towers and self.compile_towers:
            raise ValueError("engine.shard_towers and compile_towers exclude each other; choose one")

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype as torch names it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]


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
    if config.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError("engine.precision is fp16, which this device does not compute in; take bf16 or fp32")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(optim, model, model.lr_shares),
        config=_deepspeed_settings(config, optim, model, micro_batch_size, accumulation),
    )
    if config.zero_stage == 0 and config.precision == "fp32":
        _refuse_bad_gradients(engine.optimizer)
    _lay_out_state(engine, config, model)
    return engine


def _refuse_bad_gradients(optimizer: Any) -> None:
    """Let ``optimizer`` leave out steps whose gradient is not finite; DeepSpeed itself does so in every other mode.

    The gradients are those of all ranks together already, so that all decide alike.
    """
    update = optimizer.step

    def step(*arguments: Any, **options: Any) -> Any:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        optimizer.overflow = not all(bool(grad.isfinite().all()) for grad in grads)
        return None if optimizer.overflow else update(*arguments, **options)

    optimizer.step = step


def _deepspeed_settings(
    config: EngineConfig, optim: OptimConfig, model: PACLModel, micro_batch_size: int, accumulation: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    # Its buckets are made for large models, at their full size: half a billion numbers where ours are a million.
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # It wants even numbers.
    numbers += numbers % 2
    buckets = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), numbers)
    zero: dict[str, Any] = {"stage": config.zero_stage, **buckets}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {
            "enabled": config.precision == "fp16",
            "initial_scale_power": config.loss_scale_power,
            "loss_scale_window": config.loss_scale_window,
        },
        "gradient_clipping": optim.gradient_clipping,
        "zero_optimization": zero,
        # torch's AdamW updates on the CPU as well as DeepSpeed's, which would have to be compiled at the start.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }


def loss_scaler(engine: Any, config: EngineConfig) -> dict[str, float]:
    """State of fp16's loss scaling, for checkpoints; empty in other precisions."""
    if config.precision != "fp16":
        return {}
    scaler = engine.optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in SCALER_STATE if getattr(scaler, name, None) is not None}


def scaling(engine: Any, config: EngineConfig, overflows: int) -> dict[str, float]:
    """What fp16's loss scaling is at, for a line of measurements; empty in other precisions."""
    state = loss_scaler(engine, config)
    return {"loss_scale": state["cur_scale"], "overflows": overflows} if state else {}


def restore_loss_scaler(engine: Any, config: EngineConfig, state: dict[str, float]) -> None:
    """Put back what :func:`loss_scaler` returned; a checkpoint of another precision has none, and the search begins."""
    if config.precision == "fp16":
        for name, value in state.items():
            if name in SCALER_STATE and hasattr(engine.optimizer.loss_scaler, name):
                setattr(engine.optimizer.loss_scaler, name, value)


def overflowed(engine: Any, config: EngineConfig) -> bool:
    """Whether the last step was not taken because fp16's loss scale was too large, which is part of finding it."""
    return config.precision == "fp16" and not engine.was_step_applied() and engine.optimizer.loss_scaler.cur_scale > 1


def shard_of_towers(config: EngineConfig, world: World) -> Callable[[nn.Module], object] | None:
    """What leaves this rank's part of a frozen block on its device, if ``config`` wants that; None for whole blocks.

    Every later forward pass of such a block is collective: ranks pass equally many pictures.
    """
    if not config.shard_towers or world.size == 1:
        return None
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # A block lets go of the others' parts as soon as it is done: one whole block at a time is in memory.
    return partial(fully_shard, mesh=mesh, reshard_after_forward=True)


def compile_tower(config: EngineConfig, blocks: Sequence[nn.Module]) -> None:
    """torch.compile the blocks of a frozen tower, in place, if ``config`` says so.

    Raises:
        UserError: torch has no such backend.
    """
    if config.compile_towers:
        known = torch.compiler.list_backends(exclude_tags=())
        if config.compile_towers not in known:
            raise UserError(f"engine.compile_towers: torch has no backend {config.compile_towers!r}, but {known}")
        for block in blocks:
            block.compile(backend=config.compile_towers)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of every parameter group for the next step, its share of ``lr``."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


def set_collective_timeout(engine: Any, minutes: float) -> None:
    """How long collectives may take from now on: torch's own, and DeepSpeed's, which has a group of the same ranks."""
    limit, own = timedelta(minutes=minutes), getattr(engine, "seq_data_parallel_group", None)
    # Before torch 2.14 the call had a private name.
    set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(limit)
    if own is not None:
        set_timeout(limit, own)


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
    before = loss_scaler(engine, config)
    nothing = model.smallest_input(engine.device)
    set_learning_rate(engine, 0.0)
    for _ in range(engine.gradient_accumulation_steps()):
        outputs = [one.sum() for one in engine(*nothing) if one is not None]
        engine.backward(torch.stack(outputs).sum() * 0.0)
        engine.step()
    if config.zero_stage in (1, 2):
        # DeepSpeed links the moments after the first parameter group's step, when the second group has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    _set_step(engine, 0)
    restore_loss_scaler(engine, config, before)
    if config.precision == "fp16":
        # At the smallest scale an overflow is a bad step like any other, not a reason to end here.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
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
