"""The form of every page: its order, its head, what it may import, how long its cells are."""
import ast
import json
import re
from pathlib import Path

import pytest

from latent_grpo.plots import PARTS
from test_skeleton import LATE, MODULES, number

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
NUMBERS = {name: number(path) for name, path in MODULES.items()}
HELPERS = {"plots", "explore", "evaluate"}   # figures and intervals: any page may use them
LESSONS = [p for p in PAGES if not 18 <= int(p.name[:2]) <= 21 and p.name[:2] != "25"]

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def cells(path, kind):
    found = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]


def prose(path): return "\n".join(cells(path, "markdown"))


def test_numbers_are_the_reading_order():
    """The map of the lessons, `PARTS`, is their order; no page is missing from it."""
    order = [f"{i:02d}_{name}" for i, name in enumerate(sum(PARTS.values(), []), 1)]
    assert [p.stem for p in PAGES] == [name for name in order if (ROOT / f"nbs/{name}.ipynb").exists()]
    for path, following in zip(PAGES, PAGES[1:]):
        assert f"]({following.name})" in prose(path).rpartition("Next:")[2], path.name


@each_page
def test_head(path):
    """A question, its answer in a sentence, then what is needed and how long it takes."""
    title, answer, *rest = cells(path, "markdown")[0].splitlines()
    assert re.fullmatch(r"# .+\?", title)
    assert re.fullmatch(r"> .{20,96}", answer)
    head = " ".join(rest)
    assert "Prerequisites" in head and re.search(r"\d+ seconds", head)


@each_page
def test_links_lead_to_pages(path):
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose(path)):
        assert (path.parent / link).exists(), link
    for shown, target in re.findall(r"\[lesson (\d+)\]\((\d+)_", prose(path)):
        assert int(shown) == int(target)


@each_page
def test_pages_import_only_earlier_modules(path):
    own, late = int(path.name[:2]), []
    for source in cells(path, "code"):
        lines = [line for line in source.splitlines() if not line.startswith(("!", "%"))]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latent_grpo."):
                name = node.module.partition(".")[2]
                exempt = name in HELPERS or (path.stem[3:], name) in LATE
                if NUMBERS[name] > own and not exempt: late.append(name)
    assert not late


@each_page
def test_cells_are_short(path):
    code = [c for c in cells(path, "code") if not re.search("^class |^(PRESETS|NAMED) = {", c, re.M)]
    long = [len(c.splitlines()) for c in code if len(c.splitlines()) > 42]
    assert not long
    assert sum(len(c.splitlines()) > 24 for c in code) <= 0.15 * len(code)


@each_lesson
def test_lessons_end_in_a_short_summary(path):
    summary = prose(path).rpartition("## Summary")[2].partition("Next:")[0]
    assert 1 <= summary.count("\n- ") <= 5
