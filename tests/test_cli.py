"""The command line from outside: help, presets, and small runs from files to scores."""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import latent_grpo
from latent_grpo.cli import main
from latent_grpo.distributed import shape_of
from latent_grpo.presets import METHODS, PRESETS, make_config

DATA = Path(os.environ.get("LATENT_GRPO_DATA")
            or Path(__file__).parent.parent.parent / "shared" / "data")
SCORE = re.compile(r"^(\S+) +(noise_free|sampled) +Pass@1 +([\d.]+) % \[([\d.]+), ([\d.]+)\]  "
                   r"n (\d+)x(\d+)  latent ([\d.]+)  text ([\d.]+)  invalid", re.M)


def shell(*argv):
    """Run the command in a process of its own; what it printed."""
    command = [sys.executable, "-m", "latent_grpo.cli", *map(str, argv)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    return run.stdout


def scores(printed):
    """(split, mode) -> problems, once the intervals were seen to hold their means."""
    found = {}
    for split, mode, mean, low, high, problems, _, latent, text in SCORE.findall(printed):
        assert 0 <= float(low) <= float(mean) <= float(high) <= 100
        assert float(latent) + float(text) > 0
        found[split, mode] = int(problems)
    return found


@pytest.mark.parametrize("command", ["", "train", "eval", "compare", "demo", "presets"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop: main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: latent-grpo" in said
    for word in {"": ["train", "eval", "demo", "compare", "presets", "examples"],
                 "train": [*PRESETS, *METHODS, "--resume", "--set", "--seed", "--out"],
                 "eval": ["--policy", "--data"]}.get(command, []): assert word in said


def test_version(capsys):
    with pytest.raises(SystemExit) as stop: main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"latent-grpo {latent_grpo.__version__}\n"


def test_presets_are_listed_with_their_sources(capsys):
    assert main(["presets"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}\n" in said for name in PRESETS) and "paper" in said


@pytest.mark.parametrize("name", PRESETS)
def test_one_preset_is_shown_whole(name, capsys):
    assert main(["presets", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    for setting, value in vars(make_config(name)).items():
        shown = [x for x in lines if x.split()[:1] == [setting]]
        if setting not in METHODS["vanilla"]:
            assert len(shown) == 1 and repr(value) in shown[0], setting
    assert all(len(x.split()) >= 2 for x in lines[2:])


def test_examples_in_the_help_parse():
    from latent_grpo.cli import EXAMPLES, parser
    commands = [x.split()[1:] for x in EXAMPLES.splitlines() if x.strip().startswith("latent-grpo")]
    assert len(commands) >= 5
    for words in commands: assert parser().parse_args(words).command == words[0]


TOY = dict(width=16, layers=1, heads=2, ff=16, train_rows=60, test_rows=12, latent_sft=5,
           sft_batch=8, explicit_sft=5, steps=2, prompts=4, groups=4, max_steps=20, eval_every=2)
TEXT = dict(width=16, layers=1, heads=2, ff=24, vocab_size=320, explicit_sft=5, latent_sft=5,
            sft_batch=4, steps=1, prompts=3, groups=2, max_steps=40, test_rows=8, limit=80)


def settings(values): return [f"--set={k}={v}" for k, v in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["explicit", "released", "centred"])
def test_train_and_eval_on_the_toy_task(method, tmp_path):
    said = shell("train", "--method", method, "--quiet", "--out", tmp_path, *settings(TOY))
    assert scores(said) == {("test", "noise_free"): 12, ("test", "sampled"): 12}
    log = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and "validation" in log[-1]
    again = shell("eval", "--policy", tmp_path / "policy", "--quiet",
                  "--out", tmp_path / "again")
    assert SCORE.findall(again) == SCORE.findall(said)
    saved = json.loads((tmp_path / "again/scores.json").read_text())["test"]["noise_free"]
    assert saved["low"] <= saved["pass1"] <= saved["high"] and saved["problems"] == 12


@pytest.mark.slow
def test_compare_prints_a_row_per_method_and_saves_a_figure(tmp_path):
    said = shell("compare", "--methods", "explicit,exact", "--seeds", "0-1", "--workers", 1,
                 "--quiet", "--out", tmp_path, *settings(TOY))
    table = [x.split("|")[1].strip() for x in said.splitlines() if x.startswith("|")]
    assert table[2:] == ["explicit SFT", "initialisation", "explicit GRPO", "exact score (ours)"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [0, 1] and len(results["results"]) == 8
    assert {s: len(d["sha256"]) for s, d in results["data"].items()} == dict.fromkeys(
        ("train", "validation", "test"), 64)                      # the same for all runs: once
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def made_up(path, rows, seed):
    """Word problems of two steps with equations as chains."""
    rng, names = random.Random(seed), ("Ann", "Bo", "Cem", "Dora")
    with open(path, "w") as f:
        for i in range(rows):
            a, b, c = (rng.randint(2, 9) for _ in range(3))
            text = f"{rng.choice(names)} has {a} bags of {b} apples each and finds {c} more. All?"
            chain = f"<<{a}*{b}={a * b}>> <<{a * b}+{c}={a * b + c}>>"
            row = dict(problem=text, answer=str(a * b + c), cot=chain, id=f"{path.stem}-{i}",
                       in_aug_valid=i % 7 == 0)
            f.write(json.dumps(row) + "\n")
    return path


def reduced_run(tmp_path, train, *tests, preset="gsm8k-tiny"):
    """The recipe for real text, cut down: tokenizer, explicit SFT, Latent-SFT, one step of RL."""
    shell("train", "--preset", preset, "--method", "exact", "--quiet", "--data", train,
          "--test", tests[0], "--out", tmp_path / "run", *settings(TEXT))
    for kind in ("explicit", "latent"):
        log = (tmp_path / "run" / f"sft-{kind}.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["step"] == 5
    config = json.loads((tmp_path / "run" / "policy" / "latent_grpo.json").read_text())
    assert config["drop"] == "in_aug_valid"
    files = [x for test in tests for x in ("--data", test)]
    said = shell("eval", "--policy", tmp_path / "run" / "policy", "--quiet", *files)
    expected = {(test.stem, mode): 8 for test in tests for mode in ("noise_free", "sampled")}
    assert scores(said) == expected


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gsm8k-tiny", "gsm8k-scratch"])
def test_reduced_run_on_made_up_problems(preset, tmp_path):
    reduced_run(tmp_path, made_up(tmp_path / "train.jsonl", 100, 0), made_up(tmp_path / "one.jsonl", 12, 1),
                made_up(tmp_path / "two.jsonl", 9, 2), preset=preset)


def test_the_plan_of_a_hundred_million_weights(tmp_path):
    """GSM8K from scratch on one GPU: its size and its needs, from its preset and made-up problems."""
    files = [made_up(tmp_path / f"{name}.jsonl", n, n) for name, n in (("train", 100), ("one", 12))]
    said = shell("train", "--preset", "gsm8k-scratch", "--plan", "--data", files[0], "--test", files[1],
                 "--out", tmp_path / "run")
    assert "computing in bfloat16" in said and "one: 12 rows" in said
    assert not (tmp_path / "run").exists()
    cfg = make_config("gsm8k-scratch")
    assert 90e6 < shape_of(cfg, cfg.vocab_size)["parameters"] < 110e6


@pytest.mark.slow
def test_reduced_run_on_real_problems(tmp_path):
    names = ("gsm8k_eq_train", "gsm8k_aug_test", "multiarith")
    files = [DATA / f"{name}.jsonl" for name in names]
    if not all(f.exists() for f in files): pytest.skip("set LATENT_GRPO_DATA to a folder with them")
    reduced_run(tmp_path, *files)


def test_a_comparison_without_matplotlib_is_refused_before_it_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("latent_grpo.compare.find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "latent_grpo[plots]" in capsys.readouterr().err


TAB = """COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_latent_grpo; echo "${COMPREPLY[@]}" """


@pytest.mark.parametrize("typed, offered", {
    "t": "train", "train --meth": "--method", "train --method ex": "explicit exact",
    "compare --preset paper": "paper-low paper-high", "presets gsm": "gsm8k-tiny gsm8k-scratch", "study lad": "ladder",
    "eval --policy run": "runs", "train --resume --out run": "runs"}.items())
def test_the_tab_key(typed, offered, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop: main(["--print-completion", "bash"])
    assert stop.value.code == 0
    (tmp_path / "runs").mkdir()
    command = ["bash", "-c", capsys.readouterr().out + TAB, "bash", "latent-grpo", *typed.split(" ")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=20)
    assert run.stdout.split() == offered.split(), run.stderr


def test_completion_without_its_library_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop: main(["--print-completion", "bash"])
    assert stop.value.code == 2 and "latent_grpo[completion]" in capsys.readouterr().err
