"""Every notebook runs from top to bottom, without the cells that nbdev's directives leave out."""
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it for good: here it ends with the test
    passed, _ = run_notebook(path, skip_flags=get_config(path=path).tst_flags.split())
    assert passed, f"{path.name} failed: its traceback stands under 'Captured stderr'"
