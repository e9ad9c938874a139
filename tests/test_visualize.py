"""visualize, diagrams and canvas: what is drawn, and where, read back from the pixels and the artists."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from PIL import Image

from mrcnn_edu.canvas import Picture, contrast, luminance, outline, palette, shrink, stage, write
from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import Category, CategoryMap
from mrcnn_edu.structures import Detections, Proposals, Target
from mrcnn_edu.visualize import draw, draw_anchors, draw_proposals, draw_rois, matched_colours, sheet

NAMES = list(shapes.CLASSES)
CATEGORIES = CategoryMap(
    tuple(
        Category(index, name, shapes.JOINTS, shapes.SKELETON) if name == "figure" else Category(index, name)
        for index, name in enumerate(NAMES, start=1)
    )
)
GRAY = torch.full((3, 100, 200), 128, dtype=torch.uint8)


def pixels(figure: Figure) -> np.ndarray:
    """The figure as [H, W, 4] uint8, as wide as its image has pixels times a whole number."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def at(figure: Figure, x: float, y: float) -> list[int]:
    """The colour the figure shows at a place of its first axes."""
    column, row = figure.axes[0].transData.transform((x, y))
    image = pixels(figure)
    return image[image.shape[0] - 1 - int(row), int(column), :3].tolist()


def square(left: int, top: int, side: int, label: int = 2) -> Target:
    masks = torch.zeros(1, 100, 200, dtype=torch.bool)
    masks[0, top : top + side, left : left + side] = True
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return Target(box, torch.tensor([label]), masks)


def as_detections(target: Target, score: float = 0.9) -> Detections:
    count = len(target)
    return Detections(target.boxes, torch.full((count,), score), target.labels, torch.ones(count, 28, 28))


@pytest.mark.parametrize("instances", [square(120, 10, 60), as_detections(square(120, 10, 60))])
def test_the_mask_lies_where_it_is(instances):
    figure = draw(GRAY, instances, NAMES)
    inside = at(figure, 150, 40)
    assert inside[0] > inside[2] + 60, "orange over gray"
    for x, y in ((40, 150 / 2), (50, 40), (150, 90), (190, 40), (110, 40)):
        assert at(figure, x, y) == [128, 128, 128]


def test_holes_stay_open():
    target = square(50, 20, 60)
    target.masks[0, 40:60, 70:90] = False
    figure = draw(GRAY, target, NAMES, boxes=False, labels=False)
    assert at(figure, 80, 50) == [128, 128, 128]
    assert at(figure, 60, 50) != [128, 128, 128]


def test_each_part_can_be_left_out():
    target = square(50, 20, 60)
    nothing = draw(GRAY, target, NAMES, masks=False, boxes=False, labels=False)
    assert (pixels(nothing)[..., :3] == 128).all()
    assert len(draw(GRAY, target, NAMES, labels=False).axes[0].texts) == 0
    assert not _boxes(draw(GRAY, target, NAMES, boxes=False))


def test_outline_follows_the_pixels():
    axes = stage((50, 50), 3)
    mask = np.zeros((7, 5), dtype=bool)
    mask[2:6, 1:4] = True
    outline(axes, mask, (10, 20), (2, 3))
    (patch,) = [artist for artist in axes.get_children() if isinstance(artist, PathPatch)]
    extent = patch.get_path().get_extents()
    # columns 1..3 of width 2 from x = 10, rows 2..5 of height 3 from y = 20; smoothing shrinks so small a mask a little
    assert (extent.x0, extent.y0, extent.x1, extent.y1) == pytest.approx((12, 26, 18, 38), abs=0.2)


def test_one_pixel_is_visible():
    target = square(100, 50, 1)
    assert at(draw(GRAY, target, NAMES, labels=False, boxes=False), 100.5, 50.5) != [128, 128, 128]


def test_a_mask_without_pixels_is_no_error():
    target = square(100, 50, 0)
    assert isinstance(draw(GRAY, target, NAMES), Figure)


def test_labels_stay_inside_and_apart():
    boxes = torch.tensor(
        [[0, 0, 10, 10], [195, 0, 200, 8], [0, 95, 12, 100], [190, 90, 200, 100], [90, 40, 110, 60], [90, 40, 110, 60]]
    ).float()
    found = Detections(boxes, torch.full((6,), 0.75), torch.tensor([6, 3, 3, 6, 3, 3]))
    figure = draw(GRAY, found, NAMES, size=6)
    figure.canvas.draw()
    axes = figure.axes[0]
    frame = axes.get_window_extent()
    extents = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == ["figure 0.75"] * 2 + ["triangle 0.75"] * 4
    for extent in extents:
        assert frame.x0 - 1.5 <= extent.x0 and extent.x1 <= frame.x1 + 1.5
        assert frame.y0 - 1.5 <= extent.y0 and extent.y1 <= frame.y1 + 1.5
    for index, one in enumerate(extents):
        for other in extents[index + 1 :]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(width, height) < 2, "labels cover each other"


