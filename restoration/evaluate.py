"""`vssm restore eval`: networks and classic methods on the same pixels, in one table."""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from restoration.classic import check_method
from restoration.data import load_sets
from restoration.degrade import Degradation, degradation_for
from restoration.folders import Example
from restoration.metrics import Channel, Lpips, Measure
from restoration.reading import read_levels, with_name
from restoration.restorer import PictureRestorer, Route
from restoration.scoring import Method, Score, by_classic, by_restorer, cases_of, means, score, untouched
from restoration.tasks import find_task
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text

INPUT = "input"
"""Name of the row of the untouched input."""


def run_eval(
    data: str | Path,
    *,
    task: str,
    weights: Sequence[str | Path] = (),
    methods: Sequence[str] = (),
    degradation: Mapping[str, Any] | None = None,
    channel: Channel | None = None,
    border: int | None = None,
    lpips: Path | None = None,
    ensemble: bool = False,
    device: str = "auto",
    limit: int | None = None,
    output: Path = Path("runs/restore-eval"),
) -> int:
    """Score networks and classic methods, print a table, write scores.csv (per picture) and scores.json (means).

    Args:
        data: folder of clean pictures, which are degraded, or of pairs.
        task: of `restoration.tasks`.
        weights: checkpoint folders, files or shipped names; pictures of any size go through them exactly, in strips
            where memory is short.
        methods: classic ones, of `restoration.classic.METHODS`.
        degradation: parameters that replace the task's.
        channel: rgb or y; by default y for enlarging, else rgb.
        border: pixels left out at each side; by default the scale for enlarging, else 0.
        lpips: file with torchvision's AlexNet, to measure LPIPS too.
        ensemble: the networks also averaged over 8 flips and turns, in rows with a plus.
        device: auto, cpu or cuda; of the networks.
        limit: only so many pictures.
        output: folder for the files.

    Returns:
        Exit code: 0, or 1 if some picture could not be scored.

    Raises:
        UserError: no pictures, weights of another task, a method for another task, an unwritable folder.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}")
    operator, scale = degradation_for(task, degradation), find_task(task).scale
    measure = Measure(
        channel or ("y" if scale > 1 else "rgb"), (scale if scale > 1 else 0) if border is None else border
    )
    candidates = _candidates(task, weights, methods, device, ensemble)
    perceptual = None if lpips is None else Lpips(lpips)
    examples = [example for found in load_sets(str(data), split="test", scale=scale) for example in found.examples]
    check_writable(output)
    scores, failed = [], 0
    for example in tqdm(examples[:limit], desc="eval", leave=False, disable=None):
        try:
            scores += _score_picture(example, operator, candidates, measure, perceptual)
        except UserError as error:
            failed += 1
            print(with_name(example.target, error), file=sys.stderr)
    if not scores:
        raise UserError(f"not one of {failed} pictures in {data} could be scored")
    facts = {"task": task, "data": Path(data).name, "degradation": operator.parameters(), **asdict(measure)}
    _write(scores, facts, output)
    print(table(scores, f"{task}, {Path(data).name}, {measure.channel}, border {measure.border}"))
    print(f"{len({one.name for one in scores})} pictures scored, {failed} failed; written to {output}")
    return int(failed > 0)


def _candidates(
    task: str, weights: Sequence[str | Path], methods: Sequence[str], device: str, ensemble: bool
) -> dict[str, Method]:
    chosen: dict[str, Method] = {INPUT: untouched}
    for method in methods:
        check_method(method, task)
        chosen[method] = by_classic(method)  # type: ignore[arg-type]
    for path in weights:
        name = Path(path).name if Path(path).name not in ("best", "last") else Path(path).parent.name
        name = name if name not in chosen else str(path)
        for plus in ("", "+") if ensemble else ("",):
            restorer = PictureRestorer.from_pretrained(path, task, device=device, route=Route(ensemble=plus == "+"))
            chosen[name + plus] = by_restorer(restorer)
    return chosen


def _score_picture(
    example: Example,
    degradation: Degradation,
    candidates: Mapping[str, Method],
    measure: Measure,
    lpips: Lpips | None,
) -> list[Score]:
    return [
        score(case, name, method, measure, lpips)[0]
        for case in cases_of(example, read_levels, degradation)
        for name, method in candidates.items()
    ]


def table(scores: Sequence[Score], title: str) -> str:
    """Means as text: a row for each level and method."""
    rows = means(scores)
    wide = max(len(row.method) for row in rows) + 2
    with_lpips = any(row.lpips is not None for row in rows)
    lines = [title, f"{'level':<16}{'method':<{wide}}{'PSNR':>8}{'SSIM':>9}{'LPIPS' if with_lpips else '':>9}{'s':>9}"]
    for row in rows:
        ssim = "-" if row.ssim is None else f"{row.ssim:.4f}"
        lpips = "" if row.lpips is None else f"{row.lpips:.4f}"
        lines.append(f"{row.level:<16}{row.method:<{wide}}{row.psnr:>8.2f}{ssim:>9}{lpips:>9}{row.seconds:>9.2f}")
    return "\n".join(lines)


def _write(scores: Sequence[Score], facts: Mapping[str, Any], output: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in scores)
    write_text(output / "scores.csv", text.getvalue())
    content = {**facts, "means": [asdict(row) for row in means(scores)], "pictures": [asdict(one) for one in scores]}
    write_text(output / "scores.json", json.dumps(content, indent=2) + "\n")
