"""torchvision's Mask R-CNN and ours with the same weights and the same work, for the benchmark of the whole model.

    python benchmarks/twins.py        compares what both find, and their losses; times nothing

ResNet-50-FPN with random weights. The statistics of the frozen norms and the scale of the last layers are set so that
an image has 100 detections, and no scores are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from mrcnn_edu import ops
from mrcnn_edu.config import TrainConfig
from mrcnn_edu.models import mask_rcnn
from mrcnn_edu.presets import model_config
from mrcnn_edu.structures import ImageBatch, Target
from mrcnn_edu.training.schedule import build_optimiser
from mrcnn_edu.training.setup import compile_parts
from mrcnn_edu.weights import load_torchvision

Sides = dict[str, Callable[[], object]]  # torchvision first

# The last layers' standard deviations: scores without ties, and enough of them above the threshold of 0.05.
SPREAD = {
    "rpn.head.cls_logits": 3.0,
    "rpn.head.bbox_pred": 0.3,
    "box_predictor.cls_score": 2.0,
    "box_predictor.bbox_pred": 1.0,
}


@dataclass(frozen=True)
class Task:
    """What a model has to do; the defaults are the size of COCO's images."""

    height: int = 800  # px
    width: int = 1088  # px
    images: int = 1
    proposals: int = 1000
    detections: int = 100
    device: str = "cpu"


def models(task: Task) -> tuple[MaskRCNN, mask_rcnn.MaskRCNN]:
    """torchvision's model, as ``maskrcnn_resnet50_fpn`` builds it for pretrained weights, and ours with its weights."""
    config = model_config("maskrcnn_resnet50_fpn", "torchvision", classes=90)
    norm = partial(torchvision.ops.FrozenBatchNorm2d, eps=config.conventions.frozen_norm_eps)
    torch.manual_seed(0)
    theirs = MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=3),
        91,
        min_size=task.height,
        max_size=task.width,
        rpn_pre_nms_top_n_test=task.proposals,
        rpn_post_nms_top_n_test=task.proposals,
        box_detections_per_img=task.detections,
    )
    calibrate(theirs, pictures(replace(task, images=1, device="cpu")))
    numbers = {"pre_nms": (2000, task.proposals), "post_nms": (2000, task.proposals)}
    box = replace(config.box, detections_per_image=task.detections)
    ours = mask_rcnn.build_model(replace(config, rpn=replace(config.rpn, **numbers), box=box))
    load_torchvision(ours, theirs.state_dict())
    return theirs.to(task.device), ours.to(task.device)


def calibrate(model: nn.Module, images: list[Tensor]) -> None:
    """Give norms the statistics of an image, and the last layers a spread, while it passes through them."""

    def measure_norm(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    def rescale(layer: nn.Module, _: object, output: Tensor, spread: float) -> Tensor:
        handles.pop(layer).remove()  # the first level only: the others share the layer
        factor = spread / output.std()
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)
        return output * factor

    handles = {}
    for name, module in model.named_modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            handles[module] = module.register_forward_pre_hook(measure_norm)
        for last, spread in SPREAD.items():
            if name.endswith(last):
                handles[module] = module.register_forward_hook(partial(rescale, spread=spread))
    with torch.no_grad():
        model.eval()(images)
    for handle in handles.values():
        handle.remove()


