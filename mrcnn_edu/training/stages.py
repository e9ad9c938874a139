"""Training procedures as data: a tuple of stages, each of them one call of the one loop.

Chapter 13 (training) and Chapter 16 (training in stages). Paper: Section 3.1 (``STAGEWISE``, its default),
Section 4.4 after [36] (``FOUR_STEP``) and Appendix B after [37] (``END_TO_END``).

A model has three parts, "backbone", "rpn" and "heads" (everything else). A stage trains some of them and leaves the
others as they are, so "train separately" and "share features" are a matter of who starts where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mrcnn_edu.config import Config
from mrcnn_edu.data.coco import CategoryMap, CocoDataset
from mrcnn_edu.fields import to_json
from mrcnn_edu.losses import ALL_LOSSES, HEAD_LOSSES, RPN_LOSSES, any_of
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.models.unshared import Unshared
from mrcnn_edu.training.checkpoint import check_state, write_json
from mrcnn_edu.training.distributed import World, connected, restarted
from mrcnn_edu.training.export import load_model
from mrcnn_edu.training.loop import train
from mrcnn_edu.training.proposals import SavedProposals, Task, propose_dataset, save_proposals
from mrcnn_edu.training.setup import choose_device

Part = Literal["backbone", "rpn", "heads"]
PARTS: tuple[Part, ...] = ("backbone", "rpn", "heads")


class Stage(NamedTuple):
    """One run of the loop.

    name       of the stage, and of its folder
    train      the parts that are trained; the others stay as they are, statistics included
    losses     those that are computed and summed; None: all
    proposals  the earlier stage whose RPN proposes, once, before this stage begins; None: this model's own RPN, live
    init       the earlier stage a part is taken from, ``{"backbone": "heads-1"}``; parts left out start as the model
               that was handed in, from ImageNet weights or at random
    """

    name: str
    train: tuple[Part, ...] = PARTS
    losses: tuple[str, ...] | None = None
    proposals: str | None = None
    init: Mapping[Part, str] = {}


# Section 3.1: RPN and Mask R-CNN are trained one after the other and share nothing, each with a backbone of its own.
STAGEWISE = (
    Stage("rpn", ("backbone", "rpn"), RPN_LOSSES),
    Stage("heads", ("backbone", "heads"), HEAD_LOSSES, proposals="rpn"),
)

# Section 4.4, after [36]: the same twice, the second time on the one backbone of step 2, which no longer moves.
FOUR_STEP = (
    Stage("rpn-1", ("backbone", "rpn"), RPN_LOSSES),
    Stage("heads-2", ("backbone", "heads"), HEAD_LOSSES, proposals="rpn-1"),
    Stage("rpn-3", ("rpn",), RPN_LOSSES, init={"backbone": "heads-2", "rpn": "rpn-1"}),
    Stage(
        "heads-4",
        ("heads",),
        HEAD_LOSSES,
        proposals="rpn-3",
        init={"backbone": "heads-2", "heads": "heads-2", "rpn": "rpn-3"},
    ),
)

# Appendix B, after [37]: jointly, "approximate" because no gradient goes through the coordinates of the rois.
END_TO_END = (Stage("joint"),)

PROCEDURES = {"stagewise": STAGEWISE, "four-step": FOUR_STEP, "end-to-end": END_TO_END}


def train_stages(
    stages: tuple[Stage, ...],
    config: Config,
    model: MaskRCNN,
    train_data: CocoDataset,
    val_data: CocoDataset | None,
    out: Path | str,
    resume: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Train a model stage by stage; the summary of each stage by its name.

    stages  ``STAGEWISE``, ``FOUR_STEP``, ``END_TO_END``, or your own
    model   where parts without an ``init`` start; afterwards it holds the weights of the last stage
    out     folder that gets stages.json, config.json and one folder per stage, as ``train`` leaves it; that of a stage
            that proposes gets proposals-train.safetensors and proposals-val.safetensors, one of each per process
    resume  continue: finished stages are taken as they are, one that was stopped goes on

    The other arguments are those of ``train``, which also says what is raised. ``load_stages`` reads the result.
    """
    check_stages(stages)
    out, weights, summaries = Path(out), {"start": _copy(model)}, {}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with connected(device) as world:
        resume = resume or restarted()
        world.from_first(lambda: _note(stages, config, out, resume))
        for stage in stages:
            folder, task = out / stage.name, Task(stage.losses)
            if stage.proposals is not None:
                model.load_state_dict(weights[stage.proposals])
                data = {"train": train_data, "val": val_data}
                task = Task(stage.losses, *_propose(model, config, data, out / stage.proposals, device, world))
            model.load_state_dict(initial(stage, weights))
            freeze(model, stage.train, trainable)
            done = world.from_first(lambda: _summary(folder) if resume else None)  # noqa: B023, called at once
            if done is not None:
                _load(model, folder)
            else:
                begun = resume and world.from_first(folder.exists)
                done = train(config, model, train_data, val_data, folder, begun, progress, device, task)
            summaries[stage.name], weights[stage.name] = done, _copy(model)
    freeze(model, PARTS, trainable)
    return summaries


