"""Lists the packages and builds the optional C back end of the selective scan; everything else is in pyproject.toml.

Without a compiler, or when compiling fails, the installation goes on: the scan then runs on plain torch.
"""

import os
import shutil
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class OptionalBuild(build_ext):
    """build_ext that says one line and goes on when the library cannot be built."""

    def run(self) -> None:
        configured = (sysconfig.get_config_var("CC") or "cc").split()[0]
        if "CC" not in os.environ and not shutil.which(configured) and shutil.which("cc"):
            os.environ["CC"] = "cc"  # some Python builds name the compiler they were made with
        try:
            super().run()
        except Exception as error:
            self.warn(f"C back end of the selective scan not built, torch is used instead ({error})")

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"C back end of the selective scan not built, torch is used instead ({error})")


# No -march: the source picks the instruction set at run time. No -ffast-math: it breaks the rounding in exp2.
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]
SCAN = Extension(
    "kernels.selective_scan._scan",
    ["kernels/selective_scan/scan.c"],
    depends=["kernels/selective_scan/scan_lanes.h"],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    optional=True,
)

PACKAGES = ("kernels", "vision_ssm", "detection", "restoration", "generation")

setup(
    packages=[*find_packages(include=[f"{name}*" for name in PACKAGES]), "vision_ssm._configs"],
    ext_modules=[] if sys.platform == "win32" else [SCAN],
    cmdclass={"build_ext": OptionalBuild},
)
