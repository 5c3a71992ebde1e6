"""Peak memory of `vssm restore run --max-memory` on a large picture, and whether the result is exact.

    python tools/check_restore_memory.py [--variant base | --weights serpent_denoise] [--max-memory 1GiB] [--device cpu]
        [--whole]

Makes a picture and, unless some are given, random weights. Restores the picture in a process of its own whose memory
is watched (on the CPU the resident memory of the process, on a GPU what torch allocates there), and compares a small
picture, restored whole, with its result in strips. With --whole it also restores the large picture at once and
compares the estimate with what that took. Exit code 1 when the process took more than was allowed after it had loaded
the network, the results differ by more than 1e-5, or the estimate is below what was taken; 2 when it cannot be tried.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn

from restoration.card import WeightsCard
from restoration.model import VARIANTS, Serpent
from restoration.picture_reader import read_picture
from restoration.picture_writer import write_picture
from restoration.pretrained import save_weights
from restoration.restorer import PictureRestorer, Route
from vision_ssm.device import parse_size
from vision_ssm.errors import UserError

EXACT = 1e-5
SMALL = (255, 258)
REFUSED = 2


def make_weights(folder: Path, variant: str) -> None:
    """Random weights that change the picture."""
    torch.manual_seed(0)
    model = Serpent(variant)  # pyright: ignore[reportArgumentType]
    nn.init.normal_(model.head.out.weight, std=0.02)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    card = WeightsCard(model={"name": "serpent", **model.config}, task="denoise", trained_on="nothing: random weights")
    save_weights(folder, model, card)


def make_picture(file: Path, width: int, height: int) -> None:
    """A picture with detail at all scales."""
    values = np.zeros((height, width, 3))
    rng = np.random.default_rng(0)
    for side in (4, 32, 256):
        cells = rng.random((height // side + 1, width // side + 1, 3))
        values += np.kron(cells, np.ones((side, side, 1)))[:height, :width] / 3
    Image.fromarray((values * 255).astype(np.uint8)).save(file)


class Watch:
    """Context in which the growth of this process's memory on a device is watched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.grown = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _sample(self) -> None:
        while not self._done.is_set():
            self.grown = max(self.grown, self._now() - self._before)
            time.sleep(0.005)

    def __enter__(self) -> "Watch":
        self._before = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.grown = max(self.grown, self._now() - self._before)


def restore_watched(folder: Path, weights: str, limit: str, device: str) -> dict[str, float]:
    """Growth of this process's memory in bytes while it reads, restores and writes the picture; run in a process."""
    route = Route(max_memory=parse_size(limit) if limit else None)
    restorer = PictureRestorer.from_pretrained(weights, None, device=device, route=route)
    started = time.perf_counter()
    with Watch(restorer.device) as watch:
        picture = read_picture(folder / "picture.png")
        plan = restorer.plan(*picture.size)
        result = restorer.restore(picture.to_tensor(), scratch=folder / "scratch", say=print)
        write_picture(folder / "result.png", picture.with_result(result))
    return {
        "grown": watch.grown, "seconds": time.perf_counter() - started, "estimate": plan.memory,
        "scratch": plan.scratch, "threads": torch.get_num_threads(),
    }  # fmt: skip


def strip_error(folder: Path, weights: str, device: str) -> float:
    """Largest difference between strips and the whole picture, on the corner of the picture."""
    picture = read_picture(folder / "picture.png").to_tensor()[:, : SMALL[0], : SMALL[1]]

    def restored(route: Route) -> torch.Tensor:
        return PictureRestorer.from_pretrained(weights, None, device=device, route=route).restore(picture)

    return float((restored(Route(strip=7)) - restored(Route())).abs().max())


def in_process(folder: Path, weights: str, limit: str, device: str) -> dict[str, float]:
    """`restore_watched` in a process of its own; passes on what it says, and its refusals."""
    given = {"watched": str(folder), "weights": weights, "max-memory": limit, "device": device}
    command = [sys.executable, __file__, *(part for name, value in given.items() for part in (f"--{name}", value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == REFUSED:
        sys.exit(REFUSED)
    done.check_returncode()
    *messages, last = done.stdout.splitlines()
    print(*messages, sep="\n")
    return json.loads(last)


def check_limit(folder: Path, weights: str, title: str, limit: str, device: str) -> bool:
    """Restore within a limit; whether it was kept."""
    found, allowed = in_process(folder, weights, limit, device), parse_size(limit)
    print(
        f"{title}, --max-memory {limit}: grew by {found['grown'] / 2**20:.0f} MiB of {allowed / 2**20:.0f} allowed, "
        f"{found['seconds']:.0f} s on {device} ({found['threads']} threads), {found['scratch'] / 2**20:.0f} MiB of "
        "scratch files"
    )
    return found["grown"] <= allowed


def check_estimate(folder: Path, weights: str, title: str, device: str) -> bool:
    """Restore at once; whether the estimate was enough."""
    found = in_process(folder, weights, "", device)
    print(
        f"{title}, at once: grew by {found['grown'] / 2**20:.0f} MiB, estimated {found['estimate'] / 2**20:.0f}, "
        f"{found['seconds']:.0f} s"
    )
    return found["grown"] <= found["estimate"]


def main() -> int:
    """Run the check; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="base", choices=list(VARIANTS))
    parser.add_argument("--weights", help="shipped name or checkpoint folder, instead of random ones of the variant")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--height", type=int, default=1022)
    parser.add_argument("--max-memory", default="1GiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--watched", type=Path, help=argparse.SUPPRESS)  # the folder, in the process that is watched
    given = parser.parse_args()
    if min(given.width, given.height) < 1:
        parser.error("--width and --height are pixels, 1 or more")
    try:
        return run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def run(given: argparse.Namespace) -> int:
    """Restore and compare, or be the process that is watched."""
    if given.watched is not None:
        print(json.dumps(restore_watched(given.watched, given.weights, given.max_memory, given.device)))
        return 0
    title = f"{given.weights or given.variant}, {given.width}x{given.height}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_picture(folder / "picture.png", given.width, given.height)
        if not given.weights:
            make_weights(folder / "weights", given.variant)
        weights = given.weights or str(folder / "weights")
        kept = [check_limit(folder, weights, title, given.max_memory, given.device)]
        if given.whole:
            kept.append(check_estimate(folder, weights, title, given.device))
        error = strip_error(folder, weights, given.device)
    print(f"strips differ from the whole picture by {error:.1e}")
    return int(not all(kept) or error > EXACT)


if __name__ == "__main__":
    sys.exit(main())
