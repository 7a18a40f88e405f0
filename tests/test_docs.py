"""docs/: what runs log is explained, numbers and code names are the real ones, links resolve."""
import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from helpers import config, started, tiny, word_task
from latent_grpo.compare import COLUMNS, table_rows
from latent_grpo.evaluate import evaluate
from latent_grpo.labels import sft
from latent_grpo.presets import sampling_of
from latent_grpo.train import run, score_policy, train_rl

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TOY = json.loads((ROOT / "docs/results/toy.json").read_text("utf-8"))
GLOSSARY, NOTATION = ((ROOT / f"docs/{n}.md").read_text("utf-8") for n in ("glossary", "notation"))


def names(text): return set(re.findall(r"`([^`]+)`", text))


def table(page, heading):
    """Cells of the rows below a heading, without the head of the table."""
    text = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", text, re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows][2:]


def keys(heading): return set().union(*(names(row[0]) for row in table(GLOSSARY, heading)))


# --- the glossary explains what is written ---

@pytest.fixture(scope="module")
def policy():
    task = word_task()
    return started(task), task


def test_every_key_of_the_log_and_no_other(policy, tmp_path):
    model, task = policy
    cfg = config(steps=2, eval_every=1, kl_coef=0.1)
    train_rl(model, task, cfg, tmp_path, bar=False)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(logged) == 2 and set(logged[-1]) == keys("log.jsonl")


def test_every_key_of_the_scores_and_no_other(policy):
    model, task = policy
    cfg = config(eval_samples=2)
    scores = score_policy(model, task, cfg, reference=model)["test"]
    known = set(evaluate(model, task, task.rows["test"], sampling_of(cfg, 2)))
    assert known | set(scores["sampled"]) == keys("scores.json")
    assert set(scores["diagnostics"]) == keys("Diagnostics")
    assert set(scores) <= names(GLOSSARY)


def test_every_key_of_a_run(tmp_path):
    cfg = config(steps=1, latent_sft=1, train_rows=200, test_rows=4, sft_batch=4, top_k=4)
    scores = run(cfg, tmp_path, bar=False)
    rows = [json.loads(line) for line in (tmp_path / "sft-latent.jsonl").read_text().splitlines()]
    assert rows and set(rows[0]) == keys("sft-explicit.jsonl, sft-latent.jsonl")
    noted = {*scores["minutes"], *scores["made"], *scores["data"]["train"]}
    assert noted | {"minutes", "made", "data"} <= names(GLOSSARY)


def test_every_key_of_the_steps_that_learn_labels(tmp_path):
    cfg = config(label_steps=(1, 1, 1), train_rows=200, test_rows=4, sft_batch=4, top_k=4, explicit_sft=1)
    files = keys("sft-encoder.jsonl, sft-decoder.jsonl, sft-joint.jsonl")
    for step in ("encoder", "decoder", "joint"):
        sft(cfg, tmp_path, step, bar=False)
        rows = (tmp_path / f"sft-{step}.jsonl").read_text().splitlines()
        assert rows and all(set(json.loads(row)) == files for row in rows)


def test_every_key_of_a_comparison():
    one = TOY["results"][-1]
    parts = [TOY, one, one["curve"], one["scores"]["minutes"], *one["scores"]["test"].values()]
    assert set().union(*parts) | set(one["scores"]["test"]) <= names(GLOSSARY)
    rows = table(GLOSSARY, "results.json and the tables of `compare`")
    assert set(table_rows(TOY["results"])[0]) == set().union(*(names(row[0]) for row in rows))
    shown = [column for row in rows for column in row[1].split(", ")]
    assert set(COLUMNS.values()) < set(shown)


LEARNT = ["vanilla", "masked", "first-token", "exact", "centred"]
LOST = ["one-sided", "paper", "released"]


@pytest.mark.parametrize("row", table(GLOSSARY, "Measured on the toy"), ids=lambda row: row[0])
def test_measured_ranges_are_those_of_the_record(row):
    key = row[0].strip("`")
    logged, how = key in ("reward", "validation"), "noise_free" if key == "pass1" else "sampled"
    if key in keys("Diagnostics"): how = "diagnostics"
    for said, methods in zip(row[1:], (["latent-start"], LEARNT, LOST), strict=True):
        start = methods == ["latent-start"]
        if logged and start: methods = LEARNT + LOST
        runs = [r for r in TOY["results"] if r["method"] in methods]
        if logged: found = [r["curve"][key][0 if start else -1] for r in runs]
        else: found = [r["scores"]["test"][how][key] for r in runs]
        assert len(runs) >= 5
        assert said == (f"{min(found):.2f} to {max(found):.2f}" if None not in found else "")


