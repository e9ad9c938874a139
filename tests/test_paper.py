"""The paper, sentence by sentence: what it fixes about the model, its targets, losses, sampling and inference.

Each test quotes or sums up one sentence, is named by its section and looks at what the code does. Where the released
code differs from the paper, the test says which preset is which. Training schedules have a file of their own.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import BOX, SIDE, images, shrink, truth
from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu import keypoints as keypoint_ops
from mrcnn_edu.anchors import cell_anchors
from mrcnn_edu.config import KeypointHeadConfig, MaskHeadConfig, ModelConfig
from mrcnn_edu.inference import predict
from mrcnn_edu.losses import box_loss, classification_loss, keypoint_loss, mask_loss, multinomial_mask_loss
from mrcnn_edu.masks import crop_masks
from mrcnn_edu.models.box_head import detect_boxes, sample_rois
from mrcnn_edu.models.mask_head import build_mask_head, own_masks
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.roi_features import assign_levels
from mrcnn_edu.models.rpn import Guess
from mrcnn_edu.ops import paste_masks, roi_align, roi_pool, roi_warp
from mrcnn_edu.presets import MODELS
from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Target
from mrcnn_edu.weights import load_imagenet

FPN, C4, C5 = "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_c4", "maskrcnn_resnet50_c5"
PERSON, PERSON_MASK = "keypointrcnn_resnet50_fpn", "maskkeypointrcnn_resnet50_fpn"
NO_CROWD = torch.zeros(0, 4)


def tiny(config: str | ModelConfig, **box: object) -> MaskRCNN:
    """A named model, narrow and with ten layers, on fixed random weights; ``box`` changes fields of its box head."""
    config = shrink(MODELS[config] if isinstance(config, str) else config)
    config = replace(config, backbone=replace(config.backbone, architecture="resnet10"), box=replace(config.box, **box))
    torch.manual_seed(0)
    return build_model(config)


def outline(name: str) -> MaskRCNN:
    """A named model at full size, without numbers in its weights."""
    with torch.device("meta"):
        return build_model(name)


def rows_of(module: nn.Module) -> list[int]:
    """How many rois the module is given, call by call, from now on."""
    rows: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    return rows


def losses(model: MaskRCNN) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return model(images(), [truth(model.config)] * 2)


def apart(count: int, side: float = 8.0, gap: float = 10.0) -> Tensor:
    """Boxes on a grid that do not touch, [count, 4]."""
    columns = math.ceil(math.sqrt(count))
    index = torch.arange(count)
    corner = torch.stack([index % columns, index // columns], dim=1) * gap
    return torch.cat([corner, corner + side], dim=1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Section 3: Mask R-CNN
# ---------------------------------------------------------------------------------------------------------------------


def test_3_two_outputs_for_each_candidate_and_a_third_that_is_the_mask():
    found = tiny(FPN).eval()(images())[0]
    assert found.labels.shape == (5,) and found.boxes.shape == (5, 4) and found.mask_probs.shape == (5, 28, 28)


def test_3_features_are_shared_by_both_stages():
    """One pass of the backbone serves the RPN and all heads."""
    model = tiny(FPN)
    passes = rows_of(model.backbone)
    losses(model)
    model.eval()(images())
    assert passes == [2, 2]


def test_3_classes_and_boxes_do_not_depend_on_masks():
    """Parallel prediction, unlike systems "where classification depends on mask predictions"."""
    model = tiny(FPN).eval()
    before = model(images())
    for parameter in model.mask_head.parameters():
        parameter.data.normal_()
    for old, new in zip(before, model(images())):
        assert torch.equal(old.boxes, new.boxes) and torch.equal(old.labels, new.labels)
        assert not torch.equal(old.mask_probs, new.mask_probs)


def test_3_the_loss_is_class_plus_box_plus_mask_on_each_sampled_roi():
    """L = L_cls + L_box + L_mask, unweighted: each head's gradient is that of its own term."""
    model = tiny(FPN)
    parts = losses(model)
    assert set(parts) - {"objectness", "rpn_box"} == {"classification", "box", "mask"}
    for name, weight in (
        ("classification", model.box_head.class_logits.weight),
        ("box", model.box_head.deltas.weight),
        ("mask", model.mask_head.mask_logits.weight),
    ):
        alone = torch.autograd.grad(parts[name], weight, retain_graph=True)[0]
        together = torch.autograd.grad(sum(parts.values()), weight, retain_graph=True)[0]
        torch.testing.assert_close(alone, together)
        assert together.abs().sum() > 0


