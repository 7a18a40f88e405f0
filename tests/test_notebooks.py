"""Every notebook runs from top to bottom, without the cells that nbdev's directives leave out.

At its end the folded answers of its exercises run too, each put to its check, and some wrong ones.
"""
import sys
from pathlib import Path

import nbdev.test
import pytest
from execnb.nbio import mk_cell, read_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

from test_exercises import put_to_the_check

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))


def with_answers(path, **kwargs):
    """What nbdev makes of the notebook at `path`, had the reader solved its exercises."""
    nb = read_nb(path)
    nb.cells += map(mk_cell, put_to_the_check(path))
    for i, cell in enumerate(nb.cells): cell.idx_ = i
    return NBProcessor(nb=nb, **kwargs)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it for good: here it ends with the test
    monkeypatch.setattr(nbdev.test, "NBProcessor", with_answers)
    passed, _ = nbdev.test.test_nb(path, skip_flags=get_config(path=path).tst_flags.split())
    assert passed, f"{path.name} failed: its traceback stands under 'Captured stderr'"
