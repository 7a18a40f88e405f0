"""The shape of the package: what importing does, who imports whom, how long things are."""
import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "latent_grpo").glob("[!_]*.py"))}
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))

# Which of our modules each one imports, lazily or not. A new edge is added here on purpose.
ALLOWED = {
    "tasks": set(),
    "grading": set(),
    "model": set(),
    "latent": set(),
    "sampling": {"peers"},
    "peers": set(),
    "rollout": {"latent", "sampling"},
    "sft": {"latent", "model", "sampling", "rollout", "tasks"},
    "vanilla": {"grpo", "rollout", "sampling"},
    "grpo": set(),
    "masking": {"grpo"},
    "noise": {"sampling"},
    "selection": set(),
    "evaluate": {"latent", "rollout", "sampling"},
    "presets": {"data", "grading", "model", "noise", "sampling", "tasks", "vanilla",
                "wordproblems"},
    "runs": set(),
    "diagnostics": {"grpo", "latent", "rollout", "sampling"},
    "train": {"data", "diagnostics", "distributed", "evaluate", "masking", "presets", "rollout", "runs",
              "selection", "sft", "vanilla"},
    "plots": set(),
    "compare": {"data", "evaluate", "plots", "presets", "runs", "sampling", "train", "vanilla"},
    "explore": {"diagnostics", "evaluate", "masking", "noise", "plots", "sampling"},
    "cli": {"benchmarks", "compare", "cost", "data", "distributed", "labels", "plots", "presets", "runs", "stability",
            "study", "train"},
    "data": {"grading", "tasks"},
    "labels": {"latent", "presets", "runs", "sft", "train"},
    "benchmarks": {"data", "evaluate", "presets", "runs", "sampling", "train"},
    "wordproblems": {"data", "rollout", "sampling", "tasks"},
    "distributed": {"data", "model", "presets", "runs", "vanilla"},
    "rehearsal": {"presets"},
    "cost": {"grpo", "model", "rollout", "runs", "sampling", "vanilla"},
    "study": {"benchmarks", "compare", "plots", "presets", "train"},
    "verdicts": {"evaluate", "plots", "sampling", "study"},
    "evidence": {"plots", "presets", "study", "verdicts"},
    "regions": {"evidence", "plots", "presets", "study", "verdicts"},
    "stability": {"evidence", "plots", "presets", "regions", "study", "verdicts"},
}

# Edges to a later notebook: the import stands inside a function. (importer, imported): why
LATE = {("cli", "benchmarks"): "the command line is older than the benchmarks that it starts",
        ("cli", "labels"): "and than the labels that it has written",
        ("cli", "cost"): "than the bench that it starts",
        ("cli", "study"): "and than the study that it runs",
        ("cli", "stability"): "and than the figures that it draws of it",
        ("presets", "wordproblems"): "real word problems are one of the tasks that it builds",
        ("sampling", "peers"): "two scores of other papers are drawn and scored by the same functions"}
LATE |= {("train", "distributed"): "the loop of one process is older than several",
         ("cli", "distributed"): "a run says its plan first"}
LATE |= {(earlier, "data"): "runs name, check and hash their problems; lesson 26 says which and why"
         for earlier in ("presets", "train", "compare", "cli")}

PROBE = """
import importlib, json, random, sys
import numpy, torch

def state():
    return [torch.initial_seed(), torch.get_rng_state().tolist(), repr(random.getstate()),
            repr(numpy.random.get_state())]

sockets = []
watched = {"socket.__new__", "socket.connect", "socket.getaddrinfo"}
sys.addaudithook(lambda event, args: sockets.append(event) if event in watched else None)
heavy = {"transformers", "nbdev", "fastcore", "matplotlib", "datasets", "ipywidgets"}
before, report = state(), {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    report[name] = {"heavy": sorted(heavy & set(sys.modules)), "sockets": sockets,
                    "random": state() != before, "cuda": torch.cuda.is_initialized()}
print(json.dumps(report))
"""


def test_importing_has_no_effect():
    names = ["latent_grpo", *(f"latent_grpo.{name}" for name in MODULES)]
    run = subprocess.run([sys.executable, "-c", PROBE, *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)  # also fails when an import prints
    clean = {"heavy": [], "sockets": [], "random": False, "cuda": False}
    assert report == {name: clean for name in names}


def imports(path, nodes=ast.walk):
    """The names of our own modules that the module at `path` imports: anywhere, or in some nodes."""
    found = set()
    for node in nodes(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if not node.level and base.partition(".")[0] != "latent_grpo": continue
            base = base if node.level else base.partition(".")[2]
            found |= {base.partition(".")[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = (alias.name.split(".") for alias in node.names)
            found |= {part[1] for part in parts if part[0] == "latent_grpo" and part[1:]}
    return found & MODULES.keys()


def number(path):
    """The number of the notebook that the module at `path` is exported from."""
    header = re.search(r"File to edit: \.\./(nbs/(\d+)_\w+\.ipynb)", path.read_text("utf-8"))
    assert header, f"{path.name} was not exported from a numbered notebook"
    assert (ROOT / header[1]).exists(), f"{path.name} outlived {header[1]}"
    return int(header[2])


def test_import_graph_is_the_allowed_one():
    assert {name: imports(path) for name, path in MODULES.items()} == ALLOWED


def test_modules_import_only_earlier_notebooks():
    """Numbers that grow along every edge leave no room for a cycle; exceptions are lazy and make none."""
    numbers = {name: number(path) for name, path in MODULES.items()}
    assert len(set(numbers.values())) == len(numbers)
    late = {(name, other) for name, path in MODULES.items() for other in imports(path)
            if numbers[other] >= numbers[name]}
    assert late == LATE.keys()
    for name, other in late: assert other not in imports(MODULES[name], ast.iter_child_nodes)
    list(TopologicalSorter(ALLOWED).static_order())     # raises CycleError


def test_no_star_imports():
    stars = [(name, node.lineno) for name, path in MODULES.items()
             for node in ast.walk(ast.parse(path.read_text("utf-8")))
             if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars


def test_modules_and_lines_are_short():
    texts = {name: path.read_text("utf-8") for name, path in MODULES.items()}
    assert not {name for name, text in texts.items() if len(text.splitlines()) > 400}
    for name, text in texts.items():  # nbdev wraps __all__ by its own rule
        texts[name] = re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.M | re.S)
    assert not [(name, line) for name, text in texts.items()
                for line in text.splitlines() if len(line) > 100]


def test_functions_are_short():
    lengths = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1
               for name, path in MODULES.items()
               for node in ast.walk(ast.parse(path.read_text("utf-8")))
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    long = {name: length for name, length in lengths.items() if length > 40}
    assert max(lengths.values(), default=0) <= 60, long
    assert len(long) <= 0.05 * len(lengths), long


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_their_outputs_quiet(path):
    """No widget state, no error, and no stderr: warnings and progress bars name paths and times."""
    assert path.stat().st_size <= 200_000
    notebook = json.loads(path.read_text("utf-8"))
    assert "widgets" not in notebook["metadata"]
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    assert not [out for out in outputs
                if out["output_type"] == "error" or out.get("name") == "stderr"]


def test_no_machine_paths():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.])/(?:work|root|home)/")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert not [path for path in paths
                if path.is_file() and machine.search(path.read_text("utf-8", "ignore"))]