def test_3_class_and_box_loss_are_those_of_fast_rcnn():
    """-log p_u, and smooth L1 (0.5 x^2 below 1, |x| - 0.5 above) of the true class only, for foreground only [12]."""
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    torch.testing.assert_close(classification_loss(logits, torch.tensor([1])), -logits.softmax(dim=1)[0, 1].log())
    deltas = torch.tensor([[0.5, -0.5, 3.0, 0.0]])
    torch.testing.assert_close(box_loss(deltas, torch.zeros(1, 4), 1.0, 1), torch.tensor(0.125 + 0.125 + 2.5))
    assert MODELS[FPN].conventions.box_beta == 1.0  # where torchvision has 1/9 and detectron2 plain L1


def test_3_the_mask_branch_has_k_m_squared_outputs():
    head = outline(FPN).mask_head
    assert head(torch.empty(1, 256, 14, 14, device="meta")).numel() == 80 * 28**2


def test_3_sigmoid_per_pixel_and_the_average_binary_cross_entropy():
    logits, target = torch.randn(2, 1, 3, 3), torch.rand(2, 3, 3).round()
    probability = logits[:, 0].sigmoid()
    expected = -torch.where(target == 1, probability, 1 - probability).log().mean()
    torch.testing.assert_close(mask_loss(logits, target, torch.tensor([1, 1])), expected)


def test_3_only_the_mask_of_the_true_class_learns():
    """ "L_mask is only defined on the k-th mask (other mask outputs do not contribute to the loss)"."""
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    mask_loss(logits, torch.ones(2, 4, 4), torch.tensor([4, 2])).backward()
    assert (logits.grad.abs().sum(dim=(2, 3)) > 0).nonzero().tolist() == [[0, 3], [1, 1]]


def test_3_the_class_branch_selects_the_mask():
    """Masks that are constants of their class: each detection has the constant of the class it was given."""
    model = tiny(FPN).eval()
    nn.init.zeros_(model.mask_head.mask_logits.weight)
    model.mask_head.mask_logits.bias.data = torch.arange(1.0, 7.0)
    nn.init.normal_(model.box_head.class_logits.weight)  # opinions about classes
    found = model(images())[0]
    assert len(found.labels.unique()) > 1
    torch.testing.assert_close(found.mask_probs, found.labels[:, None, None].sigmoid().expand(-1, 28, 28))


def test_3_with_a_softmax_masks_compete_and_with_a_sigmoid_they_do_not():
    """Raising another class's logit takes from a multinomial mask and leaves an independent one as it is."""
    logits, more = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    more[:, 1] += 5
    ones, first = torch.ones(1, 2, 2), torch.tensor([1])
    assert multinomial_mask_loss(more, ones, first) < multinomial_mask_loss(logits, ones, first)
    more = more.roll(1, dims=1)
    assert multinomial_mask_loss(more, ones, first) > multinomial_mask_loss(logits, ones, first)
    assert mask_loss(more, ones, first) == mask_loss(logits, ones, first)


def test_3_masks_keep_the_layout_of_their_roi():
    """ "Pixel-to-pixel": in a fully convolutional head a feature one cell further moves the mask by two pixels."""
    torch.manual_seed(0)
    head = build_mask_head(MaskHeadConfig(convs=(4, 4, 4, 4)), 3, 14, 1, None, None)
    pooled = torch.zeros(1, 3, 14, 14)
    pooled[:, :, 6, 7] = 1
    there = head(pooled.roll((1, 0), dims=(2, 3)))
    torch.testing.assert_close(there, head(pooled).roll((2, 0), dims=(2, 3)))


# RoIAlign ------------------------------------------------------------------------------------------


def shifted(layer, by: float, **options: object) -> Tensor:
    """A layer of 7 x 7 bins on a random map of stride 16, its RoI moved to the right by some pixels."""
    features = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return layer(features, torch.tensor([[0.0, 32.0 + by, 32.0, 144.0 + by, 144.0]]), 7, 1 / 16, **options)


def test_3_roipool_rounds_the_roi_and_takes_the_max():
    """[x / 16] with rounding: seven pixels of 16 change nothing, nine change all. The largest cell of each bin."""
    assert torch.equal(shifted(roi_pool, 7.0), shifted(roi_pool, 0.0))
    assert not torch.equal(shifted(roi_pool, 9.0), shifted(roi_pool, 0.0))
    counting = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert roi_pool(counting, torch.tensor([[0.0, 0, 0, 3, 3]]), 2, 1.0).flatten().tolist() == [5, 7, 13, 15]


def test_3_roipool_rounds_the_bins_as_well():
    """Five cells in two bins: floor and ceil give both bins three cells, which overlap by one."""
    ramp = torch.arange(5.0).reshape(1, 1, 1, 5)
    assert roi_pool(ramp, torch.tensor([[0.0, 0, 0, 4, 0]]), (1, 2), 1.0).flatten().tolist() == [2, 4]
    assert roi_pool(-ramp, torch.tensor([[0.0, 0, 0, 4, 0]]), (1, 2), 1.0).flatten().tolist() == [0, -2]


