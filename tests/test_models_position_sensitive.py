"""Position-sensitive maps: by hand, by law, and against torchvision's ps_roi_align."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import ps_roi_align

from mrcnn_edu import ops
from mrcnn_edu.models.position_sensitive import assemble, inside_outside


def test_each_part_reads_its_own_map_by_hand():
    """Map n is n everywhere, so the assembled roi shows which map each bin was read from."""
    maps = torch.arange(4.0)[None, :, None, None].expand(1, 4, 8, 8)
    found = assemble(maps, torch.tensor([[0.0, 0, 0, 8, 8]]), parts=2, bins=2, spatial_scale=1.0)
    wanted = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float32)[None, None])


def test_one_part_is_roi_align():
    maps, rois = torch.randn(2, 3, 10, 12), torch.tensor([[0.0, 3, 4, 40, 30], [1, 0, 0, 48, 40]])
    torch.testing.assert_close(assemble(maps, rois, 1, 6, 0.25), ops.roi_align(maps, rois, 6, 0.25))


def test_one_bin_a_part_is_torchvisions():
    """torchvision has the channels class by class, with the parts inside."""
    parts, classes = 3, 4
    maps = torch.randn(2, parts**2 * classes, 12, 16)
    rois = torch.tensor([[0.0, 5, 7, 90, 61], [1, 20, 10, 55, 80], [1, 0, 0, 128, 96]])
    theirs = maps.unflatten(1, (parts**2, classes)).transpose(1, 2).flatten(1, 2)
    wanted = ps_roi_align(theirs, rois, parts, spatial_scale=1 / 8, sampling_ratio=2)
    torch.testing.assert_close(assemble(maps, rois, parts, 1, 1 / 8), wanted)


def test_where_two_rois_agree_about_the_part_they_agree_about_the_number():
    """The law behind Figure 6: equal places of equal rois have equal numbers, whatever the object."""
    maps = torch.randn(1, 9, 16, 16)
    once = assemble(maps, torch.tensor([[0.0, 2, 2, 14, 14]]), 3, 4, 1.0)
    shifted = assemble(maps, torch.tensor([[0.0, 3, 2, 15, 14]]), 3, 4, 1.0)  # by one pixel, a bin
    for part in range(3):  # but for the last bin of each part
        first = 4 * part
        torch.testing.assert_close(once[..., first + 1 : first + 4], shifted[..., first : first + 3])


def test_inside_and_outside_by_hand():
    masks, logits = inside_outside(torch.tensor([[[[2.0, 0.0]], [[0.0, 4.0]]]]))  # one class, two pixels
    torch.testing.assert_close(masks[0, 0, 0], torch.sigmoid(torch.tensor([2.0, -4.0])))
    assert logits.tolist() == [[3.0]]  # (2 + 4) / 2


def test_gradients_reach_the_own_map_only():
    maps = torch.zeros(1, 4, 8, 8, requires_grad=True)
    assemble(maps, torch.tensor([[0.0, 0, 0, 8, 8]]), 2, 2, 1.0)[..., :2, :2].sum().backward()
    assert bool(maps.grad[0, 0].any()) and not bool(maps.grad[0, 1:].any())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of parts"):
        assemble(torch.zeros(1, 5, 8, 8), torch.zeros(1, 5), 2, 1, 1.0)
    with pytest.raises(ValueError, match="two maps"):
        inside_outside(torch.zeros(1, 3, 2, 2))
