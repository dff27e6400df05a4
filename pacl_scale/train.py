"""Train the vision embedder: ``python -m pacl_scale.train --config configs/train/demo.yaml``.

The run directory is the interface: ``config.yaml`` (resolved), ``environment.json``, ``metrics.jsonl``,
``train.<attempt>.log`` and ``checkpoints/``. Started again with the same run directory, training resumes from
the newest whole checkpoint; the same samples follow, whatever the number of ranks.

SIGUSR1, SIGUSR2 and SIGTERM, at any rank, make all ranks save after the step they are in and end with exit status 75:
start the run again.

Shapes: b pictures on this rank, B in the global batch, T patches, Din / D width of tokens / text vectors.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pacl_scale import checkpoint, config, distributed, engine, health, log, metrics, signals, storage
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.distributed import DistributedConfig, World
from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import TextEncoderConfig, VisionConfig
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import EXIT_REQUEUE, UserError, run_command
from pacl_scale.frozen import Frozen, frozen_towers, peak_seconds_of_a_pair
from pacl_scale.loss import LossConfig, PACLLoss
from pacl_scale.model import PACLModel, build_embedder
from pacl_scale.optim import OptimConfig, learning_rate
from pacl_scale.recorders import Profile, RecordConfig, Recorders
from pacl_scale.resume import checkpoint_folder, open_run
from pacl_scale.signals import StopRequest
from pacl_scale.step import encode, gradient_norm, train_step
from pacl_scale.unfreeze import UnfreezeConfig, build_text_embedder
from pacl_scale.validate import ValidateConfig, Validation

MODULE = "pacl_scale.train"
logger = log.get_logger(MODULE)


@dataclass
class TrainConfig:
    """Train the PACL vision embedder on frozen encoders from image-caption pairs."""

    run: str = "runs/train"
    """Run directory; an existing one is resumed."""

    steps: int = 1000
    """Optimizer steps in all."""

    global_batch_size: int = 4096
    """Pictures per step over all ranks and accumulated micro-batches; every other one is a negative."""

    micro_batch_size: int | None = None
    """Pictures per forward pass on a rank; null takes the rank's whole share. Smaller saves memory, not negatives."""

    seed: int = 0
    """Seed of the embedder's initial weights and of the order, captions and patches drawn."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is not finite, and which are skipped, before the run ends."""

    data: DataConfig = field(default_factory=DataConfig)
    """Where the pairs come from."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Frozen vision tower."""

    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Frozen text tower."""

    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    """Trainable vision embedder."""

    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)
    """What else is trained."""

    loss: LossConfig = field(default_factory=LossConfig)
    """Compatibility function and InfoNCE."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    validate: ValidateConfig = field(default_factory=ValidateConfig)
    """A small evaluation while training goes on."""

    record: RecordConfig = field(default_factory=RecordConfig)
    """Where measurements go beside metrics.jsonl."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Processes and devices."""

    def __post_init__(self) -> None:
        if min(self.steps, self.global_batch_size, self.log_every, self.max_bad_steps) < 1:
            raise ValueError("steps, global_batch_size, log_every and max_bad_steps must be at least 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError("micro_batch_size must be at least 1")
        if not storage.is_local(self.run):
            raise ValueError("run is a folder of this machine's; checkpoint.folder may be a URL")
        if self.validate.every_steps and self.engine.shard_towers:
            # One rank measures, and a sharded tower needs them all.
            raise ValueError(
                "validate.every_steps and engine.shard_towers exclude each other; evaluate the checkpoints"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings: TrainConfig = config.parse(TrainConfig, words, "python -m pacl_scale.train")
    if distributed.needs_launch(settings.distributed):
        accumulation_of(settings, settings.distributed.ranks)
        return distributed.launch(settings.distributed, MODULE, words)
    with distributed.joined(settings.distributed) as world, signals.heard() as stop:
        return 0 if train(settings, world, stop) else EXIT_REQUEUE


def train(settings: TrainConfig, world: World, stop: StopRequest | None = None) -> bool:
    """Build, restore, loop. Collective: every rank of ``world`` calls it with the same ``settings``.

    Returns:
        Whether all steps are done; if not, a rank's ``stop`` was set, and the state after its step is saved.

    Raises:
        UserError: shapes that do not divide, data or checkpoints that cannot be used.
        RunFailed: a rank is gone, or too many steps in a row were not finite.
    """
    accumulation = accumulation_of(settings, world.size)
    run = Path(settings.run)
    with ExitStack() as resources:
        progress = health.Progress()
        resources.enter_context(health.lost_peers_named(world, progress))
        resume_from = open_run(settings, run, world)
        batch_size = settings.global_batch_size
        stream = storage.patiently(PairStream, settings.data, settings.seed, batch_size, world)
        resources.enter_context(stream)
        frozen = frozen_towers(settings, stream, world)
        peak_s = peak_seconds_of_a_pair(settings, frozen, stream, world, accumulation)

        torch.manual_seed(settings.seed)
        model = model_of(settings, frozen).to(world.device)
        micro_batch_size = settings.global_batch_size // world.size // accumulation
        trainer = engine.start(settings.engine, settings.optim, model, world, micro_batch_size, accumulation)
        loss_of = PACLLoss(settings.loss)

        first_step, updates, overflows, bad = 1, 0, 0, 0
        if resume_from:
            info, state = storage.patiently(checkpoint.load, resume_from)
            first_step, updates = info["step"] + 1, info.get("updates", info["step"])
            overflows, bad = info.get("overflows", 0), info.get("bad_steps", 0)
            engine.restore_state(trainer, settings.engine, state, updates)
            engine.restore_loss_scaler(trainer, settings.engine, info.get("loss_scaler", {}))
            stream.load_state(info["data"])
            logger.info("resumed", checkpoint=resume_from, step=info["step"], position=info["data"]["position"])

        lines = metrics.MetricsFile(run / "metrics.jsonl", first_step - 1) if world.is_main else None
        recorders = None
        if world.is_main:
            recorders = Recorders(settings.record, run, config.to_dict(settings), resources, first_step)
        profile = Profile(settings.record, run, world, first_step)
        resources.callback(profile.close)
        writer = checkpoint.Writer(checkpoint_folder(settings), settings.checkpoint)
        resources.callback(writer.close)
        validation = None
        if settings.validate.every_steps and world.is_main:
            validation = validation_of(settings, frozen, run, world, first_step - 1)
            writer.best = validation.best_step
        bad_steps = health.BadSteps(run / "bad", world, settings.max_bad_steps, bad)
        batches = iter(stream)
        clock = metrics.Clock()
        for step in log.progress(range(first_step, settings.steps + 1), "train", unit="step"):
            progress.step, progress.doing = step, "waiting for data"
            lr = learning_rate(settings.optim, step - 1, settings.steps)
            engine.set_learning_rate(trainer, lr)
            profile.begin(step)
            with clock.waiting():
                batch = next(batches)
            with clock.working():
                progress.doing = "encoding"
                micro_batches = list(encode(batch, frozen.vision, frozen.text, world.device, micro_batch_size))
                progress.doing = "computing the loss and its gradient"
                logged = step % settings.log_every == 0 or step in (1, settings.steps)
                result = train_step(trainer, loss_of, micro_batches, measure=logged and world.is_main)
            if result.updated:
                updates += 1
                bad_steps.good()
            elif math.isfinite(result.loss) and engine.overflowed(trainer, settings.engine):
                overflows += 1
            else:
                tokens, texts = (torch.cat([getattr(m, part) for m in micro_batches]) for part in ("tokens", "texts"))
                bad_steps.bad(step, result.loss, batch.keys, tokens, texts)
            profile.end(step)
            if lines and recorders and logged:
                values: dict[str, Any] = {"step": step, "loss": result.loss, "lr": lr}
                values |= {"logit_scale": result.logit_scale, "attention_entropy": result.attention_entropy}
                values |= {"grad_norm": gradient_norm(trainer), "position": batch.position_after}
                values |= clock.read(settings.global_batch_size, world.size, peak_s)
                values |= {"retried": sum(stream.retried.values()), "skipped": sum(stream.skipped.values())}
                values["bad_steps"] = bad_steps.count
                values |= engine.scaling(trainer, settings.engine, overflows) | metrics.memory(world.device)
                lines.write(values)
                recorders.write(values)
                logger.info("step", **{k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
            progress.doing = "agreeing on what is next"
            agreed = health.agree(world, stop=bool(stop), save=world.is_main and writer.minutes_passed())
            done = step == settings.steps
            save = agreed.save or agreed.stop or done or step % settings.checkpoint.every_steps == 0
            # Who is asked to stop has little time left.
            look = settings.validate.due(step, done) and not agreed.stop
            if save or look:
                progress.doing = "gathering the state for a checkpoint"
                state = engine.gather_state(trainer, settings.engine)
            best = False
            if look and validation and recorders:
                figures = validation.measure(step, state["master"], frozen.widths, settings.embedder, settings.loss)
                recorders.write({"step": step} | {f"validation/{name}": value for name, value in figures.items()})
                best = validation.is_best(step, figures)
            if world.is_main and (save or best):
                info = {"config": config.to_dict(settings), "data": stream.state_after(batch), "updates": updates}
                info |= {"overflows": overflows, "bad_steps": bad_steps.count}
                info["loss_scaler"] = engine.loss_scaler(trainer, settings.engine)
                note_best = validation.note_best() if best and validation else None
                writer.save(step, state, info | {"revision": metrics.revision(), **frozen.made_for}, note_best)
            if agreed.stop or done:
                progress.doing = "waiting until the last checkpoint is written"
                writer.wait()
                # A launcher ends what is left soon after the first rank: nobody leaves before the write is done.
                if world.size > 1:
                    torch.distributed.barrier()
            if agreed.stop and not done:
                logger.info("stopped", why=stop.name if stop else "another rank was asked to", step=step)
                return False
            if step == first_step:
                engine.set_collective_timeout(trainer, settings.distributed.step_timeout_minutes)
    if world.is_main:
        logger.info("trained", run=str(run), steps=settings.steps)
    return True


def model_of(settings: TrainConfig, frozen: Frozen) -> PACLModel:
    """Everything that is trained, as it is at the start."""
    unfreeze = settings.unfreeze
    embedder = build_embedder(settings.embedder, *frozen.widths)
    texts = build_text_embedder(unfreeze, frozen.widths[1])
    return PACLModel(embedder, settings.loss, frozen.tail, texts, unfreeze.tower_lr_share)


def validation_of(settings: TrainConfig, frozen: Frozen, run: Path, world: World, begun: int) -> Validation:
    """The small evaluation of a run; of the main rank."""
    towers = {"vision": settings.vision, "text": settings.text}
    folder, dtype = checkpoint_folder(settings), settings.engine.dtype
    held = (frozen.look, frozen.text, settings.unfreeze)
    return Validation(settings.validate, towers, *held, run, folder, world.device, dtype, begun)


def accumulation_of(settings: TrainConfig, world_size: int) -> int:
    """Micro-batches per step and rank.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    share, rest = divmod(settings.global_batch_size, world_size)
    micro = settings.micro_batch_size or share
    if rest or share % micro:
        raise UserError(
            f"global_batch_size {settings.global_batch_size} is not a multiple of {world_size} ranks"
            + (f" x micro_batch_size {micro}" if not rest else "")
        )
    return share // micro


if __name__ == "__main__":
    sys.exit(run_command(main))
