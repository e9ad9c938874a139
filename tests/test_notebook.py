"""What chapters are made with: included source, glued numbers, checks of exercises, figures with knobs."""

from __future__ import annotations

import base64
import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mrcnn_edu import boxes, notebook, widgets
from mrcnn_edu.canvas import charts
from mrcnn_edu.exercises import check_function, check_that, check_value
from mrcnn_edu.models import rpn

# ---------------------------------------------------------------------------------------------------------------------
# Source and numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_source_is_included_as_it_is():
    shown = notebook.show_source(boxes.area, boxes.iou)
    markdown = shown._repr_markdown_()
    with open(boxes.__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    for name, line in re.findall(r"\*(mrcnn_edu/boxes\.py), line (\d+)\*", markdown):
        assert name == "mrcnn_edu/boxes.py"
        assert lines[int(line) - 1].startswith(("def area", "def iou"))
    assert markdown.count("````python") == 2
    assert "def iou" in repr(shown)
    beginning = repr(notebook.show_source(boxes.area, lines=2)).splitlines()
    assert beginning[1].startswith("def area") and beginning[3] == "    # ... and 1 more lines" and len(beginning) == 4
    method = repr(notebook.show_source(notebook.Source._repr_markdown_)).splitlines()
    assert method[1].startswith("def ") and method[2].startswith("    return ")
    assert "mrcnn_edu/boxes.py*" in notebook.show_source(boxes)._repr_markdown_()


def test_only_this_package_is_included():
    with pytest.raises(ValueError, match="this package only"):
        notebook.show_source(re.compile)
    with pytest.raises(ValueError, match="at least one"):
        notebook.show_source()


def test_numbers_are_printed_for_a_reader_and_glued_for_a_page(monkeypatch, capsys):
    monkeypatch.delenv(notebook.BUILDING, raising=False)
    notebook.glue("gain", 0.25)
    assert capsys.readouterr().out == "gain = 0.25\n"
    kept = {}
    fake = types.SimpleNamespace(glue=lambda name, value, display: kept.update({name: (value, display)}))
    monkeypatch.setitem(sys.modules, "myst_nb", fake)
    monkeypatch.setenv(notebook.BUILDING, "1")
    notebook.glue("gain", 0.25)
    notebook.measured()
    assert kept["gain"] == (0.25, False)
    assert kept["seconds"][0] >= 1
    assert sys.platform == "win32" or 0.05 < kept["memory"][0] < 64
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_right_function_passes_and_a_wrong_one_is_told_why():
    box = torch.tensor([[0.0, 0, 2, 3]])
    assert check_function(boxes.area, boxes.area, [(box,), (2 * box,)]).passed
    wrong = {
        "no answer": lambda b: ...,
        "gave None": lambda b: None,
        r"shape \[1, 1\]": lambda b: boxes.area(b)[:, None],
        r"gave \[7.0\]": lambda b: boxes.area(b) + 1,
        r"gave \[6.3333\], wanted \[6.0\]": lambda b: boxes.area(b) + 1 / 3,
        "raised ZeroDivisionError": lambda b: 1 / 0,
    }
    for text, function in wrong.items():
        verdict = check_function(function, boxes.area, [(box,)], hint="multiply")
        assert not verdict.passed
        assert re.search(text, repr(verdict)), repr(verdict)
        assert repr(verdict).startswith("✗") and "Hint: multiply" in repr(verdict)
    with pytest.raises(ValueError, match="without inputs"):
        check_function(boxes.area, boxes.area, [])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (3, 4),
        (1 / 7, 0.14),
        ("left", "right"),
        (True, False),
        ([1, 2], [2, 1]),
        ([1, 2], [1, 2, 3]),
        ((0.5, "x"), (0.5, "y")),
        ({"a": 1}, {"b": 1}),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])),
        (torch.tensor([True]), torch.tensor([1])),
        (np.array([1, 2]), "text"),
        (None, 0),
        (1, ...),
    ],
)
def test_values_are_compared(right, wrong):
    assert check_value(right, right).passed
    assert not check_value(wrong, right).passed
    assert not check_value(..., right).passed


def test_a_refusal_does_not_give_the_value_away():
    assert "0.142" not in repr(check_value(0.5, 1 / 7))


def test_claims_are_tried_in_order():
    assert check_that((lambda: True, "no"), (lambda: 1, "no")).passed
    assert "second" in repr(check_that((lambda: True, "first"), (lambda: False, "second")))
    assert "broken (KeyError: 'x')" in repr(check_that((lambda: {}["x"], "broken")))
    with pytest.raises(ValueError, match="without claims"):
        check_that()


# ---------------------------------------------------------------------------------------------------------------------
# Figures with knobs
# ---------------------------------------------------------------------------------------------------------------------


