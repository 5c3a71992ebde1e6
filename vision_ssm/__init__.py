"""What detection, restoration and generation share: modules over `kernels`, configs, checkpoints, training.

Importing this package only checks that the name `kernels` is ours; nothing heavy is loaded.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

__version__ = "0.1.0"

_CURE = (
    "Use a separate environment for vision-ssm, or run `pip uninstall kernels` and THEN "
    "`pip install --force-reinstall --no-deps vision-ssm` (both own the folder `kernels`; the uninstall removes ours)."
)


def installed_kernels_distribution() -> Path | None:
    """Metadata folder of an installed distribution named `kernels` (Hugging Face's package), if there is one."""
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.lower().startswith("kernels-") and name.endswith((".dist-info", ".egg-info")):
                return Path(folder or ".", name)
    return None


def check_kernels_name() -> str:
    """Check that `import kernels` gives our package, without importing it.

    Returns:
        "" when all is well, else a warning: ours is found first, but a distribution of that name is installed too.

    Raises:
        ImportError: `kernels` is another package or is missing; says where it was found and what to do.
    """
    ours = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        raise ImportError(f"vision_ssm needs its package `kernels`, expected at {ours}, and none is found. {_CURE}")
    found = Path(spec.origin).resolve() if spec.origin else None
    if found != ours:
        raise ImportError(f"`kernels` must be vision-ssm's own package at {ours}, but Python finds {found}. {_CURE}")
    other = installed_kernels_distribution()
    if other is None:
        return ""
    return (
        f"vision-ssm's own `kernels` is in use, but another distribution of that name is installed too ({other}); "
        f"diffusers and transformers may look for it in ours and fail. {_CURE}"
    )


if _problem := check_kernels_name():
    warnings.warn(_problem, RuntimeWarning, stacklevel=2)
