"""The README points into the code line by line and gives commands: both have to stay true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import eval as evaluation
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_training_command_parses():
    commands = re.findall(r"python train\.py([^;#\n`|]*)", README)
    assert len(commands) >= 5
    for command in commands:
        if "--help" not in command:
            train.parse(shlex.split(command.replace("$s", "0")))


def test_every_evaluation_command_parses():
    commands = re.findall(r"python eval\.py([^;#\n`|]*)", README)
    assert len(commands) >= 8
    for command in commands:
        assert evaluation.parse(shlex.split(command))


def test_the_script_that_made_the_base_model_still_starts():
    done = subprocess.run([sys.executable, "tests/make_base.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
