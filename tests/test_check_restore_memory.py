"""tools/check_restore_memory.py: what cannot be tried is one line, from the watched process too."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--weights", "serpent_denois"), "error: no weights 'serpent_denois'"),
        (("--width", "0"), "--width and --height are pixels"),
    ],
)
def test_what_cannot_be_tried_is_one_line(flags, part):
    command = [sys.executable, "tools/check_restore_memory.py", "--height", "8", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 2
    assert part in done.stderr.splitlines()[-1]