def load_stages(out: Path | str) -> tuple[MaskRCNN | Unshared, CategoryMap]:
    """The finished result of ``train_stages`` in a folder, on the CPU and in evaluation mode, and its categories.

    One model where its RPN and its heads share a backbone, otherwise both networks as one ``Unshared``. Raises OSError
    for files that cannot be read, ValueError for what is no such folder.
    """
    out = Path(out)
    stages = read_stages(out)
    detector, categories = load_model(out / stages[-1].name / "weights.safetensors")
    proposing = proposer(stages)
    if proposing is None:
        return detector, categories
    return Unshared(load_model(out / proposing / "weights.safetensors")[0], detector).eval(), categories


def read_stages(out: Path) -> tuple[Stage, ...]:
    """The procedure by which a folder was trained. Raises OSError or ValueError for what is no such folder."""
    try:
        described = json.loads((out / "stages.json").read_text())["stages"]
        stages = tuple(Stage(**{**one, "train": tuple(one["train"])}) for one in described)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{out / 'stages.json'} describes no stages of training: {error}") from error
    check_stages(stages)
    return stages


# ---------------------------------------------------------------------------------------------------------------------
# What the data say
# ---------------------------------------------------------------------------------------------------------------------


def check_stages(stages: tuple[Stage, ...]) -> None:
    """Raise ValueError, naming the stage, for a procedure that cannot be run."""
    if not stages:
        raise ValueError("a training procedure needs at least one stage")
    earlier: list[str] = []
    for stage in stages:
        losses = set(ALL_LOSSES if stage.losses is None else stage.losses)
        problem = None
        if stage.name in earlier or stage.name == "start" or not stage.name:
            problem = f"a stage needs a name of its own, not used before and not 'start', got {stage.name!r}"
        elif not stage.train or not {*stage.train, *stage.init} <= set(PARTS):
            problem = f"parts are {', '.join(PARTS)}; got train {stage.train} and init {tuple(stage.init)}"
        elif not losses or not losses <= set(ALL_LOSSES):
            problem = f"losses are {', '.join(ALL_LOSSES)}; got {stage.losses}"
        elif any(source not in earlier for source in (*stage.init.values(), *filter(None, [stage.proposals]))):
            problem = f"proposals and init must name earlier stages ({', '.join(earlier) or 'there are none'})"
        elif ("rpn" in stage.train) != any_of(RPN_LOSSES, losses):
            problem = "the part 'rpn' and the losses of the RPN belong together"
        elif ("heads" in stage.train) != any_of(HEAD_LOSSES, losses):
            problem = "the part 'heads' and the losses of the heads belong together"
        if problem:
            raise ValueError(f"stage {stage.name!r}: {problem}")
        earlier.append(stage.name)


