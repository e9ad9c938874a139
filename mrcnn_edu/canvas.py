"""The pens and inks of every picture: figures, colours, outlines of masks, and labels that stay inside the image.

Used by ``visualize`` from Chapter 1 on. The colours are those of Okabe and Ito (2008), which colour-blind readers can
tell apart; figures have no background of their own, so that they sit well on light and on dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from contourpy import FillType, contour_generator
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from torch import Tensor

from mrcnn_edu.structures import Size

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

INK = "#808080"  # titles and axes: the one gray that reads on white and on black
PALETTE = tuple(to_rgb(code) for code in ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2"))


class Picture(Figure):
    """A matplotlib Figure that a notebook shows without pyplot, and that leaves no global state behind."""

    def __init__(self, width: float, height: float) -> None:
        """A transparent figure of the given width and height in inches."""
        super().__init__(figsize=(width, height), dpi=110, facecolor="none")
        FigureCanvasAgg(self)  # keeps one renderer, where the plain canvas makes a new one for every text it measures

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without ticks at a place given in inches from the figure's upper left corner."""
        total_width, total_height = self.get_size_inches()
        place = (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
        axes = self.add_axes(place)
        axes.set_axis_off()
        return axes


def charts(count: int = 1, width: float = 6.5, height: float = 3.0) -> list[Axes]:
    """Axes for curves and bars, so many beside each other in one figure of the given width and height in inches."""
    figure = Picture(width, height)
    figure.set_layout_engine("constrained")
    chosen = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for axes in chosen:
        axes.set_facecolor("none")
        axes.set_prop_cycle(color=[PALETTE[number] for number in (6, 5, 4, 0, 2)])
        axes.grid(True, color=INK, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
        axes.title.set(color=INK, fontsize=10)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=9)
    return chosen


def palette(count: int) -> list[Colour]:
    """So many colours that differ: the seven of the palette, then their lighter and their darker shades."""
    mixes = ((0.0, 0.0), (0.5, 1.0), (0.4, 0.0))  # share and gray level of what is mixed in
    colours = [
        tuple(float((1 - share) * c + share * gray) for c in colour) for share, gray in mixes for colour in PALETTE
    ]
    return [colours[index % len(colours)] for index in range(count)]


def luminance(colour: Colour) -> float:
    """How bright the colour looks, 0 to 1 (relative luminance of WCAG 2, for choosing black or white on top of it)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: Colour) -> str:
    """Black or white, whichever reads better on the colour."""
    return "black" if luminance(colour) > 0.179 else "white"


def halo(colour: Colour, width: float) -> list[withStroke]:
    """A thin edge around a line of the colour, so that it shows on a ground of any brightness; width in points."""
    edge = (0, 0, 0, 0.65) if contrast(colour) == "black" else (1, 1, 1, 0.75)
    return [withStroke(linewidth=width, foreground=edge)]


def shrink(image: Tensor, most: int) -> Tensor:
    """The image ``[3, H, W]`` as uint8, its longer side at most ``most`` pixels: no screen shows more."""
    pixels = image if image.dtype == torch.uint8 else (image.detach().float() * 255).round().to(torch.uint8)
    longer = max(pixels.shape[1:])
    if longer <= most:
        return pixels.cpu()
    size = [max(1, round(side * most / longer)) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None].cpu(), size, mode="bilinear", antialias=True)[0]


def stage(size: Size, longer: float, axes: Axes | None = None) -> Axes:
    """Axes that count the pixels of an image of the given (height, width), in a new figure unless axes are given.

    longer  inches, longer side of the new figure; no side is under half an inch
    """
    height, width = size
    if axes is None:
        inches = [max(0.5, side * longer / max(size)) for side in (width, height)]
        axes = Picture(*inches).panel(0, 0, *inches)
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.apply_aspect()  # now, since labels are placed by what the panel really measures
    return axes


def show(axes: Axes, pixels: Tensor | np.ndarray, size: Size, **style) -> None:
    """Paint an array ``[h, w]`` or ``[h, w, 3]`` over all of an image of the given (height, width)."""
    # pixel i covers [i, i + 1), so the picture's corners, not the centres of its corner pixels, lie at 0 and at size
    axes.imshow(pixels, extent=(0, size[1], size[0], 0), **{"interpolation": "lanczos", **style})


def frame(axes: Axes, box: Sequence[float], colour: Colour, width: float, **style) -> None:
    """Draw one box (x1, y1, x2, y2) in a line of the given width in points."""
    x1, y1, x2, y2 = box
    # add_artist, since add_patch works out limits that stage() has already set
    axes.add_artist(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width, **style))


def outline(axes: Axes, mask: np.ndarray, corner: tuple[float, float], scale: tuple[float, float], **style) -> None:
    """Fill and outline one mask ``[h, w]`` bool, holes left open.

    corner  (x, y) of the mask's upper left corner in the axes
    scale   (x, y) extent of one mask pixel in the axes
    """
    padded = np.pad(mask, 1).astype(np.float32)
    points, offsets = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    rings = [_smooth(part[i:j]) for part, cuts in zip(points, offsets) for i, j in pairwise(cuts)]
    if rings:
        # sample i of the padded mask is the centre of pixel i - 1, which lies at i - 0.5
        vertices = (np.concatenate(rings) - 0.5) * scale + corner
        codes = [[Path.MOVETO] + [Path.LINETO] * (len(ring) - 2) + [Path.CLOSEPOLY] for ring in rings]
        axes.add_artist(PathPatch(Path(vertices, np.concatenate(codes)), **style))


def _smooth(ring: np.ndarray) -> np.ndarray:
    """A closed ring ``[n, (x, y)]`` without the steps of its pixels; no corner moves by more than half a pixel."""
    corners = ring[:-1]
    for _ in range(2):
        corners = 0.5 * corners + 0.25 * (np.roll(corners, 1, axis=0) + np.roll(corners, -1, axis=0))
    return np.concatenate([corners, corners[:1]])


def write(
    axes: Axes, text: str, box: Sequence[float], colour: Colour, taken: list[np.ndarray], fontsize: float = 8
) -> None:
    """Put a label on a ground of its own colour at the box, inside the image, off the labels already there.

    box    (x1, y1, x2, y2) in the axes
    taken  the extents of the labels so far, in display pixels; the new one is appended
    """
    label = axes.text(
        0, 0, text, fontsize=fontsize, color=contrast(colour), ha="left", va="bottom", zorder=9,
        bbox={"boxstyle": "square,pad=0.2", "facecolor": (*colour, 0.9), "edgecolor": "none"},
    )  # fmt: skip
    extent, panel = label.get_window_extent(), axes.get_window_extent()
    origin = axes.transData.transform((0, 0))
    pad = 0.2 * fontsize * axes.figure.dpi / 72
    width, height = extent.width + 2 * pad, extent.height + 2 * pad
    (left, top), (right, bottom) = axes.transData.transform([(box[0], box[1]), (box[2], box[3])])
    corners = [
        (left, top), (left, top - height), (left, bottom), (left, bottom - height),
        (right - width, top), (right - width, bottom - height), (right, top - height), (left - width, top - height),
    ]  # fmt: skip  # lower left corners, best first: on top of the box, inside it, at its foot, under it, ...
    places = []
    for x, y in corners:
        x = max(panel.x0, min(x, panel.x1 - width))
        y = max(panel.y0, min(y, panel.y1 - height))
        places.append(np.array([x, y, x + width, y + height]))
    best = places[int(np.argmin([sum(_shared(place, other) for other in taken) for place in places]))]
    taken.append(best)
    # the text's extent starts a little off the point it is anchored at
    anchor = best[:2] + pad - (extent.x0 - origin[0], extent.y0 - origin[1])
    label.set_position(axes.transData.inverted().transform(anchor))


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """The area two extents (x1, y1, x2, y2) share."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return max(0.0, float(width)) * max(0.0, float(height))