def test_3_roialign_rounds_nothing():
    """x / 16 instead of [x / 16]: on a ramp every pixel of movement is a sixteenth in the features."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    rois = torch.tensor([[0.0, 64.0 + by, 64.0, 176.0 + by, 176.0] for by in range(8)])
    steps = roi_align(ramp, rois, 7, 1 / 16).diff(dim=0)
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 16))


def test_3_roialign_takes_four_bilinear_samples_in_each_bin():
    """One bin of 2 x 2 cells around (2, 2): samples at 1.5 and 2.5 px, the centres of four cells; max or average."""
    counting = torch.arange(16.0).reshape(1, 1, 4, 4)
    roi = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
    assert MODELS[FPN].conventions.samples_per_bin ** 2 == 4
    assert roi_align(counting, roi, 1, 1.0).item() == (5 + 6 + 9 + 10) / 4
    assert roi_align(counting, roi, 1, 1.0, mode="max").item() == 10
    quarter = torch.tensor([[0.0, 1.25, 1.0, 3.25, 3.0]])
    assert roi_align(counting, quarter, 1, 1.0).item() == (5 + 6 + 9 + 10) / 4 + 0.25  # between the grid points


def test_3_roialign_hardly_depends_on_the_number_of_samples():
    """ "Not sensitive to ... how many points are sampled": not at all where the features are linear."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    roi = torch.tensor([[0.0, 10.3, 8.9, 20.1, 17.7]])
    values = [roi_align(ramp, roi, 7, 1.0, samples_per_bin=count) for count in (1, 2, 3, 5)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_3_roiwarp_rounds_the_roi_as_roipool_does_and_samples_bilinearly():
    for mode in ("max", "mean"):
        assert torch.equal(shifted(roi_warp, 7.0, mode=mode), shifted(roi_warp, 0.0, mode=mode))
        assert not torch.equal(shifted(roi_warp, 9.0, mode=mode), shifted(roi_warp, 0.0, mode=mode))
    ramp = torch.arange(5.0).reshape(1, 1, 1, 5).expand(1, 1, 5, 5).contiguous()
    halves = roi_warp(ramp, torch.tensor([[0.0, 0, 0, 4, 4]]), (1, 2), 1.0)
    torch.testing.assert_close(
        halves.flatten(), torch.tensor([0.75, 3.25])
    )  # 2.5 cells each: 0.125 and 1.375, 2.625 and 3.875


# Network architecture --------------------------------------------------------------------------------


def test_3_c4_is_the_last_layer_of_the_fourth_stage_and_res5_is_in_the_head():
    model = tiny(C4)
    features = model.backbone(model.normalise(images()))
    assert list(features) == ["c4"] and model.backbone.strides == {"c4": 16}
    assert not hasattr(model.backbone.resnet, "c5") and model.res5 is not None


@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 3 + 4 + 6), ("resnet101", 3 + 4 + 23)])
def test_3_depth_of_50_or_101_layers(name, blocks):
    """Three layers to a block, res5 with its nine, the first conv and the classifier that is left away."""
    model = outline(f"mask{name.replace('resnet', 'rcnn_resnet')}_c4")
    stages = [model.backbone.resnet.c2, model.backbone.resnet.c3, model.backbone.resnet.c4]
    assert sum(map(len, stages)) == blocks
    res5 = [layer for layer in model.res5.modules() if isinstance(layer, nn.Conv2d)]
    assert len(res5) == 9 + 1  # "the 9-layer res5", and the projection around its first block
    assert 3 * blocks + 9 + 2 == int(name[6:])


def test_3_fpn_reads_each_roi_from_the_level_of_its_scale():
    """Equation 1 of [27]: 224 px on p4, half of it one level finer; a finer level gives the same P x P features."""
    boxes = torch.tensor([[0, 0, side, side] for side in (30, 112, 224, 448, 900)]).float()
    assert assign_levels(boxes, 2, 5).tolist() == [2, 3, 4, 5, 5]
    model = tiny(FPN)
    features = {level: torch.full((1, 16, 64, 64), float(level[1:])) for level in model.backbone.strides}
    boxes = torch.tensor([[0, 0, side, side] for side in (30, 112, 224)]).float()
    assert model.box_features(features, [boxes])[:, 0, 3, 3].tolist() == [2, 3, 4]