def pictures(task: Task) -> list[Tensor]:
    """Coarse noise, so that there are edges at every scale."""
    g = torch.Generator().manual_seed(1)
    sizes = [(task.height // n, task.width // n) for n in (1, 8, 32)]
    layers = [torch.rand(task.images, 3, *size, generator=g) for size in sizes]
    grown = [nn.functional.interpolate(layer, (task.height, task.width), mode="bilinear") for layer in layers]
    return list((sum(grown) / len(grown)).to(task.device))


def truths(task: Task) -> list[Target]:
    """Eight instances in each image: boxes of 40 to 200 px, their masks without a corner."""
    g = torch.Generator().manual_seed(2)
    targets = []
    for _ in range(task.images):
        side = 40 + 160 * torch.rand(8, 2, generator=g)
        corner = torch.rand(8, 2, generator=g) * (torch.tensor([task.width, task.height]) - side)
        boxes = torch.cat([corner, corner + side], dim=1)
        masks = torch.zeros(8, task.height, task.width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
            mask[y1:y2, x1:x2] = True
            mask[y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = False
        targets.append(Target(boxes, torch.randint(1, 91, (8,), generator=g), masks).to(task.device))
    return targets


def channels_last(batch: ImageBatch) -> ImageBatch:
    """The batch in the memory layout that ``train`` chooses."""
    return replace(batch, pixels=batch.pixels.contiguous(memory_format=torch.channels_last))


def has_bf16(device: str) -> bool:
    """Is bfloat16 more than an emulation there?"""
    return device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def inference(task: Task) -> Sides:
    """From images to masks in the images, on every side; RuntimeError unless all find the same."""
    theirs, ours = models(task)
    images, size = pictures(task), (task.height, task.width)
    theirs.eval(), ours.eval()

    def pasted(model: nn.Module) -> list[dict[str, Tensor]]:
        with torch.inference_mode():
            return [
                {"boxes": found.boxes, "scores": found.scores, "labels": found.labels,
                 "masks": ops.paste_masks(found.mask_probs, found.boxes, size, threshold=None, rule="integer")}
                for found in model(ImageBatch.collate(images))
            ]  # fmt: skip

    def expected(half: bool = False) -> list[dict[str, Tensor]]:
        with torch.inference_mode(), torch.autocast(task.device, torch.bfloat16) if half else nullcontext():
            return theirs(images)

    sides = {"torchvision": expected, "plain": partial(pasted, ours), "optimised": partial(pasted, ours.optimize())}
    with exactly():
        for name in ("plain", "optimised"):
            shares = [agreement(*pair) for pair in zip(sides[name](), sides["torchvision"]())]
            if min(shares) < 0.95:
                raise RuntimeError(f"{name} found only {min(shares):.0%} of torchvision's detections for {task}")
    if has_bf16(task.device):  # its detections can be judged by AP only: random weights have near-ties everywhere
        sides["optimised, bf16"] = partial(pasted, ours.optimize("bf16"))
    if task.device == "cuda":
        for name, precision in (("optimised, graphs", "fp32"), ("optimised, bf16, graphs", "bf16")):
            sides[name] = partial(pasted, ours.optimize(precision, graphs=True))
        sides["torchvision, bf16"] = partial(expected, half=True)
    return sides


@contextmanager
def exactly() -> Iterator[None]:
    """Without TF32, in which GPUs round what convolutions multiply to ten bits; random weights make other boxes of it.

    Timed is what users run, with TF32 on both sides.
    """
    rounded, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = rounded


def agreement(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The share of torchvision's detections that ours has too: the box to 0.5 px, the score to 0.005."""
    far = (found["boxes"][:, None] - wanted["boxes"]).abs().amax(dim=2) > 0.5
    far |= (found["scores"][:, None] - wanted["scores"]).abs() > 0.005
    far |= found["labels"][:, None] != wanted["labels"]
    return float((~far).any(dim=0).float().mean()) if len(found["boxes"]) == len(wanted["boxes"]) else 0.0


def training(task: Task) -> Sides:
    """One step on every side; RuntimeError unless the first losses agree."""
    theirs, ours = models(task)
    last = mask_rcnn.build_model(ours.config).to(task.device)
    last.load_state_dict(ours.state_dict())
    last = last.to(memory_format=torch.channels_last)
    images, targets = pictures(task), truths(task)
    as_dicts = [target.to_dict() for target in targets]
    theirs.train()
    asked = {
        "torchvision": (theirs, lambda: theirs(images, as_dicts)),
        "plain": (ours, lambda: ours(ImageBatch.collate(images), targets)),
        "optimised": (last, lambda: last(channels_last(ImageBatch.collate(images)), targets)),
    }
    totals = {}
    for name, (_, losses) in asked.items():
        torch.manual_seed(3)  # both draw their samples in the same order
        with torch.no_grad():
            totals[name] = float(sum(losses().values()))
    if max(totals.values()) > 1.02 * min(totals.values()):
        raise RuntimeError(f"the first losses should be the same within 2 %, got {totals}")

    def step(losses: Callable[[], dict[str, Tensor]], optimiser: torch.optim.Optimizer, half: bool = False) -> None:
        with torch.autocast(task.device, torch.bfloat16) if half else nullcontext():
            total = sum(losses().values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()

    rate = 1e-6  # random weights would not survive more
    weights = [p for p in theirs.parameters() if p.requires_grad]
    optimisers = {"torchvision": torch.optim.SGD(weights, rate, momentum=0.9, weight_decay=1e-4)}
    for name in ("plain", "optimised"):
        optimisers[name] = build_optimiser(asked[name][0], TrainConfig(learning_rate=rate), ours.config.conventions)
    sides = {name: partial(step, losses, optimisers[name]) for name, (_, losses) in asked.items()}
    if has_bf16(task.device):
        sides["optimised, bf16"] = partial(step, asked["optimised"][1], optimisers["optimised"], half=True)
    if task.device == "cuda":  # where a compiler is, and what it needs; elsewhere it takes minutes
        compiled = deepcopy(last)
        compile_parts(compiled)
        optimiser = build_optimiser(compiled, TrainConfig(learning_rate=rate), ours.config.conventions)
        losses = partial(lambda model: model(channels_last(ImageBatch.collate(images)), targets), compiled)
        sides["optimised, bf16, compiled"] = partial(step, losses, optimiser, half=True)
        sides["torchvision, bf16"] = partial(step, asked["torchvision"][1], optimisers["torchvision"], half=True)
    return sides


if __name__ == "__main__":
    inference(Task(384, 544)), training(Task(256, 256, images=2))
    print("Both find the same and begin with the same losses.")