def test_a_label_too_long_for_its_axes_begins_at_their_edge():
    axes, taken = stage((10, 10), 0.5), []
    write(axes, "a long label in a tiny picture", (0, 0, 5, 5), (0, 0, 0), taken)
    panel = axes.get_window_extent()
    assert [text.get_text() for text in axes.texts] == ["a long label in a tiny picture"]
    assert taken[0][0] == panel.x0 and taken[0][2] > panel.x1


def test_scores_below_the_threshold_are_left_out():
    found = as_detections(square(50, 20, 60), score=0.4)
    assert len(draw(GRAY, found, NAMES).axes[0].texts) == 0
    assert [t.get_text() for t in draw(GRAY, found, NAMES, score_threshold=0.4).axes[0].texts] == ["square 0.40"]
    assert [t.get_text() for t in draw(GRAY, found, score_threshold=0.3).axes[0].texts] == ["class 2 0.40"]


def test_crowds_say_so():
    target = square(50, 20, 60)
    target = Target(target.boxes, target.labels, target.masks, crowd=torch.tensor([True]))
    assert [text.get_text() for text in draw(GRAY, target, NAMES).axes[0].texts] == ["square (crowd)"]


def joints_target(label: int = 6) -> Target:
    joints = torch.zeros(1, 7, 3)
    joints[0, :4] = torch.tensor([[100.0, 20, 2], [100, 40, 2], [100, 60, 1], [80, 50, 2]])
    return Target(torch.tensor([[70.0, 10, 130, 90]]), torch.tensor([label]), keypoints=joints)


def test_skeleton_joins_labelled_joints_and_shows_hidden_ones_hollow():
    lines = [line for line in draw(GRAY, joints_target(), CATEGORIES).axes[0].lines if isinstance(line, Line2D)]
    limbs = [line for line in lines if len(line.get_xdata()) == 2]
    marks = [line for line in lines if len(line.get_xdata()) == 1]
    assert len(limbs) == 3  # head-neck, neck-hip, neck-left hand; the others miss an end
    assert len(marks) == 4
    hollow = [mark for mark in marks if mark.get_markerfacecolor() == "none"]
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in hollow] == [(100, 60)]


def test_no_joints_for_classes_without_or_when_not_wanted():
    assert not draw(GRAY, joints_target(label=2), CATEGORIES).axes[0].lines
    assert not draw(GRAY, joints_target(), CATEGORIES, keypoints=False).axes[0].lines
    target = joints_target()
    found = Detections(target.boxes, torch.ones(1), target.labels, keypoints=torch.zeros(1, 7, 3))
    assert not draw(GRAY, found, CATEGORIES).axes[0].lines  # zeros: the model has none for this class
    assert len(draw(GRAY, target).axes[0].lines) == 4  # without a map: joints, but nothing to join them by


def test_small_instances_are_drawn_on_top():
    target = Target.cat([square(60, 20, 20), square(50, 10, 70)])
    order = [text.get_position() for text in draw(GRAY, target, NAMES).axes[0].texts]
    patches = [a for a in draw(GRAY, target, NAMES).axes[0].get_children() if isinstance(a, PathPatch)]
    widths = [patch.get_path().get_extents().width for patch in patches]
    assert widths == sorted(widths, reverse=True) and len(order) == 2


def test_own_axes_and_size():
    figure = Picture(4, 4)
    axes = figure.panel(1, 1, 2, 2)
    assert draw(GRAY, square(50, 20, 60), NAMES, ax=axes) is figure
    assert axes.get_xlim() == (0, 200) and axes.get_ylim() == (100, 0)
    assert draw(GRAY, square(50, 20, 60), NAMES, size=5).get_size_inches().tolist() == [5, 2.5]


