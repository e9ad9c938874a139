"""Training: ``loop`` is all of it, on one page.

Chapter 13 (training). Paper: Section 3.1, "Training", and Appendix A.

``train`` puts a frame around the loop: ``setup.start`` checks and sets up, ``finish`` measures and leaves the weights.
In between, ``validate`` and ``evaluate`` look at the model without touching the run. Everything that changes from one
iteration to the next is a ``checkpoint.Run``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrcnn_edu.config import Config, LossWeights, TrainConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import Batch, train_loader, val_loader
from mrcnn_edu.evaluation.measure import count, predict_all
from mrcnn_edu.evaluation.proposals import recall
from mrcnn_edu.inference import evaluating
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import ImageBatch, Target
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.checkpoint import Run, write_json
from mrcnn_edu.training.distributed import connected, restarted
from mrcnn_edu.training.export import export_weights
from mrcnn_edu.training.proposals import EVERYTHING, Task, propose_dataset
from mrcnn_edu.training.randomness import rng_state, seed_rng, set_rng_state
from mrcnn_edu.training.record import Record, Silence, peak_memory_mib
from mrcnn_edu.training.schedule import in_words, learning_rate, set_learning_rate
from mrcnn_edu.training.setup import start
from mrcnn_edu.training.stopping import Stopped, StopSignals

MIN_LOSS_SCALE = 1.0  # fp16 gradients that overflow even at this scale are not the scale's fault
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    config: Config,
    model: MaskRCNN,
    train_data: CocoDataset,
    val_data: CocoDataset | None,
    out: Path | str,
    resume: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
    task: Task = EVERYTHING,
) -> dict[str, Any]:
    """Train a model, and return what was measured; ``out`` then holds the run, ``weights.safetensors`` included.

    model     built from ``config.model``; trained in place, and on return it holds the weights that were evaluated
    val_data  images for the validation loss and for AP; None: neither
    out       folder for the run, made if need be
    resume    continue from the last checkpoint in ``out``, to the bit on a CPU; from the start where there is none
    progress  show a bar, or a few lines where there is no terminal
    device    "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one
    task      which losses, on whose proposals, see ``stages``; parts of the model with frozen weights stay as they are

    Started by torchrun, all its processes call this with the same arguments; started again by it, they resume.

    Raises ValueError for a model, data or a checkpoint that do not fit the config, OSError when ``out`` cannot be used,
    FloatingPointError when a loss or a gradient is not finite, ``Elsewhere`` when another process failed. Ctrl-C and
    SIGTERM end the iteration, save and leave.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, as presets.preset gives one, got {type(config).__name__}")
    folder, settings = Path(out), config.train
    with connected(device) as world:
        run, rng = start(config, model, train_data, val_data, folder, resume or restarted(), device, world)
        stream = train_loader(
            train_data,
            config.data,
            settings.batch_size // settings.accumulate,
            settings.seed,
            run.iteration * settings.accumulate,
            world.rank,
            world.size,
        )
        with (
            StopSignals() as signals,
            Record(folder, settings, run.iteration, progress) if world.rank == 0 else Silence() as record,
            closing(stream) as batches,
        ):
            record.say(in_words(settings, len(train_data), world.size))
            set_rng_state(rng)  # last of all, so that nothing that was set up has drawn from it
            try:
                loop(run, batches, config, train_data, val_data, folder, signals, record, task)
                return finish(run, config, train_data, val_data, folder, signals, record, task)
            except Stopped as stopped:
                save(run, config, train_data, folder)
                message = f"stopped after iteration {run.iteration}; {run.saved} is saved, resume continues from it"
                record.say(message)
                raise stopped.as_exit(message) from None


