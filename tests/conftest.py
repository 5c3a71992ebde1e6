"""Shared by all tests: one seed, the optional folder of recorded data, the device."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


def _shared() -> Path | None:
    folder = os.environ.get("VISION_SSM_SHARED")
    return Path(folder) if folder and Path(folder).is_dir() else None


needs_shared = pytest.mark.skipif(_shared() is None, reason="VISION_SSM_SHARED names no folder with golden/ and data/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a GPU, and tests that ask for `shared_root` without the folder."""
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
        if "shared_root" in getattr(item, "fixturenames", ()):
            item.add_marker(needs_shared)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One seed for every test, before its fixtures: a result depends on no other test and no order."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def shared_root() -> Path:
    """Folder with `golden/` and `data/`, named by VISION_SSM_SHARED."""
    folder = _shared()
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