def test_long_and_large_images():
    line = draw(torch.zeros(3, 1, 5000, dtype=torch.uint8), Target.empty((1, 5000)), NAMES)
    assert line.get_size_inches().tolist() == [6, 0.5]
    start = time.perf_counter()
    boxes = torch.tensor([[100.0, 100, 2000, 2900], [2000, 100, 3900, 1500]])
    found = Detections(boxes, torch.ones(2), torch.tensor([1, 2]), torch.ones(2, 28, 28))
    figure = draw(torch.full((3, 3000, 4000), 128, dtype=torch.uint8), found, NAMES)
    assert at(figure, 1000, 1500) != [128, 128, 128] and at(figure, 3000, 2000) == [128, 128, 128]
    assert time.perf_counter() - start < 5
    target = Target(boxes[:1], torch.tensor([1]), torch.zeros(1, 3000, 4000, dtype=torch.bool))
    target.masks[0, 100:2900, 100:2000] = True
    figure = draw(torch.full((3, 3000, 4000), 128, dtype=torch.uint8), target, NAMES)
    assert at(figure, 1000, 1500) != [128, 128, 128] and at(figure, 3000, 2000) == [128, 128, 128]


def test_images_of_every_kind(tmp_path):
    array = GRAY.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "gray.png")
    for image in (array, Image.fromarray(array), tmp_path / "gray.png", GRAY / 255):
        assert at(draw(image, Target.empty((100, 200))), 20, 20) == [128, 128, 128]


def test_what_does_not_fit_is_refused():
    target = square(50, 20, 60)
    with pytest.raises(ValueError, match="100 x 200 but the image is 50 x 50"):
        draw(torch.zeros(3, 50, 50), target)
    with pytest.raises(ValueError, match=r"1\.\.1 \(the names given\), got 2 to 2"):
        draw(GRAY, target, ["circle"])
    with pytest.raises(ValueError, match="one colour per instance"):
        draw(GRAY, target, NAMES, colours=[])
    with pytest.raises(ValueError, match="one target and one prediction per image"):
        sheet([GRAY], [target], [], NAMES)
    with pytest.raises(ValueError, match="one target and one prediction per image"):
        sheet([], [], [], NAMES)
    with pytest.raises(ValueError, match="one entry per anchor"):
        draw_anchors(GRAY, torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))


def test_nothing_given_is_changed():
    target = square(50, 20, 60)
    image, before = GRAY.clone(), target.boxes.clone()
    draw(image, target, NAMES)
    assert torch.equal(image, GRAY) and torch.equal(target.boxes, before)


def test_sheet_places_pairs():
    images = [GRAY, torch.zeros(3, 150, 100), GRAY, GRAY]
    targets = [square(50, 20, 60), Target.empty((150, 100)), square(20, 20, 20), Target.empty((100, 200))]
    found = [as_detections(target) for target in targets]
    figure = sheet(images, targets, found, NAMES, columns=3, size=9)
    assert len(figure.axes) == 8
    assert [text.get_text() for text in figure.texts] == ["ground truth", "prediction"] * 3
    places = [axes.get_position() for axes in figure.axes]
    assert all(0 <= place.x0 < place.x1 <= 1.0001 and 0 <= place.y0 < place.y1 <= 1 for place in places)
    assert figure.get_figwidth() == 9
    assert sheet(images[:1], targets[:1], found[:1], NAMES).texts[0].get_text() == "ground truth"


def test_a_sheet_is_fast_enough():
    made = [shapes.make(seed) for seed in range(6)]
    images, targets = zip(*made)
    start = time.perf_counter()
    sheet(images, targets, [as_detections(target) for target in targets], CATEGORIES)._repr_png_()
    assert time.perf_counter() - start < 15  # about 1.5 s; the limit allows for a busy machine


def test_colours_of_truth_and_prediction_match():
    target = Target.cat([square(0, 0, 40), square(100, 0, 40), square(100, 50, 40, label=3)])
    found = Detections(
        torch.tensor([[102.0, 0, 141, 40], [100, 2, 140, 40], [100, 50, 140, 90], [0, 60, 30, 90]]),
        torch.tensor([0.6, 0.9, 0.8, 0.7]),
        torch.tensor([2, 2, 2, 2]),
    )
    truth, prediction = matched_colours(target, found)
    assert prediction[1] == truth[1]  # the better of two on the same instance
    assert prediction[0] not in truth  # the other is one too many
    assert prediction[2] not in truth  # a triangle taken for a square
    assert prediction[3] not in truth and len(set(truth)) == 3
    assert matched_colours(Target.empty((9, 9)), found)[0] == []
    assert matched_colours(target, found[:0])[1] == []


