"""The learning rate by hand values, the parameter groups, and the running average of the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mrcnn_edu.config import TrainConfig
from mrcnn_edu.conventions import DETECTRON1, PAPER
from mrcnn_edu.training.schedule import WeightAverage, build_optimiser, learning_rate, parameter_groups
from mrcnn_edu.training.schedule import set_learning_rate as set_rate

STEP = TrainConfig(iterations=100, learning_rate=0.02, warmup_iterations=10, warmup_factor=0.1, steps=(60, 80))
COSINE = TrainConfig(iterations=110, learning_rate=0.02, warmup_iterations=10, warmup_factor=0.1, schedule="cosine")


# By hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 0.002), (5, 0.011), (9, 0.0182), (10, 0.02), (59, 0.02), (60, 0.002), (79, 0.002), (80, 2e-4), (99, 2e-4)],
)
def test_step_schedule_by_hand(iteration: int, rate: float) -> None:
    assert learning_rate(iteration, STEP) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 0.002), (5, 0.011), (10, 0.02), (35, 0.01 * (1 + math.sqrt(0.5))), (60, 0.01), (110, 0.0), (500, 0.0)],
)
def test_cosine_schedule_by_hand(iteration: int, rate: float) -> None:
    assert learning_rate(iteration, COSINE) == pytest.approx(rate, rel=1e-12, abs=1e-18)


def test_the_defaults_are_the_papers() -> None:
    """Section 3.1: 160k iterations at 0.02, divided by 10 at 120k."""
    config = TrainConfig()
    assert learning_rate(119_999, config) == 0.02
    assert learning_rate(120_000, config) == pytest.approx(0.002)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert learning_rate(0, replace(STEP, warmup_iterations=0)) == 0.02
    assert learning_rate(0, replace(COSINE, warmup_iterations=0)) == 0.02


def test_a_warmup_longer_than_the_run_only_warms_up() -> None:
    config = replace(COSINE, iterations=5)
    assert [learning_rate(i, config) for i in range(5)] == pytest.approx([0.002, 0.0038, 0.0056, 0.0074, 0.0092])


# The optimiser -------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.GroupNorm(1, 4))


def test_groups_follow_the_conventions() -> None:
    model = small()
    config = TrainConfig(weight_decay=0.1)
    weights, biases, norms = parameter_groups(model, replace(config, norm_decay=False), DETECTRON1)
    assert [p.shape for p in weights["params"]] == [model[0].weight.shape, model[2].weight.shape]
    assert len(biases["params"]) == 2
    assert len(norms["params"]) == 4
    assert (weights["weight_decay"], biases["weight_decay"], norms["weight_decay"]) == (0.1, 0.0, 0.0)
    assert (weights["lr_factor"], biases["lr_factor"], norms["lr_factor"]) == (1.0, 2.0, 1.0)
    assert [group["weight_decay"] for group in parameter_groups(model, config, PAPER)] == [0.1, 0.1, 0.1]


def test_frozen_and_shared_parameters() -> None:
    model = small()
    model[0].requires_grad_(False)
    model.append(model[2])
    found = [p for group in parameter_groups(model, TrainConfig(), PAPER) for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found) == 6


def test_a_wholly_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimiser(small().requires_grad_(False), TrainConfig(), PAPER)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_step_by_hand(name: str) -> None:
    """SGD moves by rate x gradient (twice that for the bias); AdamW's first step is the rate itself."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    config = TrainConfig(optimiser=name, weight_decay=0.0)
    optimiser = build_optimiser(model, config, DETECTRON1)
    set_rate(optimiser, 0.01)
    model(torch.tensor([[3.0]])).sum().backward()  # gradients: 3 for the weight, 1 for the bias
    optimiser.step()
    moved = 0.03 if name == "sgd" else 0.01
    assert model.weight.item() == pytest.approx(1 - moved, abs=1e-6)
    assert model.bias.item() == pytest.approx(1 - 0.02, abs=1e-6)


# The average ---------------------------------------------------------------------------------------------------------


def test_average_by_hand() -> None:
    """Shares 1, 10/11, 10/12 with a long memory: the first update copies, the random start is forgotten."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.999)
    expected = 0.0
    for value, share in [(2.0, 1.0), (4.0, 10 / 11), (8.0, 10 / 12)]:
        nn.init.constant_(model.weight, value)
        average.update(model)
        expected += share * (value - expected)
    assert average.model.weight.item() == pytest.approx(expected)
    assert average.updates == 3


def test_average_of_constant_weights_is_those_weights() -> None:
    model = small()
    model[1].running_mean += 3
    model[1].num_batches_tracked += 7
    average = WeightAverage(copy.deepcopy(model), 0.9)
    nn.init.zeros_(average.model[0].weight)
    for _ in range(5):
        average.update(model)
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert model.training


def test_average_spans_the_last_tenth_then_the_decay() -> None:
    """A jump from 0 to 1 is forgotten to 1/e after about a tenth of the run, or after 1 / (1 - decay) updates."""
    for decay, before, span in [(0.9999, 1000, 100), (0.95, 1000, 20)]:
        model = nn.Linear(1, 1, bias=False)
        average = WeightAverage(model, decay)
        nn.init.zeros_(model.weight)
        for _ in range(before):
            average.update(model)
        nn.init.ones_(model.weight)
        for _ in range(span):
            average.update(model)
        assert 1 - average.model.weight.item() == pytest.approx(math.exp(-1), abs=0.03)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, math.nan])
def test_average_refuses_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        WeightAverage(nn.Linear(1, 1), decay)
