"""What every probe leaves behind: a table on the screen, NAME.json with the settings, and NAME.png."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import vision_ssm
from vision_ssm.files import replacing, write_text

MARKED = 30
"""Longest curve whose points are drawn."""


@dataclass(frozen=True)
class Curve:
    """One line of the plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Report:
    """Results of one probe."""

    name: str
    settings: dict[str, Any]
    columns: tuple[str, ...]
    """The first names the rows."""
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    """Text and numbers; None where there is nothing to measure."""
    curves: list[Curve] = field(default_factory=list)
    """For a plot of lines; without any, the rows are drawn as bars."""
    axes: dict[str, str] = field(default_factory=dict)
    """xlabel, ylabel, xscale, yscale of the plot."""

    def table(self) -> str:
        """Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *([_text(cell) for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def write(self, folder: Path) -> None:
        """NAME.json and NAME.png."""
        machine = {
            "device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "vision-ssm": vision_ssm.__version__,
        }
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        content = {"probe": self.name, "settings": self.settings, "machine": machine, "rows": rows}
        write_text(folder / f"{self.name}.json", json.dumps(content, indent=2, default=str) + "\n")
        self._plot(folder / f"{self.name}.png")

    def _plot(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        plot = figure.add_subplot()
        plot.set(title=f"vssm probe {self.name}", **self.axes)
        plot.grid(alpha=0.3)
        for curve in self.curves:
            plot.plot(curve.x, curve.y, "o-" if len(curve.x) <= MARKED else "-", label=curve.name)
        if not self.curves:
            self._bars(plot)
        plot.legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
        with replacing(path) as temporary:
            FigureCanvasAgg(figure).print_png(str(temporary))

    def _bars(self, plot: Any) -> None:
        """A group of bars for every row, one bar for every column of numbers."""
        numbers = [i for i in range(1, len(self.columns)) if any(isinstance(row[i], float) for row in self.rows)]
        width = 0.8 / max(1, len(numbers))
        for place, i in enumerate(numbers):
            values = [row[i] if isinstance(row[i], float) else 0.0 for row in self.rows]
            plot.bar(
                [j + (place + 0.5) * width - 0.4 for j in range(len(values))], values, width, label=self.columns[i]
            )
        plot.set_xticks(range(len(self.rows)), [str(row[0]) for row in self.rows], rotation=30, ha="right")


def _text(cell: Any) -> str:
    return "-" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell)
