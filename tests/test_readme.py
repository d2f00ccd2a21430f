"""The README is true: its Python runs, its commands exist, and it stays short."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_it_is_short():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("block", [b for language, b in BLOCKS if language == "python"])
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    run = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("fastlm ")])
def test_command_lines_parse(command):
    """Each option of each command is one that the command knows."""
    from fastlm.__main__ import build_parser

    build_parser(shlex.split(command)[1]).parse_args(shlex.split(command)[1:])


def test_every_command_is_one_of_these():
    for command in COMMANDS:
        assert command.startswith(("make ", "fastlm ", "git clone ", "pip install ", "cd ")), (
            command
        )


def test_the_two_commands_are_there():
    assert {"make demo", "make test"} <= set(COMMANDS)


def test_running_as_a_module_is_the_same_program():
    run = subprocess.run(
        [sys.executable, "-m", "fastlm", "--help"], cwd="/", capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "train" in run.stdout


def test_the_commands_of_the_makefile_parse():
    """Their flags exist, and none hides the function that runs the verb."""
    from fastlm.__main__ import build_parser

    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\t@?\$\(FASTLM\) (.*)$", makefile, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("$(ARGS)", ""))
        args = build_parser(words[0]).parse_args(words)
        assert callable(args.entry), command
