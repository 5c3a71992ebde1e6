"""Heat maps as pictures and as one self-contained HTML page."""

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vision_ssm.errors import UserError
from vision_ssm.files import write_bytes, write_text

INCHES, DOTS = 6.4, 110
"""Longer side of a picture's drawing, and dots per inch."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One drawing: a heat map over a picture, or a matrix.

    Attributes:
        title: above it, and in the file's name.
        heat: (H, W), not negative.
        picture: (H', W', 3) uint8 below the heat, None for a matrix.
        point: x, y in pixels of the picture that was asked about.
        box: x1, y1, x2, y2 in pixels of the picture that was asked about.
        axes: names of a matrix' columns and rows.
    """

    title: str
    heat: np.ndarray
    picture: np.ndarray | None = None
    point: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None
    axes: tuple[str, str] = ("", "")


def draw(panel: Panel) -> bytes:
    """PNG of a panel with title, colour bar and the query marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = (panel.heat if panel.picture is None else panel.picture).shape[:2]
    scale = INCHES / max(height, width)
    figure = Figure(figsize=(max(width * scale, 3.2) + 1.0, max(height * scale, 1.6) + 0.7), dpi=DOTS)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = np.clip(panel.heat / _top(panel), 0, 1)
    if panel.picture is None:
        image = axes.imshow(shares, cmap="inferno", vmin=0, vmax=1)
        axes.set_xlabel(panel.axes[0])
        axes.set_ylabel(panel.axes[1])
    else:
        grey = panel.picture.mean(-1, keepdims=True).repeat(3, -1)
        axes.imshow((0.6 * grey + 0.4 * panel.picture).astype(np.uint8))
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        opacity = np.clip(0.15 + 0.75 * shares**0.5, 0, 0.85)
        image = axes.imshow(shares, cmap="inferno", vmin=0, vmax=1, alpha=opacity, extent=extent)
        axes.set_xticks([])
        axes.set_yticks([])
        _mark(axes, panel, max(height, width))
    axes.set_title(panel.title, fontsize=9, wrap=True)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_alpha(1)
    bar._draw_all()  # pyright: ignore[reportAttributeAccessIssue]
    bar.set_label(
        "|M| (1: largest off the diagonal)" if panel.picture is None else "relevance (1: brightest 2 %)", fontsize=8
    )
    bar.ax.tick_params(labelsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight")
    return data.getvalue()


def _top(panel: Panel) -> float:
    """What is drawn brightest: one spot, or a diagonal, often the query itself, must not darken all others."""
    if panel.picture is None:
        top = float(panel.heat[~np.eye(*panel.heat.shape, dtype=bool)].max(initial=0))
    else:
        top = float(np.quantile(panel.heat, 0.98))
    return max(top or float(panel.heat.max()), 1e-30)


def _mark(axes, panel: Panel, side: int) -> None:
    from matplotlib.patches import Rectangle

    if panel.box is not None:
        x1, y1, x2, y2 = panel.box
        for color, line in (("black", 3.5), ("#00e5ff", 1.8)):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=line))
    if panel.point is not None:
        axes.plot(*panel.point, "o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3.5)
        axes.plot(
            *panel.point, "o", markersize=9, markerfacecolor="none", markeredgecolor="#00e5ff", markeredgewidth=1.8
        )


def write_page(
    output: Path, title: str, panels: Sequence[Panel], *, facts: dict[str, object], reading: Sequence[str]
) -> None:
    """Write a folder with a PNG for each panel and index.html, which holds them all.

    Args:
        output: folder; made if it does not exist.
        title: of the page.
        panels: in their order.
        facts: name -> value, for the table.
        reading: paragraphs on how the maps are to be read.

    Raises:
        UserError: the folder cannot be written.
    """
    figures = []
    for number, panel in enumerate(panels, 1):
        data = draw(panel)
        name = re.sub(r"[^a-z0-9]+", "-", panel.title.lower()).strip("-")[:60]
        write_bytes(output / f"{number:02d}-{name}.png", data)
        source = base64.b64encode(data).decode()
        alt = html.escape(panel.title, quote=True)
        figures.append(f'<img alt="{alt}" src="data:image/png;base64,{source}">')
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in reading)
    write_text(
        output / "index.html",
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}'
        f"</style><h1>{html.escape(title)}</h1><table>{rows}</table>{text}<main>{''.join(figures)}</main></html>\n",
    )
    print(f"{len(panels)} maps in {output}, all on one page: {output / 'index.html'}")


def point_of(query: str, height: int, width: int) -> tuple[int, int]:
    """x and y of "x,y" in a picture.

    Raises:
        UserError: not two whole numbers, or outside of the picture.
    """
    parts = query.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--query is {query!r}; expected a pixel as x,y such as 120,64, counted from the upper left")
    x, y = map(int, parts)
    if x >= width or y >= height:
        raise UserError(f"--query {query} lies outside of the picture of {width} x {height} pixels")
    return x, y


_STYLE = (
    "body{font-family:sans-serif;margin:2em auto;max-width:84em;padding:0 1em;line-height:1.45}"
    "main{display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start}img{max-width:100%}"
    "p{max-width:50em}th{text-align:left;padding-right:1.5em;font-weight:normal;color:#666}table{margin-bottom:1em}"
)
