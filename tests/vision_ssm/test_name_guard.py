"""`kernels` is also the name of Hugging Face's package: another one first is an error, another one beside a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

import vision_ssm

ROOT = Path(vision_ssm.__file__).resolve().parent.parent


@pytest.fixture
def other(tmp_path):
    """A folder with another distribution `kernels` in it."""
    package, info = tmp_path / "kernels", tmp_path / "kernels-0.17.2.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the other package must not be imported')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    return tmp_path


def run(code: str, *path: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run code with these folders first on the path."""
    setup = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    return subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, cwd=cwd)


def test_clean(tmp_path):
    done = run("import vision_ssm; print(vision_ssm.check_kernels_name() == '')", ROOT, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_ours_first_and_another_distribution_installed_warns(tmp_path, other):
    done = run("import vision_ssm, kernels; print(kernels.selective_scan.__name__)", ROOT, other, cwd=tmp_path / "..")
    assert (done.stdout, done.returncode) == ("selective_scan\n", 0)
    assert "RuntimeWarning" in done.stderr
    assert str(other / "kernels-0.17.2.dist-info") in done.stderr
    assert "pip uninstall kernels" in done.stderr


def test_another_first_is_an_import_error(tmp_path, other):
    done = run("import vision_ssm", other, ROOT, cwd=tmp_path / "..")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    for part in (str(other / "kernels"), str(ROOT / "kernels"), "--force-reinstall --no-deps vision-ssm"):
        assert part in message


def test_none_found_is_an_import_error(tmp_path):
    (tmp_path / "vision_ssm").mkdir()
    (tmp_path / "vision_ssm" / "__init__.py").write_bytes((ROOT / "vision_ssm" / "__init__.py").read_bytes())
    code = "import importlib.util as u; u.find_spec = lambda name: None\nimport vision_ssm"
    done = run(code, tmp_path, cwd=tmp_path)
    assert "ImportError: vision_ssm needs its package `kernels`" in done.stderr


def test_diffusers_does_not_take_ours_for_theirs():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import UNet2DModel
    from diffusers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()
    assert UNet2DModel.__name__ == "UNet2DModel"


def test_transformers_does_not_take_ours_for_theirs():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.integrations import hub_kernels

    assert hub_kernels.__name__ == "transformers.integrations.hub_kernels"
