"""Figures with knobs: live in JupyterLab and Colab, precomputed frames behind a plain HTML slider on a static page.

Used by every chapter from Chapter 1 on. The static form needs no kernel, no library and no network: all frames are in
the page, the slider is the browser's own, so it works with the keyboard and names what it sets.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from mrcnn_edu.notebook import building

MOST_FRAMES = 64  # of one figure; a page that holds more gets slow to load

Draw = Callable[..., Figure]  # one argument per knob
Knobs = Mapping[str, Sequence[Any]]  # values by the name of draw's argument

_SCRIPT = """
(function () {
  const figure = document.getElementById("%s");
  const knobs = Array.from(figure.querySelectorAll("input"));
  function show() {
    let index = 0;
    for (const knob of knobs) {
      const texts = JSON.parse(knob.dataset.texts);
      index = index * texts.length + Number(knob.value);
      knob.setAttribute("aria-valuetext", texts[knob.value]);
      knob.nextElementSibling.textContent = texts[knob.value];
    }
    figure.querySelectorAll("img").forEach((image, number) => { image.hidden = number !== index; });
  }
  knobs.forEach((knob) => knob.addEventListener("input", show));
  show();
})();
"""


class Frames:
    """One picture per setting of the knobs, all in one piece of HTML that shows the chosen one."""

    def __init__(
        self,
        draw: Draw,
        knobs: Knobs,
        alt: str,
        caption: str = "",
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """Draw every frame now.

        draw     called with one value per knob, returns the figure
        knobs    the values of each, by the name of draw's argument; the last one changes fastest
        alt      describes a frame to who cannot see it, with {knob} where its value belongs; differs between frames
        caption  one or two sentences below the figure
        start    the values to begin with; the first of each knob where absent

        Raises ValueError for no knob, too many frames, equal descriptions, or a start that is not among the values.
        """
        count = 1
        for name, values in knobs.items():
            if not len(values):
                raise ValueError(f"knob {name!r} has no values")
            count *= len(values)
        if not knobs or count > MOST_FRAMES:
            raise ValueError(f"a figure has at least one knob and at most {MOST_FRAMES} frames, got {count}")
        self.texts = {name: [_text(value) for value in values] for name, values in knobs.items()}
        self.start = {name: _position(name, values, start or {}) for name, values in knobs.items()}
        self.caption = caption
        self.alts = [alt.format(**dict(zip(knobs, texts))) for texts in itertools.product(*self.texts.values())]
        if len(set(self.alts)) < count or not all(self.alts):
            raise ValueError(f"every frame needs an alt text of its own; let it name the knobs {list(knobs)}")
        self.images = [_webp(draw(**dict(zip(knobs, values)))) for values in itertools.product(*knobs.values())]

    def _repr_html_(self) -> str:
        name = "frames-" + hashlib.sha1("".join(self.images + self.alts).encode()).hexdigest()[:10]
        shown = 0
        for knob, texts in self.texts.items():
            shown = shown * len(texts) + self.start[knob]
        images = "".join(
            f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}"{"" if number == shown else " hidden"}>'
            for number, (data, alt) in enumerate(zip(self.images, self.alts))
        )
        knobs = "".join(self._knob(knob, texts) for knob, texts in self.texts.items())
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return (
            f'<figure class="frames" id="{name}"><div class="frames-stage">{images}</div>'
            f'<div class="frames-knobs">{knobs}</div>{caption}</figure><script>{_SCRIPT % name}</script>'
        )

    def _knob(self, knob: str, texts: list[str]) -> str:
        label, value = escape(knob.replace("_", " ")), self.start[knob]
        return (
            f'<label><span>{label}</span> <input type="range" min="0" max="{len(texts) - 1}" step="1" value="{value}" '
            f'aria-label="{label}" aria-valuetext="{escape(texts[value])}" data-texts="{escape(json.dumps(texts))}">'
            f'<span class="frames-value" aria-hidden="true">{escape(texts[value])}</span></label>'
        )


def frames(draw: Draw, knobs: Knobs, alt: str, caption: str = "", start: Mapping[str, Any] | None = None) -> Frames:
    """A figure whose sliders choose among frames drawn beforehand; arguments as in ``Frames``."""
    return Frames(draw, knobs, alt, caption, start)


def explore(
    draw: Draw,
    knobs: Knobs,
    alt: str,
    caption: str = "",
    start: Mapping[str, Any] | None = None,
    live: Knobs | None = None,
) -> Any:
    """A figure with knobs: drawn anew at every move where a kernel runs, ``frames`` on a static page.

    live  more values for some knobs than a page could hold, used where a kernel draws; other arguments as in ``Frames``
    """
    if building() or not has_kernel():
        return Frames(draw, knobs, alt, caption, start)
    return _live(draw, {**knobs, **(live or {})}, caption, start or {})


def has_kernel() -> bool:
    """Is somebody at a notebook whose kernel can answer widgets?"""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


def _live(draw: Draw, knobs: Knobs, caption: str, start: Mapping[str, Any]) -> Any:
    import ipywidgets
    from IPython.display import display

    controls = {
        name: ipywidgets.SelectionSlider(
            options=[(_text(value), value) for value in values],
            value=values[_position(name, values, start)],
            description=name.replace("_", " "),
            style={"description_width": "initial"},
            layout={"width": "32em", "max_width": "95%"},
            continuous_update=True,
        )
        for name, values in knobs.items()
    }
    picture = ipywidgets.interactive_output(lambda **values: display(draw(**values)), controls)
    return ipywidgets.VBox([*controls.values(), picture, ipywidgets.HTML(f"<em>{escape(caption)}</em>")])


def _position(name: str, values: Sequence[Any], start: Mapping[str, Any]) -> int:
    if name not in start:
        return 0
    if start[name] not in list(values):
        raise ValueError(f"knob {name!r} cannot start at {start[name]!r}, which is not among its values {list(values)}")
    return list(values).index(start[name])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _webp(figure: Figure) -> str:
    """The figure as base64 text; a third of the size of PNG where there is texture."""
    png, webp = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png")
    Image.open(png).save(webp, format="webp", quality=90, method=4)
    return base64.b64encode(webp.getvalue()).decode("ascii")