def test_figure_4_left():
    """RoI 7 x 7 x 1024, res5, 7 x 7 x 2048; ave, 2048, class and box; deconv, 14 x 14 x 256; conv, 14 x 14 x 80."""
    model = outline(C4)
    assert model.box_features.size == model.mask_features.size == 7 and model.backbone.channels == 1024
    seen = model.res5(torch.empty(3, 1024, 7, 7, device="meta"))
    assert seen.shape == (3, 2048, 7, 7)
    assert model.box_head.hidden(seen.mean(dim=(2, 3))).shape == (3, 2048)
    class_logits, deltas = model.box_head(seen)
    assert class_logits.shape == (3, 81) and deltas.shape == (3, 80, 4)
    assert len(model.mask_head.convs) == 0 and model.mask_head.deconv(seen).shape == (3, 256, 14, 14)
    assert model.mask_head(seen).shape == (3, 80, 14, 14)


def test_figure_4_right():
    """7 x 7 x 256, 1024, 1024, class and box; 14 x 14 x 256, "x4", deconv, 28 x 28 x 256, conv, 28 x 28 x 80."""
    model = outline(FPN)
    assert (model.box_features.size, model.mask_features.size) == (7, 14)
    assert [layer.out_features for layer in model.box_head.hidden if isinstance(layer, nn.Linear)] == [1024, 1024]
    assert model.box_head(torch.empty(3, 256, 7, 7, device="meta"))[0].shape == (3, 81)
    pooled = torch.empty(3, 256, 14, 14, device="meta")
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.mask_head.convs) == 4
    assert model.mask_head.convs(pooled).shape == (3, 256, 14, 14)
    assert model.mask_head.deconv(pooled).shape == (3, 256, 28, 28)
    assert model.mask_head(pooled).shape == (3, 80, 28, 28)


@pytest.mark.parametrize("name", [FPN, C4])
def test_figure_4_convs_are_3x3_the_output_1x1_the_deconv_2x2_with_stride_2_and_relu_between(name):
    head = outline(name).mask_head
    for layer in head.convs:
        if isinstance(layer, nn.Conv2d):
            assert layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.stride == (1, 1)
        else:
            assert isinstance(layer, nn.ReLU)
    assert head.deconv.kernel_size == head.deconv.stride == (2, 2) and head.mask_logits.kernel_size == (1, 1)
    small = tiny(name).mask_head
    before = []
    small.mask_logits.register_forward_hook(lambda _, inputs, output: before.append(inputs[0]))
    small(torch.randn(2, small.convs[0].in_channels if len(small.convs) else small.deconv.in_channels, 7, 7))
    assert (before[0] >= 0).all() and (before[0] == 0).any()  # a ReLU behind the deconv


def test_figure_4_res5_has_stride_1_on_7x7_where_19_and_the_released_code_have_14x14_and_stride_2():
    drawn, released = outline(C4), outline("maskrcnn_resnet50_c4_detectron2")
    assert drawn.res5.blocks[0].conv1.stride == (1, 1) and drawn.box_features.size == 7
    assert released.res5.blocks[0].conv1.stride == (2, 2) and released.box_features.size == 14
    assert released.res5(torch.empty(2, 1024, 14, 14, device="meta")).shape == (2, 2048, 7, 7)
    assert MODELS["maskrcnn_resnet50_c4_detectron1"].box == MODELS["maskrcnn_resnet50_c4_detectron2"].box


# ---------------------------------------------------------------------------------------------------------------------
# Section 3.1: Implementation details
# ---------------------------------------------------------------------------------------------------------------------


def test_3_1_a_roi_is_positive_at_an_iou_of_one_half_and_negative_below():
    target = Target(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([3]))
    boxes = torch.tensor([[0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 10, 20], [0, 0, 10, 20.5], [50, 50, 60, 60]])
    box = MODELS[FPN].box
    samples = sample_rois(Proposals(boxes, torch.ones(5)), target, NO_CROWD, 100, 1.0, box.positive_iou)
    assert samples.labels.tolist() == [3, 0, 3, 0, 0, 3]  # the last is the true box


@pytest.mark.parametrize("name", [FPN, C4])
def test_3_1_the_mask_loss_is_defined_on_positives_only(name):
    """The mask branch sees as many rois as there are positives; without any its loss is 0."""
    model = tiny(name)
    proposals = [Proposals(torch.tensor([[*BOX], [8.0, 12, 42, 44], [50, 0, 60, 9]]), torch.ones(3))] * 2
    rows = rows_of(model.mask_head)
    model(images(), [truth(model.config)] * 2, proposals)
    assert rows == [2 * 3]  # two proposals and the true box in each image; the third proposal is a negative
    nothing = Target.empty((SIDE, SIDE))
    assert model(images(), [nothing] * 2, proposals)["mask"] == 0


def test_3_1_the_mask_target_is_the_intersection_of_the_roi_and_the_true_mask():
    """An object on columns 0 to 7 of 8 rows; a roi of columns 4 to 11 sees its right half, on the left."""
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :8, :8] = True
    target = crop_masks(mask, torch.tensor([[4.0, 0.0, 12.0, 8.0]]), torch.tensor([0]), 4)
    assert target[0].tolist() == [[1, 1, 0, 0]] * 4


