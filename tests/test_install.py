"""What is published installs and runs far from the repository: archives, an empty environment, Colab."""
import email
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
SETTINGS = ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
INSTALL = "latent_grpo[all] @ "
TINY = dict(width=16, layers=1, heads=2, ff=16, train_rows=60, test_rows=12, latent_sft=5,
            sft_batch=8, explicit_sft=5, steps=2, prompts=4, groups=4, max_steps=20, eval_every=2)
TINY = [f"--set={name}={value}" for name, value in TINY.items()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_code_cell_installs_the_package_in_colab(path):
    cell = next(c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code")
    install = f'! [ -e /content ] && pip install -Uqq "{INSTALL}git+{SETTINGS["git_url"]}"'
    assert "".join(cell["source"]) == f"#| hide\n#| eval: false\n{install}"


def run(*command, **kwargs):
    """What a command printed; it sees neither this environment nor its settings for tests."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "MPLBACKEND")
    env = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600,
                          env=env, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Fetch one small package; where none can be had, nothing can be installed."""
    if not os.environ.get("INSTALL_TEST"): pytest.skip("takes minutes: set INSTALL_TEST=1")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "tqdm"]
    folder = tmp_path_factory.mktemp("fetch")
    if subprocess.run(fetch, cwd=folder, capture_output=True, timeout=100).returncode:
        pytest.skip("no package registry within reach")


@pytest.fixture(scope="module")
def archives(registry, tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_archives_hold_the_package_and_all_its_facts(archives):
    with tarfile.open(archives[0]) as tar: names = {n.partition("/")[2] for n in tar.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    with zipfile.ZipFile(archives[1]) as wheel:
        modules = {n for n in wheel.namelist() if ".dist-info" not in n}
        meta = next(n for n in wheel.namelist() if n.endswith("METADATA"))
        meta = email.message_from_string(wheel.read(meta).decode())
    assert modules == {f"latent_grpo/{path.name}" for path in (ROOT / "latent_grpo").glob("*.py")}
    assert not [name for name in names if name.startswith(("tests", "nbs"))]
    assert (meta["Name"], meta["Version"]) == (SETTINGS["lib_name"], SETTINGS["version"])
    assert meta["License"] or meta["License-Expression"]
    assert SETTINGS["git_url"] in " ".join(meta.get_all("Project-URL"))
    assert len(meta.get_all("Classifier")) > 5 and meta["Requires-Python"] == ">=3.10"
    needed = [r for r in meta.get_all("Requires-Dist") if not re.search(r"extra == .dev", r)]
    assert needed and not [r for r in needed if r.startswith(("nbdev", "pytest", "jupyter"))]
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", meta.get_payload())
    assert len(targets) > 20 and all(re.match("https?:|#", a or b) for a, b in targets)


@pytest.fixture(scope="module")
def bare(archives, tmp_path_factory):
    """A new environment that holds the wheel, what it asks for, and a kernel, as Colab has one."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=True)
    run(folder / "env/bin/pip", "install", "-q", "-c", ROOT / "constraints.txt",
        f"{INSTALL}{archives[1].as_uri()}", "nbclient", "ipykernel", cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_runs_in_an_empty_environment(bare):
    found = "import importlib.util as u; print(*map(u.find_spec, ('nbdev', 'execnb', 'pytest')))"
    assert run(bare / "env/bin/python", "-c", found, cwd=bare).split() == ["None"] * 3
    command = bare / "env/bin/latent-grpo"
    assert run(command, "--version", cwd=bare) == f"latent-grpo {SETTINGS['version']}\n"
    assert "usage: latent-grpo" in run(command, "--help", cwd=bare)
    assert "complete -o" in run(command, "--print-completion", "bash", cwd=bare)
    demo = run(command, "demo", "--quiet", "--out", "demo", *TINY, cwd=bare)
    assert demo.count("\n|") >= 8 and (bare / "demo/figure.png").stat().st_size > 5_000
    run(command, "train", "--quiet", "--out", "one", "--method", "exact", *TINY, cwd=bare)
    made = json.loads((bare / "one/scores.json").read_text("utf-8"))["made"]
    assert made["commit"] == f"release {SETTINGS['version']}"     # there is no repository around


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["01_tasks", "04_latent", "08_grpo"])
def test_a_page_runs_from_top_to_bottom_without_the_repository(bare, name):
    """Every cell, as a reader's "run all" does, those that our own tests leave out included."""
    page = bare / f"{name}.ipynb"
    page.write_bytes((ROOT / "nbs" / page.name).read_bytes())
    run(bare / "env/bin/jupyter-execute", "--inplace", page.name, cwd=bare)
    cells = [c for c in json.loads(page.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    numbers = [c["execution_count"] for c in cells if "".join(c["source"]).strip()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not [out for c in cells for out in c["outputs"] if out["output_type"] == "error"]
