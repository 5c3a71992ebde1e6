"""What a run tells: a progress bar or one line per epoch, ``metrics.csv`` and TensorBoard."""

import csv
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vision_ssm.files import replacing
from vision_ssm.training.meter import Meter

Row = dict[str, float]


class RunLog:
    """Writes the history of a run, a list of rows with one row per epoch. Does nothing in other than the main process.

    Args:
        run_dir: Where ``metrics.csv`` and ``tensorboard/`` go.
        history: Rows of the epochs before a resume; the files are brought back to them.
        step: Optimiser step at which the run begins or goes on.
    """

    def __init__(self, run_dir: Path, history: list[Row], *, step: int, enabled: bool) -> None:
        self.run_dir, self.history, self.enabled = run_dir, history, enabled
        self.bar: tqdm | None = None
        self.board: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports that nothing else needs

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def start_epoch(self, title: str, *, steps: int, done: int) -> None:
        """Show the bar of an epoch of ``steps`` steps, of which ``done`` are over."""
        # disable=None: no bar when stderr is not a terminal
        disable = None if self.enabled else True
        self.bar = tqdm(total=steps, initial=done, desc=title, disable=disable, leave=False, dynamic_ncols=True)

    def advance(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, meter: Meter) -> None:
        """Show the means so far (of this process) beside the bar."""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in meter.means().items()}, refresh=False)

    def end_bar(self) -> None:
        """Take the bar away, e.g. before an evaluation that shows its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def end_epoch(self, row: Row, title: str) -> None:
        """Add the row of a finished epoch to history and files, and print it as a line."""
        self.end_bar()
        self.history.append(row)
        if not self.enabled:
            return
        _write_csv(self.run_dir / "metrics.csv", self.history)
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.board.add_scalar(name, value, int(row["step"]))
        self.board.flush()
        self.say(f"{title}  {_line(row)}")

    def say(self, message: str) -> None:
        """Print a line on stderr, past the bar."""
        if self.enabled:
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Finish bar and files."""
        self.end_bar()
        if self.board is not None:
            self.board.close()


def _line(row: Row) -> str:
    parts = [
        f"{name.split('/', 1)[1]} {value:.4g}" for name, value in row.items() if name.startswith(("train/", "val/"))
    ]
    return "  ".join(
        [*parts, f"lr {row['lr']:.3g}", f"{row['images_per_s']:.1f} images/s", f"wait {row['data_wait']:.0%}"]
    )


def _write_csv(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
