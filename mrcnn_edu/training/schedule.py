"""How far the weights move in one iteration: the learning rate, the optimiser and the running average of the weights.

Chapter 13 (training). Paper: Section 3.1, "Training", and Appendix A.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor, nn

from mrcnn_edu.config import TrainConfig
from mrcnn_edu.conventions import Conventions

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(iteration: int, config: TrainConfig) -> float:
    """The learning rate of an iteration, counted from 0: a linear warm-up, then steps or half a cosine.

    The warm-up rises in a straight line from ``warmup_factor`` of the rate to the rate itself, which it reaches at
    iteration ``warmup_iterations`` (Goyal et al. 2017, Section 2.2). "step" multiplies by ``gamma`` from each iteration
    of ``steps`` on; "cosine" falls from the end of the warm-up to 0 at ``iterations`` (Loshchilov and Hutter 2017).
    """
    if config.schedule == "step":
        rate = config.learning_rate * config.gamma ** sum(iteration >= step for step in config.steps)
    else:
        falling = max(config.iterations - config.warmup_iterations, 1)
        progress = min(max((iteration - config.warmup_iterations) / falling, 0.0), 1.0)
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations
        rate *= config.warmup_factor + (1 - config.warmup_factor) * progress
    return rate


def linear_rule(config: TrainConfig, batch_size: int) -> TrainConfig:
    """The same training with other batches: k times as large, at k times the rate, for a k-th of the iterations.

    batch_size  images per iteration over all processes

    Warm-up and steps are shortened alike, so the run passes over the images as often as before. Raises ValueError for
    AdamW, which has no such rule. Source: Goyal et al. 2017, "Accurate, large minibatch SGD", Section 2.1.
    """
    if config.optimiser != "sgd":
        raise ValueError(
            f"the linear rule is one of SGD, not of {config.optimiser}: set train.batch_size and "
            "train.learning_rate yourself"
        )
    factor = batch_size / config.batch_size
    return replace(
        config,
        batch_size=batch_size,
        learning_rate=config.learning_rate * factor,
        iterations=max(1, round(config.iterations / factor)),
        steps=tuple(sorted({round(step / factor) for step in config.steps})),
        warmup_iterations=round(config.warmup_iterations / factor),
    )


def in_words(config: TrainConfig, images: int, processes: int) -> str:
    """What a run is about to do, in one line: the global batch, the rate and the passes over the images."""
    at_once = config.batch_size // (processes * config.accumulate)
    steps = f", times {config.gamma:g} from {', '.join(map(str, config.steps))} on" if config.schedule == "step" else ""
    return (
        f"{config.iterations} iterations of {config.batch_size} images "
        f"({processes} {'process' if processes == 1 else 'processes'} x {config.accumulate} x {at_once}), "
        f"{config.iterations * config.batch_size / images:.1f} passes over {images} images; {config.optimiser}, "
        f"rate {config.learning_rate:g} after {config.warmup_iterations} iterations{steps}"
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this rate times the group's own ``lr_factor``."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_factor"]


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser
# ---------------------------------------------------------------------------------------------------------------------


def build_optimiser(model: nn.Module, config: TrainConfig, conventions: Conventions) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the parameters that are not frozen, in PyTorch's fused form (three times faster).

    Raises ValueError when everything is frozen.
    """
    groups = parameter_groups(model, config, conventions)
    if not groups:
        raise ValueError("the model has no parameter with requires_grad=True, so there is nothing to train")
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def parameter_groups(model: nn.Module, config: TrainConfig, conventions: Conventions) -> list[dict]:
    """The trainable parameters in up to three groups that differ in weight decay and learning rate.

    weights  decayed
    biases   decayed if ``conventions.bias_decay``; their learning rate is ``conventions.bias_lr_factor`` times the rate
    norms    scale and shift of normalisation layers, decayed if ``config.norm_decay``

    Each group has an ``lr_factor`` beside PyTorch's own keys. Empty groups are left out.
    """
    parameters: dict[str, list[Tensor]] = {"weights": [], "biases": [], "norms": []}
    seen: set[int] = set()  # a parameter shared by two modules is still one parameter
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "norms" if isinstance(module, NORMS) else "biases" if name == "bias" else "weights"
            parameters[kind].append(parameter)
    decayed = {"weights": True, "biases": conventions.bias_decay, "norms": config.norm_decay}
    factors = {"weights": 1.0, "biases": conventions.bias_lr_factor, "norms": 1.0}
    return [
        {
            "name": kind,
            "params": parameters[kind],
            "weight_decay": config.weight_decay if decayed[kind] else 0.0,
            "lr_factor": factors[kind],
        }
        for kind in parameters
        if parameters[kind]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The running average of the weights
# ---------------------------------------------------------------------------------------------------------------------


class WeightAverage:
    """A copy of the model whose weights are a moving average of the trained ones: often a point or two of AP for free.

    After u updates the newest weights enter with a share of ``max(1 - decay, 10 / (10 + u))``. The first term alone
    is the usual exponential average, which in a short run would still remember the random start; the second makes
    the average span about the last tenth of the run until that is longer than ``1 / (1 - decay)`` iterations
    (polynomial-decay averaging, Shamir and Zhang 2013). The very first update copies the weights.

    model    the averaged model, in evaluation mode, without gradients
    updates  how often ``update`` was called
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a weight average must lie between 0 and 1, got {decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the weights of ``model`` enter; statistics of batch norms are averaged alike, counters are copied."""
        share = max(1 - self.decay, 10 / (10 + self.updates))
        averages = [*self.model.parameters(), *self.model.buffers()]
        newest = [*model.parameters(), *model.buffers()]
        moving = [a.is_floating_point() for a in averages]
        torch._foreach_lerp_([*compress(averages, moving)], [*compress(newest, moving)], share)  # one call for all
        for average, new, moves in zip(averages, newest, moving):
            if not moves:
                average.copy_(new)
        self.updates += 1