# --- the notation page names what exists ---

def bound():
    """Names that the cells of each notebook bind in the package, parameters and locals too."""
    found = {}
    for path in (ROOT / "latent_grpo").glob("[!_]*.py"):
        parts = re.split(r"^# %% \.\./(nbs/\S+) .*$", path.read_text("utf-8"), flags=re.M)
        for page, code in zip(parts[1::2], parts[2::2]):
            for node in ast.walk(ast.parse(code)):
                name = getattr(node, "name", None) or getattr(node, "arg", None)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): name = node.id
                found.setdefault(page, set()).add(name)
    return found


BOUND = bound()
GROUPS = re.findall(r"^## (.*)$", NOTATION, re.M)[:-1]     # the last one is of words


def test_the_groups_are_there():
    assert len(GROUPS) == 8 and all(len(table(NOTATION, g)) > 5 for g in GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_code_names_exist_in_the_lesson_that_is_named(group):
    for symbol, code, *_, lesson in table(NOTATION, group):
        links = re.findall(r"\]\(\.\./(nbs/\S+?)\)", lesson)
        assert links and names(code), symbol
        missing = names(code) - set().union(*(BOUND.get(page, set()) for page in links))
        assert not missing, f"{missing} not in {links}"


# --- the site's own code ---

@pytest.fixture
def site(monkeypatch):
    """The modules of docs/, which are scripts and no package."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


def test_a_later_page_needs_no_edit_of_the_sites_code(site, monkeypatch, tmp_path):
    """A page in docs/, a guide in docs/guides/ and a notebook outside the series find their places."""
    build = site("build")
    (tmp_path / "guides").mkdir()
    for name in ("verdicts", "protocol", "guides/one-gpu", "faq", "index"): (tmp_path / f"{name}.md").write_text("# A page")
    monkeypatch.setattr(build, "DOCS", tmp_path)
    monkeypatch.setattr(build, "GUIDES", ["01_tasks"])
    start, *_, guides, look_up = build.toctrees().split("```\n")[:-1]
    assert start.splitlines()[4:] == ["lessons", "results", "protocol", "verdicts"]
    assert ":caption: Guides" in guides and "<nbs/01_tasks>" in guides and guides.endswith("guides/one-gpu\n")
    assert "verdicts" not in look_up and "[](/guides/one-gpu.md)" in build.contents()


def test_every_lesson_has_a_head_with_minutes_and_links(site):
    build = site("build")
    for path in build.PAGES:
        nb = build.read_nb(path)
        first = next(c for c in nb.cells if c.cell_type == "markdown").source
        made = build.head(path.stem, first, *build.minutes(nb))
        assert "What you need to know before:" in made and f"/blob/main/nbs/{path.name}" in made


def test_the_mixture_of_the_front_page_is_what_the_model_reads(site):
    """A corner is a plain word, and a mixture is read whole; rows of the file are in the order of points."""
    mixture, model = site("mixture"), tiny()
    corner = mixture.after(model, [1, 5, 6], [3, 4, 7], torch.eye(3))
    torch.testing.assert_close(corner[1:2], mixture.after(model, [1, 5, 6, 4]))
    half = mixture.after(model, [1, 5, 6], [3, 4, 7], torch.tensor([[.5, .5, 0.]]))
    assert (half - corner[:2]).abs().amax(1).min() > 1e-3
    record = json.loads((ROOT / "docs/results/mixture.json").read_text("utf-8"))
    points = mixture.points(record["grid"])
    assert len(points) == len(record["next_percent"]) and torch.allclose(points.sum(1), torch.ones(len(points)))
    assert {len(row) for row in record["next_percent"]} == {6} and (record["problem"], record["words"]) == (
        mixture.PROBLEM, mixture.WORDS)
    first = {step: sum(record["next_percent"][points[:, k].argmax()][3 * k:3 * k + 3]) for k, step in enumerate("ab")}
    assert min(first.values()) > 95         # after the word alone the model goes on with its step


# --- links ---

@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text("utf-8")
    heads = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
             for h in re.findall(r"^#+ (.*)$", text, re.M)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"): assert link[1:] in heads, link
        elif "://" not in link: assert (path.parent / link.partition("#")[0]).exists(), link
    for shown, number in re.findall(r"\[(\d\d)\]\(\.\./nbs/(\d\d)_", text):
        assert shown == number