def sampled(name: str, positives: int, negatives: int) -> list[int]:
    """Labels that a model draws in an image with so many proposals of either kind."""
    model = outline(name)
    target = Target(torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([5]))
    good = torch.tensor([0.0, 0.0, 100.0, 100.0]) + torch.rand(positives, 4)
    boxes = torch.cat([good, apart(negatives) + 200])
    samples = model.sample({}, [Proposals(boxes, torch.ones(len(boxes)))], [target], [NO_CROWD])
    return samples[0].labels.tolist()


@pytest.mark.parametrize(
    ("name", "n"), [(C4, 64), (FPN, 512), ("maskrcnn_resnet101_fpn", 512), ("maskrcnn_resnet50_c4_detectron2", 512)]
)
def test_3_1_n_rois_per_image_with_1_to_3_positives_to_negatives(name, n):
    """N is 64 for C4 and 512 for FPN; the released code has 512 for both."""
    labels = sampled(name, 600, 1000)
    assert len(labels) == n and labels.count(5) == n // 4 and labels.count(0) == 3 * n // 4


def test_3_1_few_positives_are_made_up_for_by_negatives():
    labels = sampled(C4, 3, 1000)
    assert labels.count(5) == 4 and labels.count(0) == 60  # three proposals and the true box


@pytest.mark.parametrize("name", [FPN, C4, C5])
def test_3_1_anchors_span_5_scales_and_3_ratios(name):
    """On FPN one scale to a level, elsewhere all in every cell: the same 15 shapes."""
    model = tiny(replace(MODELS[name]))
    full = MODELS[name].rpn
    shapes = torch.cat([cell_anchors(sizes, full.anchor_ratios) for sizes in full.anchor_sizes])
    width, height = (shapes[:, 2:] - shapes[:, :2]).T
    expected = torch.tensor([32.0, 64, 128, 256, 512])[:, None].expand(5, 3)
    torch.testing.assert_close((width * height).sqrt().reshape(5, 3), expected)
    torch.testing.assert_close((height / width).reshape(5, 3), torch.tensor([0.5, 1, 2]).expand(5, 3))
    guess = model.rpn(model.backbone(model.normalise(images())), (SIDE, SIDE))
    cells = {FPN: 16**2 + 8**2 + 4**2 + 2**2 + 1, C4: 4**2, C5: 2**2}[name]
    assert guess.objectness.shape[1] == cells * (3 if name == FPN else 15)


def test_3_1_images_are_resized_to_a_shorter_edge_of_800():
    """At test time too; the longest edge of 1333 is the released code's, the paper names none."""
    seen = []

    class Nothing(nn.Module):
        def forward(self, batch: ImageBatch) -> list[Detections]:
            seen.append(batch.sizes[0])
            return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())]

    predict(Nothing(), [torch.rand(3, 400, 600), torch.rand(3, 1000, 500), torch.rand(3, 100, 400)])
    assert seen == [(800, 1200), (1333, 666), (333, 1333)]


@pytest.mark.parametrize(
    ("name", "count"), [(C4, 300), (FPN, 1000), ("maskrcnn_resnet50_c4_detectron1", 1000), (C5, 300)]
)
def test_3_1_proposals_at_test_time(name, count):
    """300 for C4 and 1000 for FPN; the released code takes 1000 for C4. C5 is our reading: as C4, with one map."""
    model, anchors = outline(name), apart(2400)
    guess = Guess(anchors, torch.randn(1, 2400), torch.zeros(1, 2400, 4), [1200, 1200])
    batch = ImageBatch.collate([torch.zeros(3, 600, 600)])
    (found,) = model.propose(guess, batch)
    assert len(found) == count
    assert (found.scores.diff() <= 0).all() and found.scores[0] == guess.objectness.max().sigmoid()


def test_3_1_nms_follows_the_box_branch():
    """The better of two boxes of one class stays, at 0.3 for C4 (Section 4) and 0.5 for FPN (Appendix B)."""
    proposals = torch.tensor([[0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 100.0, 40.0]])  # IoU 0.4
    logits = torch.tensor([[0.0, 5.0], [0.0, 4.0]])
    for name, kept in ((C4, 1), (FPN, 2)):
        box = MODELS[name].box
        (found,) = detect_boxes(
            logits, torch.zeros(2, 1, 4), [proposals], [(200, 200)], box.delta_weights, 0.05, box.nms_threshold, 100
        )
        assert len(found) == kept and found.boxes[0].tolist() == [0, 0, 100, 100]