def part_of(name: str) -> Part:
    """The part a parameter or buffer belongs to, by its name in ``MaskRCNN.state_dict``."""
    first = name.split(".")[0]
    return first if first in ("backbone", "rpn") else "heads"


def freeze(model: nn.Module, train: tuple[Part, ...], trainable: Mapping[str, bool]) -> None:
    """Let exactly those parameters be trained that belong to these parts and were trainable to begin with."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in train and trainable[name])


def initial(stage: Stage, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights a stage begins with, from those of earlier stages and of "start"."""
    return {name: weights[stage.init.get(part_of(name), "start")][name] for name in weights["start"]}


def origin(part: Part, name: str, stages: tuple[Stage, ...]) -> str:
    """The stage that a part got its weights from, as it stands after the stage ``name``; "start" if none trained it."""
    stage = next((stage for stage in stages if stage.name == name), None)
    if stage is None or part in stage.train:
        return name
    return origin(part, stage.init.get(part, "start"), stages)


def proposer(stages: tuple[Stage, ...]) -> str | None:
    """The stage whose model must propose for that of the last stage; None where that one can by itself."""
    last = stages[-1]
    if last.proposals is None:
        return None
    shared = all(origin(p, last.name, stages) == origin(p, last.proposals, stages) for p in ("backbone", "rpn"))
    return None if shared else last.proposals


# ---------------------------------------------------------------------------------------------------------------------
# Between two stages
# ---------------------------------------------------------------------------------------------------------------------


def _propose(
    model: MaskRCNN,
    config: Config,
    data: Mapping[str, CocoDataset | None],
    folder: Path,
    device: torch.device | str | None,
    world: World,
) -> list[SavedProposals | None]:
    """Proposals for the training and for the validation images, out of the folder of the stage that proposes.

    Several processes share the images, and each writes a file for its own.
    """
    saved: list[SavedProposals | None] = []
    for name, dataset in data.items():
        if dataset is None:
            saved.append(None)
            continue
        if not world.from_first(lambda: _is_complete(folder, name, dataset)):  # noqa: B023, called at once
            part = "" if world.size == 1 else f"-{world.rank}-of-{world.size}"
            with world.together(patiently=True):
                model.to(choose_device(device, world))
                found = propose_dataset(model, dataset, config.data, name == "train", rank=world.rank, world=world.size)
                if found:
                    save_proposals(folder / f"proposals-{name}{part}.safetensors", found)
        saved.append(SavedProposals(*_files(folder, name)))
        saved[-1].check_covers(dataset.image_ids)
    return saved


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"proposals-{name}*.safetensors"))


def _is_complete(folder: Path, name: str, dataset: CocoDataset) -> bool:
    """Are the proposals of all images there? What a run that was stopped has left of them is removed."""
    try:
        SavedProposals(*_files(folder, name)).check_covers(dataset.image_ids)
    except ValueError:
        for path in _files(folder, name):
            path.unlink()
        return False
    return True


def _summary(folder: Path) -> dict[str, Any] | None:
    """What a finished stage has measured, or None while it is not finished."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def _copy(model: MaskRCNN) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _load(model: MaskRCNN, folder: Path) -> None:
    """Bring the model to the end of a finished stage."""
    finished, _ = load_model(folder / "weights.safetensors")
    check_state(model.state_dict(), finished.state_dict(), str(folder))
    model.load_state_dict(finished.state_dict())


def _note(stages: tuple[Stage, ...], config: Config, out: Path, resume: bool) -> None:
    """Write down the procedure; refuse to continue another one."""
    values = json.loads(json.dumps({"stages": [{**stage._asdict(), "init": dict(stage.init)} for stage in stages]}))
    path = out / "stages.json"
    if path.exists() and (not resume or json.loads(path.read_text()) != values):
        again = "was begun with other stages" if resume else "holds a run already; resume it"
        raise FileExistsError(f"{out} {again}, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
    write_json(out / "config.json", to_json(config))
