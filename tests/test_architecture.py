"""The shape of the project: who imports whom, what stays light, and the version that `kernels` allows."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vision_ssm

ROOT = Path(vision_ssm.__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "timm", "cv2", "matplotlib", "scipy", "numpy", "triton", "accelerate", "pycocotools")

VERSION_RULE = """Our version must stay below 0.9: transformers looks for a package `kernels` (Hugging Face's) and,
finding ours under that import name without a distribution of that name, takes OUR version for its version. From 0.9 up
transformers 5.0 to 5.12 believe that it is theirs, and 0.18.2 to 0.18.x breaks importing transformers 5.23 outright."""


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys; print('MODULES', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_layers_hold():
    """kernels <- vision_ssm <- tasks, which do not know each other, by import-linter's contract in pyproject.toml."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_kernels_imports_torch_and_little_else():
    allowed = {"torch", "triton", "numpy", "kernels"} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imports(path) <= allowed, f"{path} imports {imports(path) - allowed}"


@pytest.mark.parametrize(
    "statement",
    [
        "import vision_ssm",
        "import vision_ssm.cli",
        "import vision_ssm.config",
        "from vision_ssm.cli import main; main(['--help']); main(['--version'])",
        "import detection",
        "import detection.commands",
        "import detection.config",
        "import restoration",
        "import restoration.commands",
        "import restoration.config",
        "import restoration.tasks, restoration.card",
        "import generation",
        "import generation.commands",
        "import generation.config",
        "import vision_ssm.classify.commands",
        "import vision_ssm.explain.commands",
        "import vision_ssm.probe.commands",
        "from vision_ssm.cli import main; main(['detect', '--help']); main(['detect', 'train', '--help'])",
    ],
)
def test_start_up_is_light(statement):
    """Help below half a second: nothing heavy is loaded before a command does its work."""
    assert not loaded_by(statement) & set(HEAVY)


def test_the_overview_does_not_even_load_the_parser():
    assert not loaded_by("from vision_ssm.cli import main; main(['--help'])") & {"jsonargparse", "yaml"}


def test_importing_kernels_loads_no_triton_and_nothing_of_ours():
    assert not loaded_by("import kernels") & {"triton", "vision_ssm", "detection", "transformers"}


def test_kernels_has_no_version():
    import kernels

    assert not hasattr(kernels, "__version__")


def test_version_stays_below_the_one_transformers_looks_for():
    major, minor = map(int, vision_ssm.__version__.split(".")[:2])
    assert (major, minor) < (0, 9), VERSION_RULE


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    stated = project["project"].get("version")
    if stated is None:
        assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vision_ssm.__version__"}
    else:
        assert stated == vision_ssm.__version__