def loop(
    run: Run,
    batches: Iterator[Batch],
    config: Config,
    train_data: CocoDataset,
    val_data: CocoDataset | None,
    folder: Path,
    signals: StopSignals,
    record: Record,
    task: Task,
) -> None:
    """The training loop: batch, losses, gradients, step; and every so often a checkpoint and a look at the results."""
    settings = config.train
    for iteration in range(run.iteration, settings.iterations):
        began, loading, values, images = time.perf_counter(), 0.0, [], []
        rate = learning_rate(iteration, settings)
        set_learning_rate(run.optimiser, rate)
        run.optimiser.zero_grad()
        for part in range(1, settings.accumulate + 1):
            waiting = time.perf_counter()
            with run.world.together(), signals.at_once():  # nothing is drawn at random before all have their images
                batch, targets, image_ids = next(batches)
            loading += time.perf_counter() - waiting
            images += image_ids
            batch, targets = to_device(batch, targets, run, settings)
            with gradients_kept(run, part < settings.accumulate):
                with run.world.together():
                    with autocast(run, settings):
                        losses = run.replica(batch, targets, task.training(batch, image_ids), task.losses)
                    values.append(finite_losses(losses, run, image_ids))
                run.scaler.scale(total(losses, settings.loss_weights) / settings.accumulate).backward()

        with run.world.together():
            run.scaler.unscale_(run.optimiser)
            norm = clip_gradients(run, settings, images)
        run.scaler.step(run.optimiser)
        run.scaler.update()
        if run.average is not None:
            run.average.update(run.model)

        run.iteration += 1
        seconds = time.perf_counter() - began
        run.seconds += seconds
        record.step(run, run.world.mean(mean_of(values)), rate, norm, settings.batch_size, seconds, loading)
        if due(settings.checkpoint_every, run, settings):
            save(run, config, train_data, folder)
        if val_data is not None and due(settings.validate_every, run, settings):
            record.result(run.iteration, "validation", validate(run, config, val_data, signals, task))
        if val_data is not None and due(settings.evaluate_every, run, settings):
            record.result(run.iteration, "evaluation", evaluate(run, config, val_data, signals, task))
    save(run, config, train_data, folder)
    with run.world.together():
        signals.check()


# ---------------------------------------------------------------------------------------------------------------------
# In the loop
# ---------------------------------------------------------------------------------------------------------------------


def to_device(
    batch: ImageBatch, targets: list[Target], run: Run, settings: TrainConfig
) -> tuple[ImageBatch, list[Target]]:
    """A batch where the model is, in its memory layout."""
    batch = batch.to(run.device, non_blocking=True)
    if settings.channels_last:
        batch = replace(batch, pixels=batch.pixels.contiguous(memory_format=torch.channels_last))
    return batch, [target.to(run.device, non_blocking=True) for target in targets]


def gradients_kept(run: Run, more: bool) -> AbstractContextManager[None]:
    """While there is more to accumulate the processes keep their gradients; the last part's backward pass joins them.

    An iteration's loss is the mean over all parts of all processes, of which each averages over its own images. So it
    is the paper's, with 2 images per GPU, however many processes and parts make up the batch.
    """
    return run.replica.no_sync() if more and run.world.size > 1 else nullcontext()


def autocast(run: Run, settings: TrainConfig) -> torch.autocast:
    """The block in which convolutions and matrix products run at the chosen precision."""
    enabled = settings.precision != "fp32"
    return torch.autocast(run.device.type, AUTOCAST[settings.precision] if enabled else None, enabled=enabled)