@pytest.mark.parametrize("name", [FPN, C4])
def test_3_1_the_box_branch_sees_all_proposals_and_the_mask_branch_the_best_100(name):
    model = tiny(name, detections_per_image=MODELS[name].box.detections_per_image, nms_threshold=1.0).eval()
    box_rows, mask_rows = rows_of(model.box_head), rows_of(model.mask_head)
    boxes = apart(300, side=3.0, gap=3.5).clamp(max=SIDE)
    with torch.no_grad():
        found = model(images(1), proposals=[Proposals(boxes, torch.ones(300))])[0]
        everything = build_model(replace(model.config, box=replace(model.config.box, detections_per_image=10_000)))
        everything.load_state_dict(model.state_dict())
        scores = everything.eval()(images(1), proposals=[Proposals(boxes, torch.ones(300))], boxes_only=True)[0].scores
    assert box_rows == [300] and mask_rows == [100] and len(found) == 100 and len(scores) > 300
    assert torch.equal(found.scores, scores.sort(descending=True).values[:100])


def test_3_1_only_the_mask_of_the_predicted_class_is_used():
    logits = torch.randn(3, 80, 28, 28)
    masks = own_masks(logits, torch.tensor([1, 80, 17]))
    assert torch.equal(masks, torch.stack([logits[0, 0], logits[1, 79], logits[2, 16]]).sigmoid())


def test_3_1_the_mask_is_resized_to_the_roi():
    """A full m x m mask fills exactly its box, whatever its size."""
    for box in ([3.0, 5.0, 50.0, 9.0], [0.0, 0.0, 64.0, 64.0]):
        mask = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]), (64, 64))[0]
        x1, y1, x2, y2 = map(int, box)
        assert mask[y1:y2, x1:x2].all() and mask.sum() == (x2 - x1) * (y2 - y1)


def test_3_1_masks_are_binarised_at_one_half():
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    assert paste_masks(torch.full((1, 28, 28), 0.5), box, (8, 8)).all()
    assert not paste_masks(torch.full((1, 28, 28), 0.4999), box, (8, 8)).any()
    left = torch.zeros(1, 28, 28)
    left[..., :14] = 1
    assert paste_masks(left, box, (8, 8))[0].tolist() == [[True] * 4 + [False] * 4] * 8


# ---------------------------------------------------------------------------------------------------------------------
# Section 4: Instance segmentation
# ---------------------------------------------------------------------------------------------------------------------


def test_4_2_multinomial_masks_are_a_softmax_over_the_classes_at_each_pixel():
    """ "As commonly used in FCN": K classes and the background; the loss is the pixels' cross entropy."""
    config = replace(MODELS[C4], mask=replace(MODELS[C4].mask, loss="softmax"))
    model = tiny(config)
    assert model.mask_head.mask_logits.out_channels == model.config.classes + 1
    logits, labels = torch.randn(2, 81, 14, 14), torch.tensor([3, 80])
    inside = torch.rand(2, 14, 14) > 0.5
    expected = F.cross_entropy(logits, torch.where(inside, labels[:, None, None], 0))
    torch.testing.assert_close(multinomial_mask_loss(logits, inside.float(), labels), expected)


def test_4_2_class_agnostic_is_a_single_output_regardless_of_class():
    config = replace(MODELS[C4], mask=replace(MODELS[C4].mask, classes="agnostic"))
    model = tiny(config)
    assert model.mask_head.mask_logits.out_channels == 1
    logits = torch.randn(1, 1, 14, 14)
    assert torch.equal(
        own_masks(logits, torch.tensor([1]), "agnostic"), own_masks(logits, torch.tensor([6]), "agnostic")
    )
    assert losses(model)["mask"] > 0


def test_4_2_c5_has_stride_32_and_the_head_of_fpn():
    """ "We use the same head as in Figure 4 (right), as the res5 head is not applicable"."""
    c5, fpn = outline(C5), outline(FPN)
    assert c5.backbone.strides == {"c5": 32} and c5.res5 is None
    assert type(c5.mask_head) is type(fpn.mask_head) and len(c5.mask_head.convs) == len(fpn.mask_head.convs)
    pooled = torch.empty(1, 2048, 14, 14, device="meta")
    assert c5.mask_head(pooled).shape == (1, 80, 28, 28) and c5.mask_features.size == 14
    assert [layer.out_features for layer in c5.box_head.hidden if isinstance(layer, nn.Linear)] == [1024, 1024]


def test_table_2c_roi_layers_by_align_bilinear_and_aggregation():
    """The rows differ in three switches: what moves by less than half a cell is seen only with alignment."""
    for layer, options, aligned in (
        (roi_pool, {}, False),
        (roi_warp, {"mode": "max"}, False),
        (roi_warp, {"mode": "mean"}, False),
        (roi_align, {"mode": "max"}, True),
        (roi_align, {"mode": "mean"}, True),
    ):
        assert torch.equal(shifted(layer, 7.0, **options), shifted(layer, 0.0, **options)) is not aligned


