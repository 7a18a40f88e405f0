"""docs/own-work.md: its blocks run in order, each is short, and each claims something that can fail."""
import re
import shlex
from pathlib import Path

import pytest
import torch

from latent_grpo.cli import parser

PAGE = (Path(__file__).parent.parent / "docs/own-work.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_blocks_are_short():
    assert len(BLOCKS) >= 7
    for block in BLOCKS:
        assert len(block.splitlines()) < 20 and max(map(len, block.splitlines())) <= 100
    checked = [block for block in BLOCKS if "assert " in block]
    assert len(checked) >= len(BLOCKS) - 1        # a model is defined in one, checked in the next


def test_its_command_parses():
    for command in re.findall(r"^latent-grpo (.+)$", PAGE, re.M):
        assert parser().parse_args(shlex.split(command)).command == "train"


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom():
    names = {"__name__": "own_work"}
    with torch.random.fork_rng(devices=[]):
        for number, block in enumerate(BLOCKS, 1):
            exec(compile(block, f"block {number} of own-work.md", "exec"), names)
    assert {"task", "Brief", "Recurrent", "frugal", "own", "own_score"} <= names.keys()
