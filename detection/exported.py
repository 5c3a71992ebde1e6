"""Running an exported detector on its own, as a process without our packages: what `vssm detect export` checks with.

`python -m detection.exported MODEL FOLDER THREADS` reads FOLDER/input_*.npy, writes FOLDER/output_*.npy and
FOLDER/run.json (`seconds` of the first input, the best of some runs; `peak_memory` in bytes or null).
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_TIMED_RUNS = 5


def onnx_session(path: str | Path, threads: int) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def load_exported(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images (B, 3, H, W) to detections (B, 4 + classes, anchors), for an .onnx or .pt2 file."""
    if path.suffix == ".onnx":
        session = onnx_session(path, threads)
        return lambda images: session.run(None, {"images": images})[0]
    import torch

    torch.set_num_threads(threads)
    module = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def best_time(function: Callable[[], object], runs: int = _TIMED_RUNS) -> float:
    """Least wall time of some calls, in seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_memory() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its getrusage also counts the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str]) -> None:
    """See the module."""
    model, folder, threads = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    if "standard" in arguments[3:]:
        for name in ("kernels", "vision_ssm"):  # an import of ours would show that the file needs us
            sys.modules[name] = None  # type: ignore[assignment]
    elif model.suffix == ".pt2":
        import kernels  # noqa: F401  (registers our operator)
    run = load_exported(model, threads)
    inputs = [np.load(path) for path in sorted(folder.glob("input_*.npy"))]
    for number, images in enumerate(inputs):
        np.save(folder / f"output_{number:04d}.npy", run(images))
    measured = {"seconds": best_time(lambda: run(inputs[0])), "peak_memory": peak_memory()}
    (folder / "run.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