@pytest.mark.parametrize("widths", [(1024, 1024), (1024, 1024, 1024)])
def test_table_2e_mlp(widths):
    """fc: 1024, 1024, 80 * 28^2, and once with a third 1024."""
    with torch.device("meta"):
        head = build_mask_head(MaskHeadConfig(branch="mlp", fc=widths), 256, 14, 80, None, None)
        assert head(torch.empty(2, 256, 14, 14)).shape == (2, 80, 28, 28)
    layers = [layer.out_features for layer in [*head.hidden, head.mask_logits] if isinstance(layer, nn.Linear)]
    assert layers == [*widths, 80 * 28**2]


def test_table_2e_fcn():
    """conv: 256, 256, 256, 256, 256, 80; the fifth is the deconv."""
    head = outline(FPN).mask_head
    layers = [layer for layer in [*head.convs, head.deconv, head.mask_logits] if not isinstance(layer, nn.ReLU)]
    assert [layer.out_channels for layer in layers] == [256, 256, 256, 256, 256, 80]


def test_4_3_the_mask_output_is_ignored():
    """ "Only the classification and box outputs are used at inference": the same boxes, and no masks."""
    model = tiny(FPN).eval()
    full = model(images())
    rows = rows_of(model.mask_head)
    for found, part in zip(full, model(images(), boxes_only=True)):
        assert torch.equal(found.boxes, part.boxes) and part.mask_probs is None
    assert rows == []


def test_4_3_faster_rcnn_is_mask_rcnn_without_the_mask_branch():
    """ "A version of Mask R-CNN but without the mask branch", RoIAlign included."""
    faster, mask = outline("fasterrcnn_resnet101_fpn"), outline("maskrcnn_resnet101_fpn")
    assert {name for name in mask.state_dict() if not name.startswith("mask_head")} == set(faster.state_dict())
    assert faster.box_features.layer == "roi_align" and "mask" not in losses(tiny("fasterrcnn_resnet50_fpn"))


# ---------------------------------------------------------------------------------------------------------------------
# Section 5: Human pose estimation
# ---------------------------------------------------------------------------------------------------------------------


def test_5_k_masks_one_for_each_keypoint_type():
    assert outline(PERSON).keypoint_head(torch.empty(2, 256, 14, 14, device="meta")).shape == (2, 17, 56, 56)


def test_5_the_target_is_a_single_pixel():
    """One cell of m x m for each keypoint: where it lies in the roi."""
    joints = torch.tensor([[[30.0, 20.0, 2.0], [10.0, 10.0, 1.0]]])
    cells, visible = keypoint_ops.encode(joints, torch.tensor([[10.0, 10.0, 66.0, 66.0]]), 56)
    assert cells.tolist() == [[10 * 56 + 20, 0]] and visible.all()


def test_5_cross_entropy_over_an_m_squared_way_softmax():
    logits, cells = torch.randn(1, 1, 56, 56), torch.tensor([[77]])
    expected = -logits.flatten().softmax(dim=0)[77].log()
    torch.testing.assert_close(keypoint_loss(logits, cells, torch.tensor([[True]])), expected)


def test_5_for_each_visible_keypoint():
    """What is not labelled, or lies outside the roi, does not count."""
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    joints = torch.tensor([[[5.0, 5.0, 2.0], [5.0, 5.0, 0.0], [15.0, 5.0, 2.0]]])
    cells, visible = keypoint_ops.encode(joints, box, 56)
    assert visible.tolist() == [[True, False, False]]
    logits = torch.randn(1, 3, 56, 56, requires_grad=True)
    keypoint_loss(logits, cells, visible).backward()
    assert (logits.grad.abs().sum(dim=(2, 3)) > 0).tolist() == [[True, False, False]]


def test_5_keypoints_are_treated_independently():
    """A sharper map for one joint changes nothing about another's place or score."""
    logits, box = torch.randn(1, 2, 56, 56), torch.tensor([[0.0, 0.0, 56.0, 56.0]])
    alone = keypoint_ops.decode(logits, box)
    logits[:, 0] *= 3
    assert torch.equal(keypoint_ops.decode(logits, box)[:, 1], alone[:, 1])


def test_5_the_head_is_eight_3x3_convs_of_512_a_deconv_and_2x_bilinear():
    head = outline(PERSON).keypoint_head
    convs = [layer for layer in head.convs if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convs] == [512] * 8
    assert all(layer.kernel_size == (3, 3) for layer in convs)
    small = tiny(PERSON).keypoint_head
    pooled, before = torch.randn(1, 16, 14, 14), []
    small.deconv.register_forward_hook(lambda _, inputs, output: before.append(output))
    out = small(pooled)
    assert before[0].shape[-2:] == (28, 28) and out.shape[-2:] == (56, 56)
    expected = F.interpolate(before[0], scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, expected)