def bars(height, colour="gray"):
    figure = Figure(figsize=(1, 1), dpi=40)
    figure.add_axes((0, 0, 1, height)).set_facecolor(colour)
    return figure


def test_frames_hold_one_picture_per_setting():
    knobs = {"height": [0.25, 0.5, 1.0], "colour": ["red", "blue"]}
    alt, start = "{height} & {colour}", {"height": 0.5, "colour": "blue"}
    html = widgets.frames(bars, knobs, alt, "A <b> caption", start)._repr_html_()
    images = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]*)"( hidden)?>', html)
    assert [alt for _, alt, _ in images] == [f"{h} &amp; {c}" for h in (0.25, 0.5, 1) for c in ("red", "blue")]
    assert [not hidden for _, _, hidden in images] == [False, False, False, True, False, False]
    assert re.findall(r'max="(\d)" step="1" value="(\d)" aria-label="(\w+)"', html) == [
        ("2", "1", "height"),
        ("1", "1", "colour"),
    ]
    assert "A &lt;b&gt; caption" in html and "http" not in html
    picture = Image.open(io.BytesIO(base64.b64decode(images[3][0]))).convert("RGB")
    assert picture.size == (40, 40)
    red, _, blue = picture.getpixel((20, 30))
    assert blue > 200 > 60 > red


def test_frames_refuse_what_makes_no_figure():
    with pytest.raises(ValueError, match="at least one knob"):
        widgets.frames(bars, {}, "x")
    with pytest.raises(ValueError, match="no values"):
        widgets.frames(bars, {"height": []}, "x")
    with pytest.raises(ValueError, match="got 65"):
        widgets.frames(bars, {"height": [i / 65 for i in range(65)]}, "{height}")
    with pytest.raises(ValueError, match="alt text of its own"):
        widgets.frames(bars, {"height": [0.1, 0.2]}, "always the same")
    with pytest.raises(ValueError, match="cannot start at 3"):
        widgets.frames(bars, {"height": [0.1, 0.2]}, "{height}", start={"height": 3})


def test_explore_is_frames_without_a_kernel_and_live_with_one(monkeypatch):
    knobs = {"height": [0.25, 0.5]}
    assert isinstance(widgets.explore(bars, knobs, "{height}"), widgets.Frames)
    ipywidgets = pytest.importorskip("ipywidgets")
    monkeypatch.delenv(notebook.BUILDING, raising=False)
    monkeypatch.setattr(widgets, "has_kernel", lambda: True)
    box = widgets.explore(bars, knobs, "{height}", "Turn it.", {"height": 0.5}, live={"height": [0.1, 0.5, 0.9]})
    assert isinstance(box, ipywidgets.VBox)
    slider = box.children[0]
    assert (slider.value, [value for _, value in slider.options]) == (0.5, [0.1, 0.5, 0.9])
    with pytest.raises(ValueError, match=r"cannot start at 0\.5"):  # a value of the page, but none of the live ones
        widgets.explore(bars, knobs, "{height}", start={"height": 0.5}, live={"height": [0.1, 0.9]})
    monkeypatch.setenv(notebook.BUILDING, "1")
    assert isinstance(widgets.explore(bars, knobs, "{height}"), widgets.Frames)


def test_charts_stand_beside_each_other_without_a_ground():
    left, right = charts(2, 4, 2)
    assert left.figure is right.figure
    assert tuple(left.figure.get_size_inches()) == (4, 2)
    left.plot([0, 1], [0, 1])
    pixels = np.asarray(Image.open(io.BytesIO(left.figure._repr_png_())))
    assert pixels[0, 0, 3] == 0
    assert left.get_position().x1 < right.get_position().x0


def test_decorated_functions_show_where_they_were_written():
    shown = notebook.show_source(rpn.propose)._repr_markdown_()  # under torch.no_grad
    assert "mrcnn_edu/models/rpn.py" in shown and "def propose(" in shown


def test_native_source_is_included_as_it_is():
    shown = notebook.show_native("roi_math.h", "taps_at")
    file = Path(notebook.__file__).parent.parent / "csrc/roi_math.h"
    assert shown.code in file.read_text(encoding="utf-8")
    assert shown.code.startswith("// The border continues") and shown.code.endswith("part};\n}")
    line = int(re.search(r"line (\d+)", shown._repr_markdown_())[1])
    assert file.read_text(encoding="utf-8").split("\n")[line - 1] == shown.code.split("\n")[0]
    assert repr(notebook.show_native("cuda/numbers.cuh", "first_item")).rstrip().endswith("threadIdx.x; }")
    with pytest.raises(ValueError, match="no definition of nothing_at_all"):
        notebook.show_native("roi_math.h", "nothing_at_all")


def test_native_source_without_a_checkout_says_so():
    assert "the repository has it" in notebook.show_native("no_such_file.h", "x")._repr_markdown_()
