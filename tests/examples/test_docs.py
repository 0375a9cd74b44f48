"""The commands that are shown exist, with the options they are given."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = [
    ROOT / "docs" / "tasks.md",
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "tests" / "data" / "small").glob("*/README.md")),
]
COMMANDS = [
    pytest.param(script, options, id=f"{path.relative_to(ROOT)}: {script}{options}")
    for path in SHOWN
    for script, options in re.findall(
        r"python ((?:examples|tools)/\w+\.py)([^\n`|]*)", path.read_text(encoding="utf-8")
    )
]


@pytest.mark.parametrize(("script", "options"), COMMANDS)
def test_a_command_that_is_shown(script, options):
    source = (ROOT / script).read_text(encoding="utf-8")
    for shared in re.findall(r"^from (\w+) import .*\boptions\b", source, re.MULTILINE):
        source += (ROOT / "examples" / f"{shared}.py").read_text(encoding="utf-8")
    for option in re.findall(r"--[\w-]+", options):
        assert f'"{option}"' in source, f"{script} has no {option}"
