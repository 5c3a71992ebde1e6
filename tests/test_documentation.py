"""Every `vssm` command that stands on a line of its own in a page can be given as it stands there."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from vision_ssm.cli import DIRECT, TASKS
from vision_ssm.command_line import build_parser, with_underscores

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@functools.cache
def parser_of(task: str, verb: str):
    return build_parser(f"vssm {task} {verb}", importlib.import_module(TASKS[task][0]).COMMANDS[verb])[0]


def commands_in(page: Path) -> list[str]:
    found = re.findall(r"^ *(?:torchrun .* -m vision_ssm|vssm)( .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"\s+#.*", "", command).strip() for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_can_be_given(page: Path) -> None:
    for command in commands_in(page):
        task, *rest = shlex.split(command)
        if task not in DIRECT:
            parser_of(task, rest[0]).parse_args([with_underscores(word) for word in rest[1:]], defaults=False)


def test_the_pages_have_commands() -> None:
    assert sum(len(commands_in(page)) for page in PAGES) > 50