def total(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The one number that training minimises: the sum of the losses, each times its weight."""
    return sum(getattr(weights, name) * loss for name, loss in losses.items())


def finite_losses(losses: dict[str, Tensor], run: Run, image_ids: list[int]) -> dict[str, float]:
    """The losses as numbers; FloatingPointError if one is not finite, before it can reach a weight."""
    values = dict(zip(losses, torch.stack([loss.detach().float() for loss in losses.values()]).tolist()))
    if not all(math.isfinite(value) for value in values.values()):
        found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise FloatingPointError(f"a loss is not finite: {found}; {where(run, image_ids)}")
    return values


def mean_of(parts: list[dict[str, float]]) -> dict[str, float]:
    """The losses of an iteration: the mean of those of its parts."""
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


def clip_gradients(run: Run, settings: TrainConfig, image_ids: list[int]) -> float:
    """Scale the gradients so that their common norm is at most ``clip_norm``; the norm before that.

    Raises FloatingPointError when it is not finite. With fp16 it may be: the scaler then skips the step and halves its
    scale, and only when there is nothing left to halve does the run stop.
    """
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if not math.isfinite(norm) and not (run.scaler.is_enabled() and run.scaler.get_scale() > MIN_LOSS_SCALE):
        named = run.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        found = f"first in {bad[0]}" if bad else "too large to be squared"
        raise FloatingPointError(f"the gradient is not finite, {found}; {where(run, image_ids)}")
    if settings.clip_norm is not None and norm > settings.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
    return norm.item()


def where(run: Run, image_ids: list[int]) -> str:
    """The part of an error message that tells where training broke and what is left of it."""
    kept = f"the last good checkpoint is {run.saved}" if run.saved else "there is no checkpoint yet"
    return (
        f"iteration {run.iteration + 1}, images {list(image_ids)}; {kept}. Look at those images' annotations, "
        f"lower train.learning_rate, lengthen train.warmup_iterations or set train.clip_norm"
    )


def due(every: int, run: Run, settings: TrainConfig) -> bool:
    """Whether the completed iterations are a multiple of ``every``; never at the end, which ``finish`` looks after."""
    return every > 0 and run.iteration % every == 0 and run.iteration < settings.iterations


def save(run: Run, config: Config, train_data: CocoDataset, folder: Path) -> None:
    """Write a checkpoint, unless there is one of this very iteration."""
    if run.saved is None or checkpoint.iteration_of(run.saved) != run.iteration:
        data, rngs = checkpoint.fingerprint(train_data), run.world.gather(rng_state())
        state = checkpoint.capture(run, config, train_data.categories, data, rngs)
        run.saved = run.world.from_first(lambda: checkpoint.save(folder, state))


# ---------------------------------------------------------------------------------------------------------------------
# Looking at the results
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def untouched(run: Run, settings: TrainConfig) -> Iterator[MaskRCNN]:
    """The model to evaluate, in evaluation mode; after the block the run goes on as if it had not been.

    That is the averaged model where there is one. Random numbers start from the seed each time, so that two validation
    losses differ because the model does, not because other anchors were drawn.
    """
    rng = rng_state()
    seed_rng(settings.seed)
    model = run.model if run.average is None else run.average.model
    run.world.share_buffers(model)
    try:
        with evaluating(model):
            yield model
    finally:
        set_rng_state(rng)


def validate(
    run: Run, config: Config, val_data: CocoDataset, signals: StopSignals, task: Task = EVERYTHING
) -> dict[str, float]:
    """The mean of each loss over all validation images, and their sum ``total``."""
    sums: dict[str, float] = {}
    with untouched(run, config.train) as model, run.world.together(patiently=True), signals.at_once(), torch.no_grad():
        for batch, targets, image_ids in val_loader(
            val_data, config.data, config.train.batch_size, run.world.rank, run.world.size
        ):
            batch, targets = to_device(batch, targets, run, config.train)
            with autocast(run, config.train):
                losses = model(batch, targets, task.validation(batch, image_ids), task.losses)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item() * len(batch)
    parts = [part for part in run.world.gather(sums) if part]  # a process without images has no sums
    means = {name: sum(part[name] for part in parts) / len(val_data) for name in parts[0]}
    return means | {"total": sum(means.values())}


def evaluate(
    run: Run, config: Config, val_data: CocoDataset, signals: StopSignals, task: Task = EVERYTHING
) -> dict[str, Any]:
    """COCO's AP and AR of the model on the validation images, for every branch it has; recall where only the RPN is."""
    with untouched(run, config.train) as model:
        if not task.trains_heads:  # every process measures alike
            with run.world.together(patiently=True), signals.at_once():
                return {"proposals": recall(val_data, propose_dataset(model, val_data, config.data))}
        results, _ = predict_all(
            model, val_data, config.data, run.world, interruptible=signals.at_once, proposals=task.val_proposals
        )
        return count(val_data, results, run.world, interruptible=signals.at_once).to_json()


def finish(
    run: Run,
    config: Config,
    train_data: CocoDataset,
    val_data: CocoDataset | None,
    folder: Path,
    signals: StopSignals,
    record: Record,
    task: Task,
) -> dict[str, Any]:
    """Measure the final model, leave its weights, and sum the run up."""
    summary = {"iterations": run.iteration, "seconds": run.seconds, "training": record.last}
    if val_data is not None:
        for name, measure in (("validation", validate), ("evaluation", evaluate)):
            summary[name] = measure(run, config, val_data, signals, task)
            record.result(run.iteration, name, summary[name])
    if run.average is not None:
        run.model.load_state_dict(run.average.model.state_dict())
    run.world.share_buffers(run.model)
    run.model.eval()
    summary |= {"memory_mib": peak_memory_mib(), "checkpoint": str(run.saved)}

    def write() -> dict[str, Any]:
        export_weights(run.model, folder / "weights.safetensors", train_data.categories)
        write_json(folder / "metrics.json", summary)
        return summary

    return run.world.from_first(write)
