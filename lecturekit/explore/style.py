"""One look for every figure of the course: colours, sizes, and a text for those who do not see the picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008): eight colours that people with any of the common colour deficiencies tell apart.
# Yellow is too pale for lines on white, so it is not in CYCLE; use it for areas with a dark edge.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
GREY = "#5F5F5F"  # notes and reference lines; 6.4 : 1 against white
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"  # colour maps: amounts from low to high, and signed values around zero

SETTINGS: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "image.cmap": SEQUENTIAL,
    "figure.facecolor": "white",
}


def figure(
    rows: int = 1, columns: int = 1, width: float = 4.2, height: float = 3.4, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure in the course's style with `rows` × `columns` panels of width × height inches each.

    Returns (figure, flat array of the axes). The figure belongs to nobody: no notebook draws it by itself, so that it
    appears once, where `alt` shows it. options go to `Figure.subplots`, for example width_ratios=[1, 2] or sharey=True.
    """
    import matplotlib
    import numpy as np
    from cycler import cycler
    from matplotlib.figure import Figure

    for name, value in (("rows", rows), ("columns", columns)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    # set for good, not in a context: matplotlib looks sizes up again at each later call of plot, set_title, legend
    settings: dict[Any, Any] = {**SETTINGS, "axes.prop_cycle": cycler(color=CYCLE)}
    matplotlib.rcParams.update(settings)
    drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **options)
    return drawn, np.asarray(axes).reshape(-1)


class Picture:
    """A drawn figure with its description: an <img alt="…"> in notebooks and on the site, the words in plain text."""

    def __init__(self, png: bytes, text: str, width: int):
        self.png, self.text, self.width = png, text, width

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode("ascii")
        return (
            f'<img src="data:image/png;base64,{data}" alt="{escape(self.text, quote=True)}" '
            f'width="{self.width}" style="max-width:100%;height:auto;background:white">'
        )

    def __repr__(self) -> str:
        return f"[Figure: {self.text}]"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}


def alt(fig: Figure, text: str, dots_per_inch: int = 110) -> Picture:
    """The figure as a picture that carries `text` for screen readers; leave it as the last line of a cell.

    The text says what the figure shows and what to see in it, in a sentence or two. matplotlib's own display gives an
    image without alt text, which a screen reader passes over or reads as "image". Raises ValueError for an empty text.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text must say what the figure shows, got {text!r}")
    buffer = io.BytesIO()
    # a fixed Software tag: matplotlib writes its version there, and the same figure should give the same bytes
    fig.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": "lecturekit"})
    return Picture(buffer.getvalue(), " ".join(text.split()), width=round(fig.get_size_inches()[0] * 96))


def heat(axes: Axes, values: Any, title: str, limit: float | None = None) -> None:
    """A signed matrix as a heat map around zero: blue is negative, red positive, ±limit the ends of the colours."""
    import numpy as np

    shown = np.asarray(values, dtype=float)
    if shown.ndim != 2:
        raise ValueError(f"values must be a matrix, got shape {shown.shape}")
    finite = shown[np.isfinite(shown)]
    limit = limit or (float(np.abs(finite).max()) if finite.size else 0.0) or 1.0
    picture = axes.imshow(shown, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    axes.set_title(title)
    axes.grid(False)
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.85)
    bar.ax.tick_params(labelsize=10)


def say(axes: Axes, words: str) -> None:
    """Write words in the middle of an empty panel, where there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", wrap=True, transform=axes.transAxes, fontsize=12, color=BLACK)


def bars(axes: Axes, labels: Sequence[str], values: Sequence[float], form: str = "{:,.0f}", **options: Any) -> None:
    """Bars with their values written on them, so that nobody has to read a height off an axis."""
    drawn = axes.bar(list(labels), list(values), **{"color": CYCLE[: len(labels)], **options})
    axes.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=11)
    axes.margins(y=0.15)


def moving(draw: Callable[..., Picture], *controls: Any) -> Any:
    """Controls (ipywidgets with a value) above the picture that draw(*values) gives, drawn again at each change.

    Returns the widget, to be left as the last line of a cell. The drawing is an HTML widget with an <img alt="…">, so
    nothing but ipywidgets (7 or 8) is needed, and a screen reader reads each change.
    """
    import ipywidgets as widgets

    drawing = widgets.HTML()

    def redraw(_: object = None) -> None:
        picture = draw(*(control.value for control in controls))
        drawing.value = f'<div aria-live="polite">{picture._repr_html_()}</div>'

    for control in controls:
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([*controls, drawing])
