"""`vssm doctor`: what this machine has, which back end a scan would use and why, and whether each computes right."""

import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

import vision_ssm

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "triton", "torchvision", "timm", "accelerate", "safetensors", "onnxruntime")
_LARGEST_ERROR = 1e-5  # relative RMS, float32 against the float64 reference


def doctor() -> int:
    """Check this machine: versions, GPU, the scan back ends and their results.

    Every back end that can run computes a small scan over a sequence and one over an image, with all gradients, and
    is compared with the float64 reference.

    Returns:
        0 when all is well, 1 when something is broken.
    """
    print(f"vision-ssm   {vision_ssm.__version__}")
    print(f"Python       {platform.python_version()} ({sys.executable})")
    print(f"system       {platform.platform()}")
    for name in _PACKAGES:
        print(f"{name:<12} {_version(name)}")
    problems = [*_name_problems(), *_device_lines(), *_scan_problems()]
    print("all is well" if not problems else "\n".join(["", "problems:", *(f"  {problem}" for problem in problems)]))
    return 1 if problems else 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _name_problems() -> list[str]:
    """A wrong `kernels` already fails at import; what is left is a second distribution of that name."""
    problem = vision_ssm.check_kernels_name()
    print(f"kernels      {'the name is ours' if not problem else 'two packages of that name'}")
    return [problem] if problem else []


def _device_lines() -> list[str]:
    """Print the processors; a driver that torch cannot use is a problem, no GPU is none."""
    import torch

    print(f"CPU          {torch.get_num_threads()} threads")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        print(f"GPU {index}        {card.name}, {memory:.0f} GiB, compute {card.major}.{card.minor}")
    if not count:
        print("GPU          none that torch can use; everything runs on the CPU")
    return [f"GPU driver: {' '.join(str(warning.message).split())}" for warning in said]


def _scan_problems() -> list[str]:
    """Print what `auto` means here and check every back end that can run; returns what went wrong."""
    import torch

    import kernels

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        chosen = kernels.choose_backend("auto", torch.device(device), torch.float32)
        print(f"scans        on {device}: {chosen}, the fastest that can run here")
    problems = []
    for name, reason in kernels.backends().items():
        if reason:
            print(f"  {name:<10} not used: {reason}")
            continue
        for device in _devices_of(name, devices):
            outcome = _check(name, torch.device(device))
            print(f"  {name:<10} on {device}: {outcome or 'right'}")
            if outcome:
                problems.append(f"back end {name} on {device}: {outcome}")
    return problems


def _devices_of(backend: str, devices: list[str]) -> list[str]:
    allowed = {"c": ["cpu"], "triton": ["cuda"]}.get(backend, devices)
    return [device for device in devices if device in allowed]


def _check(backend: str, device: "torch.device") -> str:
    """Compare a back end with the float64 reference, outputs and gradients; "" when it is right."""
    import torch

    from kernels.testing import relative_rms, run_with_grads

    for what, (scan, inputs) in _problems().items():
        wanted = run_with_grads(lambda *t, scan=scan: scan(*t, "reference"), *inputs)
        given = [t.detach().to(device, torch.float32).requires_grad_() for t in inputs]
        try:
            got = run_with_grads(lambda *t, scan=scan: scan(*t, backend), *given)
        except Exception as error:  # whatever breaks a back end is what this command is to find
            return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        names = ["y", "state", *(f"gradient of {name}" for name in ("x", "delta", "A", "B", "C", "D"))]
        for name, mine, reference in zip(names, got, wanted, strict=True):
            assert mine is not None
            assert reference is not None
            error = relative_rms(mine, reference)
            if not error <= _LARGEST_ERROR:
                return f"{what}: {name} is wrong, relative error {error:.1e} (at most {_LARGEST_ERROR:.0e})"
    return ""


def _problems() -> dict[str, tuple[Callable, list["torch.Tensor"]]]:
    """Name -> (scan of its tensors and a back end's name, the tensors in float64); odd sizes on purpose."""
    import torch

    from kernels import selective_scan, selective_scan_2d

    def sequence(x, delta, A, B, C, D, backend):
        return selective_scan(x, delta, A, B, C, D, softplus=True, return_final_state=True, backend=backend)

    def image(x, delta, A, B, C, D, backend):
        return selective_scan_2d(x, delta, A, B, C, D, softplus=True, return_final_state=True, backend=backend)

    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    line = [tensor(2, 37, 5), tensor(2, 37, 5), -tensor(5, 4).exp(), tensor(2, 37, 4), tensor(2, 37, 4), tensor(5)]
    field = [tensor(1, 5, 7, 6), tensor(1, 5, 7, 4, 6), -tensor(4, 6, 3).exp(), tensor(1, 5, 7, 4, 3)]
    field += [tensor(1, 5, 7, 4, 3), tensor(4, 6)]
    problems = {"sequence": (sequence, line), "image": (image, field)}
    return {name: (scan, [t.requires_grad_() for t in tensors]) for name, (scan, tensors) in problems.items()}