def test_5_boxes_are_thinned_at_one_half():
    assert MODELS[PERSON].box.nms_threshold == 0.5
    assert len(sampled(PERSON, 0, 600)) == 512  # "other details are identical"


def test_5_one_model_predicts_boxes_segments_and_keypoints():
    found = tiny(PERSON_MASK).eval()(images())[0]
    assert found.boxes.shape == (5, 4) and found.mask_probs.shape == (5, 28, 28) and found.keypoints.shape == (5, 17, 3)
    assert set(losses(tiny(PERSON_MASK))) >= {"box", "mask", "keypoint"}


# ---------------------------------------------------------------------------------------------------------------------
# Appendices
# ---------------------------------------------------------------------------------------------------------------------


def test_a_eight_categories_of_cityscapes():
    """A model for other categories is the same model: only the last layers have other widths."""
    with torch.device("meta"):
        model = build_model(replace(MODELS[FPN], classes=8))
    coco = outline(FPN).state_dict()
    changed = {name for name, value in model.state_dict().items() if value.shape != coco[name].shape}
    assert {name.rsplit(".", 1)[0] for name in changed} == {
        "box_head.class_logits",
        "box_head.deltas",
        "mask_head.mask_logits",
    }


def test_b_nms_of_one_half_instead_of_the_default_three_tenths():
    """Both by preset: 0.3 where the paper has only Section 4 (C4, C5), 0.5 where Appendix B updates it."""
    thresholds = {name: MODELS[name].box.nms_threshold for name in MODELS}
    assert {name for name, value in thresholds.items() if value == 0.3} == {C4, "maskrcnn_resnet101_c4", C5}
    assert set(thresholds.values()) == {0.3, 0.5}


@pytest.mark.parametrize("name", [FPN, C4])
def test_b_end_to_end_training_ignores_the_gradient_of_roi_coordinates(name):
    """The heads' losses reach the shared features and never the RPN's deltas."""
    model = tiny(name)
    parts = losses(model)
    second = parts["classification"] + parts["box"] + parts["mask"]
    shared = model.backbone.resnet.c4[0].conv1.weight
    deltas, stem = torch.autograd.grad(second, [model.rpn.deltas.weight, shared], retain_graph=True, allow_unused=True)
    assert deltas is None and stem.abs().sum() > 0
    assert torch.autograd.grad(parts["rpn_box"], shared, retain_graph=True)[0].abs().sum() > 0


def test_b_pretraining_on_five_thousand_classes():
    """ImageNet-5k changes the classifier alone, which a detector leaves away."""
    model = tiny(FPN).backbone.resnet
    names = {"stem.0.": "conv1.", "stem.1.": "bn1."} | {f"c{stage}.": f"layer{stage - 1}." for stage in (2, 3, 4, 5)}
    state = {"fc.weight": torch.zeros(5000, 128), "fc.bias": torch.zeros(5000)}
    for name, value in model.state_dict().items():
        prefix = next(ours for ours in names if name.startswith(ours))
        theirs = names[prefix] + name[len(prefix) :].replace("norm", "bn").replace("shortcut", "downsample")
        state[theirs] = torch.full_like(value, 2)
    load_imagenet(model, state)
    assert all((value == 2).all() for value in model.parameters())


def test_b_the_152_layer_resnext():
    blocks = outline("maskrcnn_resnext152_32x8d_fpn").backbone.resnet
    assert [len(stage) for stage in (blocks.c2, blocks.c3, blocks.c4, blocks.c5)] == [3, 8, 36, 3]
    assert 3 * (3 + 8 + 36 + 3) + 2 == 152 and blocks.c2[0].conv2.groups == 32


def test_b_the_non_local_model():
    """One block in res4, which compares every cell with every other; without it the model is the same."""
    local, plain = outline("maskrcnn_resnext152_32x8d_fpn_nonlocal"), outline("maskrcnn_resnext152_32x8d_fpn")
    added = set(local.state_dict()) - set(plain.state_dict())
    assert added and all(name.startswith("backbone.resnet.non_local.") for name in added)
    block = tiny(replace(MODELS[FPN], backbone=replace(MODELS[FPN].backbone, non_local=True))).backbone.resnet.non_local
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, block.query.in_channels, 4, 4, requires_grad=True)
    block(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(dim=1) > 0).all()  # the first cell has seen all sixteen


def test_b_keypoints_without_masks():
    """Table 9: "only keypoint annotations but no mask annotations"."""
    model = tiny(PERSON)
    assert model.mask_head is None and truth(model.config).masks is None
    assert losses(model)["keypoint"] > 0
    assert model.config.keypoint == replace(KeypointHeadConfig(), convs=(8,) * 8)