def test_palette():
    colours = palette(21)
    assert len(set(colours)) == 21 and palette(22)[21] == colours[0]
    assert all(0 <= channel <= 1 for colour in colours for channel in colour)
    for colour in colours:  # the label's ink has a contrast of at least 4.5 : 1, as WCAG 2 asks
        ink = 0.0 if contrast(colour) == "black" else 1.0
        bright, dark = sorted((ink, luminance(colour)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_shrink():
    assert shrink(torch.full((3, 4, 8), 0.5), 8)[0, 0, 0] == 128
    assert shrink(torch.zeros(3, 400, 1000, dtype=torch.uint8), 100).shape == (3, 40, 100)
    assert shrink(torch.zeros(3, 1, 5000, dtype=torch.uint8), 100).shape == (3, 1, 100)


def test_a_notebook_shows_it_without_pyplot():
    figure = draw(GRAY, square(50, 20, 60), NAMES)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not Gcf.get_all_fig_managers()  # pyplot's list of open figures, which grows until someone closes them


def _boxes(figure: Figure) -> list[tuple[float, float, float, float]]:
    return [
        patch.get_bbox().extents.tolist()
        for patch in figure.axes[0].get_children()
        if isinstance(patch, Rectangle) and patch is not figure.axes[0].patch
    ]


def test_anchors_and_proposals():
    boxes = torch.tensor([[10.0, 10, 50, 50], [60, 10, 90, 90], [100, 0, 300, 90]])
    target = square(50, 20, 60)
    figure = draw_anchors(GRAY, boxes, torch.tensor([1, 0, -1]), target)
    assert [len(c.get_segments()) for c in figure.axes[0].collections] == [1, 1, 1]  # ignored, negative, positive
    assert _boxes(figure) == [[50, 20, 110, 80]]
    assert draw_anchors(GRAY, boxes).axes[0].get_xlim() == (0, 200)
    assert at(figure, 150, 95) == [76, 76, 76], "the image is dimmed"
    assert isinstance(draw_anchors(GRAY, boxes[:0]), Figure)
    best = draw_proposals(GRAY, Proposals(boxes, torch.tensor([0.1, 0.9, 0.5])), target, most=2)
    (lines,) = best.axes[0].collections
    assert [segment[0].tolist() for segment in lines.get_segments()] == [[100, 0], [60, 10]]  # the best comes last
    assert isinstance(draw_proposals(GRAY, Proposals(boxes[:0], torch.zeros(0))), Figure)


def roi_panel(layer: str, roi: list[float], bins: int = 2, **options):
    figure = draw_rois(torch.zeros(8, 10), torch.tensor([roi]), bins, 1 / 8, [layer], **options)
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    first = dots[0]
    return _boxes(figure), sorted(set(first.get_xdata().tolist())), sorted(set(first.get_ydata().tolist()))


def test_roi_align_by_hand():
    # (4, 8, 36, 24) px at stride 8 is (0.5, 1, 4.5, 3) in cells: bins are 2 wide and 1 high, samples at 1/4 and 3/4.
    boxes, xs, ys = roi_panel("roi_align", [4, 8, 36, 24])
    assert boxes[0] == [0.5, 1, 2.5, 2] and boxes[3] == [2.5, 2, 4.5, 3]
    assert boxes[-1] == [0.5, 1, 4.5, 3]  # the RoI itself
    assert (xs, ys) == ([1.0, 2.0], [1.25, 1.75])
    boxes, xs, _ = roi_panel("roi_align", [4, 8, 36, 24], aligned=False)
    assert boxes[0] == [1, 1.5, 3, 2.5] and xs == [1.5, 2.5]  # half a cell too far right and down


def test_roi_warp_by_hand():
    # 0.5 is rounded to 1 and 4.5 to 5: cells 1 to 5, so five cells for two bins; 1 to 3 vertically.
    boxes, xs, _ = roi_panel("roi_warp", [4, 8, 36, 24])
    assert boxes[0] == [1, 1, 3.5, 2.5] and boxes[3] == [3.5, 2.5, 6, 4]
    assert xs == pytest.approx([1.625, 2.875])


def test_roi_pool_by_hand():
    # The same cells 1 to 5, and bins of whole cells: 1 to 3 and 3 to 5, which share cell 3. Drawn 0.1 cells smaller.
    boxes, xs, ys = roi_panel("roi_pool", [4, 8, 36, 24])
    assert boxes[0] == pytest.approx([1.1, 1.1, 3.9, 2.9]) and boxes[3] == pytest.approx([3.1, 2.1, 5.9, 3.9])
    assert (xs, ys) == ([1.5, 2.5, 3.5], [1.5, 2.5])  # centres of cells


def test_rois_beside_each_other():
    figure = draw_rois(torch.rand(4, 8, 10), torch.tensor([[4.0, 8, 36, 24], [30, 30, 70, 50]]), 3, 1 / 8)
    assert [axes.get_title() for axes in figure.axes] == ["RoIPool", "RoIWarp", "RoIAlign"]
