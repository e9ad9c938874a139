"""The demo's task with torchvision's own detection classes: same data, widths, recipe and minutes on the same machine.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 benchmarks/demo_against_torchvision.py

torchvision's blocks, pyramid, RPN, RoI heads, RoIAlign, NMS, samplers, losses and post-processing are put together at
the widths of the ``maskrcnn_shapes`` preset and trained by this project's loop, which is the same for both. Ours is
``mrcnn-edu demo``. What torchvision has no setting for stays as torchvision has it: every positive roi trains the mask
and keypoint heads (ours: a few per image), rois of all classes train the keypoint head, and the last layers are
initialised its way. Norms are ours and stand where ours stand, except in the two box layers and the keypoint convs,
whose torchvision classes have none.

The number of iterations is what fits into the time that the demo takes: both models are timed first, taking turns on
the same batches, and the schedule is stretched to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from twins import channels_last

from mrcnn_edu.config import Config, ModelConfig
from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.demo import AREA_SCALE, demo_config
from mrcnn_edu.evaluation.measure import measure
from mrcnn_edu.evaluation.report import as_text
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.models.resnet import group_norm
from mrcnn_edu.structures import Detections, ImageBatch, Target
from mrcnn_edu.training.checkpoint import write_json
from mrcnn_edu.training.distributed import World, connected
from mrcnn_edu.training.loop import train
from mrcnn_edu.training.randomness import seed_rng
from mrcnn_edu.training.schedule import build_optimiser
from mrcnn_edu.training.setup import replicate

WARM = 10  # steps that are not timed
NAMES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "classification",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_keypoint": "keypoint",
}


class SlimBackbone(nn.Module):
    """torchvision's BasicBlocks (1, 1, 1, 1) at width 32 after two strided convs, and its pyramid over c3..c5."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()

        def strided(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1, bias=False), group_norm(width), nn.ReLU())

        self.stem = nn.Sequential(strided(3), strided(width))
        blocks, inputs = [], width
        for index in range(4):
            outputs, stride = width * 2**index, 1 if index == 0 else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), group_norm(outputs))
            blocks.append(BasicBlock(inputs, outputs, stride, shortcut, norm_layer=group_norm))
            inputs = outputs
        self.stages = nn.ModuleList(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.fpn = FeaturePyramidNetwork([width * 2, width * 4, width * 8], channels, norm_layer=group_norm)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps, x = {}, self.stem(x)
        for name, stage in zip(("c2", "c3", "c4", "c5"), self.stages):
            maps[name] = x = stage(x)
        return self.fpn({name: maps[name] for name in ("c3", "c4", "c5")})


class Contiguous(nn.Module):
    """torchvision's keypoint loss calls ``view`` on the logits, which channels_last maps do not allow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


class Torchvision(nn.Module):
    """torchvision's Mask R-CNN behind the interface of this project's loop and evaluation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        levels, sizes, classes = ["c3", "c4", "c5"], config.rpn.anchor_sizes, config.classes + 1
        channels, box, mask, keypoint = config.backbone.channels, config.box, config.mask, config.keypoint

        def align(size: int) -> MultiScaleRoIAlign:
            return MultiScaleRoIAlign(levels, size, 2, canonical_scale=config.backbone.roi_level_size)

        self.detector = TorchvisionMaskRCNN(
            SlimBackbone(config.backbone.width, channels),
            rpn_anchor_generator=AnchorGenerator(sizes, (config.rpn.anchor_ratios,) * len(sizes)),
            rpn_pre_nms_top_n_train=config.rpn.pre_nms[0],
            rpn_pre_nms_top_n_test=config.rpn.pre_nms[1],
            rpn_post_nms_top_n_train=config.rpn.post_nms[0],
            rpn_post_nms_top_n_test=config.rpn.post_nms[1],
            rpn_batch_size_per_image=config.rpn.batch_per_image,
            box_roi_pool=align(box.pooled_size),
            box_head=TwoMLPHead(channels * box.pooled_size**2, box.fc[0]),
            box_predictor=FastRCNNPredictor(box.fc[0], classes),
            box_batch_size_per_image=box.rois_per_image,
            box_score_thresh=box.score_threshold,
            box_nms_thresh=box.nms_threshold,
            mask_roi_pool=align(mask.pooled_size),
            mask_head=MaskRCNNHeads(channels, mask.convs, 1, norm_layer=group_norm),
            mask_predictor=MaskRCNNPredictor(mask.convs[-1], mask.convs[-1], classes),
        )
        heads = self.detector.roi_heads
        heads.keypoint_roi_pool = align(keypoint.pooled_size)
        heads.keypoint_head = KeypointRCNNHeads(channels, keypoint.convs)
        predictor = KeypointRCNNPredictor(keypoint.convs[-1], keypoint.joints)
        heads.keypoint_predictor = nn.Sequential(predictor, Contiguous())
        # Images come resized, and masks stay inside their boxes: the pasting belongs to the evaluation, for both alike.
        self.detector.transform.resize = lambda image, target: (image, target)
        self.detector.transform.postprocess = lambda found, sizes, original_sizes: found

    # Not attributes: a module with two names would be saved twice.
    @property
    def box_head(self) -> nn.Module:
        return self.detector.roi_heads.box_head

    @property
    def mask_head(self) -> nn.Module:
        return self.detector.roi_heads.mask_head

    @property
    def keypoint_head(self) -> nn.Module:
        return self.detector.roi_heads.keypoint_head

    def forward(
        self, batch: ImageBatch, targets: list[Target] | None = None, proposals: None = None, wanted: Iterable[str] = ()
    ) -> dict[str, Tensor] | list[Detections]:
        """As ``MaskRCNN.forward``, without given proposals; the losses are always all of them."""
        images = [pixels[:, :h, :w] for pixels, (h, w) in zip(batch.pixels, batch.sizes)]
        if targets is not None:
            losses = self.detector(images, [without_crowds(target).to_dict() for target in targets])
            return {ours: losses[theirs] for theirs, ours in NAMES.items()}
        return [as_detections(found) for found in self.detector(images)]


def without_crowds(target: Target) -> Target:
    """torchvision knows no crowd regions; its reference scripts leave them out."""
    return target if target.crowd is None else target[~target.crowd]


def as_detections(found: dict[str, Tensor]) -> Detections:
    scores = found["keypoints_scores"][..., None].sigmoid()
    keypoints = torch.cat([found["keypoints"][..., :2], scores], dim=-1)
    return Detections(found["boxes"], found["scores"], found["labels"], found["masks"][:, 0], keypoints)


def seconds_per_iteration(model: nn.Module, config: Config, data: CocoDataset, world: World, steps: int = 50) -> float:
    """Measured over a few steps of real training, loading included; that of the slowest process."""
    model.train().to(memory_format=torch.channels_last)
    replica = replicate(model) if world.size > 1 else model
    optimiser = build_optimiser(model, config.train, config.model.conventions)
    batches = train_loader(data, config.data, config.train.batch_size, 99, 0, world.rank, world.size)
    for step in range(steps + WARM):
        if step == WARM:
            began = time.perf_counter()
        batch, targets, _ = next(batches)
        optimiser.zero_grad()
        sum(replica(channels_last(batch), targets).values()).backward()
        optimiser.step()
    batches.close()
    return max(world.gather((time.perf_counter() - began) / steps))


def fitting_iterations(config: Config, data: CocoDataset, world: World, rounds: int) -> int:
    """How many iterations of torchvision's classes take as long as the demo's of ours, by the median of the rounds."""
    ratios = []
    for _ in range(rounds):
        ours = seconds_per_iteration(build_model(config.model), config, data, world)
        theirs = seconds_per_iteration(Torchvision(config.model), config, data, world)
        ratios.append(ours / theirs)
        if world.rank == 0:
            print(f"seconds per iteration: ours {ours:.3f}, torchvision's {theirs:.3f}", flush=True)
    return round(config.train.iterations * statistics.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=None, help="in place of those that are found to fit")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--out", type=Path, default=Path("runs/torchvision"))
    options = parser.parse_args()

    with connected("cpu") as world:
        world.from_first(lambda: shapes.write(options.data) and None)
        compare(options, world)


def compare(options: argparse.Namespace, world: World) -> None:
    """Train and measure."""
    train_data = CocoDataset(options.data / "train", options.data / "train.json")
    val_data = CocoDataset(options.data / "val", options.data / "val.json")
    seed_rng(options.seed)
    iterations = options.iterations
    if iterations is None:
        iterations = fitting_iterations(demo_config(options.seed), train_data, world, options.rounds)
        if world.rank == 0:
            print(f"{iterations} iterations of torchvision's classes take as long as the demo", flush=True)
    config = demo_config(options.seed, iterations)
    seed_rng(options.seed)
    model = Torchvision(config.model)
    summary = train(config, model, train_data, None, options.out, device="cpu")
    evaluation, _ = measure(model, val_data, replace(config.data, workers=0), options.out, AREA_SCALE, world=world)
    metrics = {
        "evaluation": evaluation.to_json(),
        "iterations": iterations,
        "processes": world.size,
        "seed": options.seed,
        "seconds": summary["seconds"],
        "memory_mib": sum(part or 0.0 for part in world.gather(summary["memory_mib"])),
    }
    world.from_first(lambda: write_json(options.out / "metrics.json", metrics))
    if world.rank == 0:
        print(as_text(evaluation))


if __name__ == "__main__":
    main()
