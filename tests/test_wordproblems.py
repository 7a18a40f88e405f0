"""Real word problems: words and numbers, chains, splits without leaks, and a tiny training."""
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_grpo import compare as comparing
from latent_grpo.model import TinyLM
from latent_grpo.presets import build_model, build_task, make_config, sampling_of
from latent_grpo.rollout import LONG, generate, replay_logps, replay_states
from latent_grpo.sft import train_sft
from latent_grpo.train import score_policy, train_rl
from latent_grpo.wordproblems import (FILES, SYMBOLS, Words, bucket, expression_steps,
                                      number_tokens, read_files, run_steps, split_rows, vary,
                                      with_chain, words_of)

REAL = Path(os.environ.get("LATENT_GRPO_DATA")
            or Path(__file__).parent.parent.parent / "shared/data")
NAMES = "Ann Bob Cleo Dora Emil Fay Gus Hal Ida Jon Kim Leo Mia Ned Ola Pam".split()
THINGS = "apples pens books coins cards shells stamps cups".split()


def problem(i, kind="mawps", **fields):
    """A made row; every second one adds, the others take away."""
    name, thing, rng = NAMES[i % 16], THINGS[i // 16 % 8], random.Random(i)
    a, b = rng.randint(30, 60), rng.randint(2, 29)
    verb, op = (("finds", "+"), ("loses", "-"))[i % 2]
    text = f"{name} has {a} {thing} in box {i}ab and {verb} {b} of them. How many are there now?"
    text = text.replace(f"{i}ab", "".join(chr(97 + int(c)) for c in str(i)))
    answer = a + b if op == "+" else a - b
    return dict(problem=text, answer=str(answer), cot=f"<<{a}{op}{b}={answer}>>",
                id=f"{kind}-{i}", **fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of made files; MAWPS holds all of MultiArith, ParaMAWPS paraphrases MAWPS."""
    part = lambda i, n, a, b: f"train{a}" if i % n else f"test{b}"
    multiarith = [problem(i, "multiarith", split=part(i, 3, 420, 180)) for i in range(60)]
    multiarith[1]["problem"], multiarith[1]["answer"] = (multiarith[0][k] for k in ("problem", "answer"))
    multiarith[1]["cot"] = multiarith[0]["cot"]                    # a test problem, twice
    mawps = [problem(i) for i in range(200)]
    rows = dict(
        multiarith=multiarith, mawps=mawps,
        svamp=[problem(i, "svamp", split=part(i, 3, 700, 300)) for i in range(200, 260)],
        asdiv=[problem(i, "asdiv") for i in range(260, 330)],
        paramawps=[dict(problem(i, "para"), base_id=f"mawps-{i % 200}",
                        problem="So, " + problem(i)["problem"].replace("there", "left"))
                   for i in range(200)],
        gsm8k_eq_train=[problem(i, "gsm8k") for i in range(330, 360)])
    rows["mawps"][199]["answer"] = "7"                             # a defect
    folder = tmp_path_factory.mktemp("made")
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


@pytest.fixture
def task(made, monkeypatch):
    monkeypatch.setenv("LATENT_GRPO_DATA", str(made))
    return build_task(tiny_config())[0]


def tiny_config(method="vanilla", **settings):
    small = dict(width=48, layers=2, ff=96, explicit_sft=4, latent_sft=4, sft_batch=16, prompts=6,
                 groups=6, steps=2, test_rows=12, eval_samples=2, max_steps=16)
    return make_config("wordproblems", method, **small | settings)


def test_numbers_and_words():
    assert words_of("Roger's 1,250.50 dollars, $3.0 and three part-time jobs - or 5 - 2?") == [
        "roger's", "1250.5", "dollars", "$", "3", "and", "3", "part", "time", "jobs", "-", "or",
        "5", "-", "2"]
    assert number_tokens("1250.5") == ["12", "50", ".", "50"]
    vocab = Words(["roger", "had"])
    for number in ("0", "7", "100", "205", "10000", "99999", "0.05", "12.5", "3.07"):
        ids = vocab.encode(number)
        assert vocab.decode(ids) == number and max(ids) < len(SYMBOLS)
    text = "roger had 1250.05 <think> 3 + 205 = 208 ; 208 / 2 = 104 </think> 104"
    assert vocab.decode(vocab.encode(text)) == text
    assert vocab.encode("zebra") == [vocab.ids["<unk>"]] and vocab.ids["<unk>"] >= len(SYMBOLS)


@pytest.mark.parametrize("equation, result", [
    ("((40.0+14.0)/9.0)", "6"), ("X=(212.0-12)", "200"), ("4+(5*x)=29", "5"), ("29-x=4*2", "21"),
    ("60/x=12", "5"), ("x-3=5", "8"), ("9=2*(x-1.5)", "6"), ("x/4=2.5", "10")])
def test_equations_are_worked_out(equation, result):
    assert run_steps(expression_steps(equation), {})[1] == result


def test_chains_are_true_sums_and_defects_are_dropped():
    row = dict(problem="A 3, b 4 and c 5", answer="35", cot="<<3+4=7>> <<7*5=35>>", id="g")
    assert with_chain(row)["cot"] == "3 + 4 = 7 ; 7 * 5 = 35"
    bad = [dict(row, answer="36"), dict(row, cot=None), dict(row, cot="x+1=x*2"),
           dict(row, cot="<<3/7=0.43>>", answer="0.43"), dict(row, cot="<<3-5=-2>>", answer="-2"),
           dict(row, cot="<<99999+4=100003>>", answer="100003"), dict(row, cot="LCM[3,4]=12")]
    assert [with_chain(r) for r in bad] == [None] * len(bad)


def check_chain(row):
    """Every step is a true sum, and the last result is the answer."""
    for step in row["cot"].split(" ; "):
        left, right = step.split(" = ")
        assert abs(eval(left) - float(right)) < 0.006, row
    assert float(right) == float(row["answer"])


def test_variants_are_true_and_keep_the_words():
    row = with_chain(dict(problem="Ann has 12 pens, 5 cups and 40 dogs. How many pens are in 2 "
                          "boxes of 3?", answer="30", cot="<<(12-2)*3=30>>", id="v"))
    assert row["numbers"] == ["12", "5", "40", "2", "3"]
    rng, seen = random.Random(0), set()
    for _ in range(100):
        new = vary(row, rng, 1.0)
        check_chain(new)
        words = lambda r: [w for w in r["problem"].split() if not w.isdigit()]
        assert words(new) == words(row)
        assert set(re.findall(r"\d+", new["cot"].split(" = ")[0])) <= set(new["problem"].split())
        seen.add(new["problem"])
    assert len(seen) > 90
    twice = with_chain(dict(problem="Ann has 3 pens and 3 cups", answer="6", cot="<<3+3=6>>", id=""))
    assert vary(twice, rng, 1.0) == twice               # which 3 is which? leave it
    odd = with_chain(dict(problem="Ann has 4 pens", answer="32", cot="<<4*8=32>>", id=""))
    assert vary(odd, rng, 1.0) == odd                   # where does the 8 come from? leave it


def letters(row): return "".join(c for c in row["problem"].lower() if c.isalnum())
def template(row): return " ".join(w for w in words_of(row["problem"]) if not w[0].isdigit())


def check_leaks(files, benchmark_train):
    """Nothing that is trained on is, paraphrases or renumbers what is measured."""
    splits, extra = split_rows(files, benchmark_train)
    trained = splits["train"] + extra
    kept = [r for name, rows in splits.items() if name != "train" for r in rows]
    assert not set(map(letters, trained)) & set(map(letters, kept))
    strict = [r for name in ("mawps", "multiarith", "validation") for r in splits[name]]
    assert not set(map(template, trained)) & set(map(template, strict))
    held = set(map(letters, kept))
    bases = {r["id"] for r in files["mawps"] if letters(r) in held}
    benchmark = set(map(letters, files["multiarith"]))
    arith = {r["id"] for r in files["mawps"] if letters(r) in benchmark}
    if not benchmark_train: bases |= arith
    assert bases and not bases & {r.get("base_id") for r in trained}
    ids = {r["id"] for r in trained}
    assert not {r["id"] for r in kept} & ids
    if not benchmark_train:
        assert not [i for i in ids if i.startswith(("multiarith", "svamp"))]
        assert not set(map(letters, trained)) & benchmark
    return splits, extra


@pytest.mark.parametrize("benchmark_train", [True, False])
def test_no_leak_in_made_files(made, benchmark_train):
    files = read_files(str(made))
    splits, extra = check_leaks(files, benchmark_train)
    assert len(splits["multiarith"]) == 20 and len(splits["svamp"]) == 20
    assert len(splits["multiarith_174"]) == 19          # the one that train420 repeats
    assert splits["mawps"] and splits["validation"] and extra
    assert "mawps-199" not in {r["id"] for r in splits["mawps"] + splits["validation"]}
    kinds = {r["id"].split("-")[0] for r in splits["train"]}
    assert kinds == {"mawps", "asdiv"} | ({"multiarith", "svamp"} if benchmark_train else set())


def test_the_leak_check_sees_a_leak(made):
    """The check itself: a row that paraphrases a held-out one is found."""
    files = read_files(str(made))
    held = next(r for r in files["mawps"] if bucket(r) < 3 and int(r["id"][6:]) > 60)
    copy = dict(files["asdiv"][0], problem=held["problem"] + "!")
    assert letters(copy) in set(map(letters, split_rows(files)[0]["mawps"]))
    assert "asdiv-copy" not in {r["id"] for r in check_leaks(
        files | dict(asdiv=files["asdiv"] + [dict(copy, id="asdiv-copy")]), True)[0]["train"]}


@pytest.mark.skipif(not (REAL / "paramawps.jsonl").exists(), reason="no real files here")
@pytest.mark.slow
def test_real_files():
    files = read_files(str(REAL))
    for benchmark_train in (True, False):
        splits, extra = check_leaks(files, benchmark_train)
        sizes = {k: len(v) for k, v in splits.items()}
        assert (sizes["multiarith"], sizes["multiarith_174"], sizes["svamp"]) == (180, 174, 300)
        assert sizes["mawps"] >= 400 and sizes["train"] > 2000
    rows = [r for r in map(with_chain, splits["train"] + extra) if r]
    rng = random.Random(0)
    for row in random.Random(1).sample(rows, 300): check_chain(vary(row, rng))


def test_missing_files_are_named(made, monkeypatch, tmp_path):
    monkeypatch.delenv("LATENT_GRPO_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"LATENT_GRPO_DATA='' has no mawps.jsonl.*lesson 30"):
        build_task(tiny_config())
    for name in FILES:
        if name != "svamp": (tmp_path / f"{name}.jsonl").write_bytes((made / f"{name}.jsonl").read_bytes())
    monkeypatch.setenv("LATENT_GRPO_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no svamp\.jsonl;"): build_task(tiny_config())


def test_the_model_says_symbols_only(task):
    model = build_model(tiny_config(), task)
    assert task.outputs == len(SYMBOLS) < task.vocab_size == len(model.embed)
    assert model.head(torch.zeros(1, 48)).shape == (1, len(SYMBOLS))
    for row in task.rows["train"][:50]:
        labels, tail = task.latent_target(row)
        ids = [i for some, _ in labels for i in some] + tail + task.explicit_target(row)
        assert max(ids) < task.outputs
    with pytest.raises(ValueError, match="top_k=200: is larger"):
        build_model(tiny_config(top_k=200), task)


def test_a_shared_prompt_replays_like_a_repeated_one(task):
    """Long prompts are read once a group: same states, same gradients as reading them G times."""
    cfg, model = tiny_config(), TinyLM(task.vocab_size, 16, 2, 2, 24, outputs=task.outputs)
    with torch.no_grad(): model.unembed.weight.mul_(6)
    prompts = [task.prompt(r)[:-1] + task.prompt(r) for r in task.rows["train"][:3]]
    s = sampling_of(cfg, task.end_latent_ids[0])
    r = generate(model, prompts, s, task.end_latent_ids, task.eos_id, 4, 7)
    assert r.prompt_ids.shape[1] > LONG
    grads = []
    for model.grad_cache in (True, False):
        states = replay_states(model, r, s)
        grads.append((states, *torch.autograd.grad(replay_logps(model, r, s).sum(),
                                                   [p for p in model.parameters()], allow_unused=True)))
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(replay_logps(model, r, s), r.logps, atol=1e-4, rtol=1e-4)


def test_batches_follow_the_weights_and_vary(task):
    from latent_grpo.sft import _stream
    heavy = dict(task.rows["train"][0], weight=1e6)
    task.rows["train"], task.extra = [heavy] + task.rows["train"][1:], []
    stream = _stream(task, False, 8, torch.Generator().manual_seed(0), 0, 2)
    prompts = {tuple(p) for _ in range(4) for p, _ in next(stream)}
    words = {tuple(w for w in task.decode(p).split() if not w.isdigit()) for p in prompts}
    assert len(words) == 1 and len(prompts) > 8


def test_a_latent_start_goes_on_from_the_explicit_one(made, monkeypatch, tmp_path):
    """compare trains the explicit policy once; the latent start is what training both would give."""
    monkeypatch.setenv("LATENT_GRPO_DATA", str(made))
    job = comparing.Job("wordproblems", "latent-start", 1, {}, {}, tmp_path)
    assert job.before.method == "explicit-start"
    assert comparing.Job("toy", "latent-start", 1, {}, {}, tmp_path).before is None
    cfg = tiny_config(seed=1)
    comparing._start(tiny_config("explicit", seed=1), tmp_path / "a")
    comparing._start(cfg, tmp_path / "b", tmp_path / "a")
    comparing._start(cfg, tmp_path / "c")
    weights = lambda x: (tmp_path / x / "init" / "model.safetensors").read_bytes()
    assert weights("b") == weights("c") != weights("a")
    assert comparing._start(replace(cfg, lr=1e-3, steps=5), tmp_path / "b")     # kept
    with pytest.raises(ValueError, match="latent_sft=4, not 5"):
        comparing._start(replace(cfg, latent_sft=5), tmp_path / "b")


def test_tiny_training_learns_and_every_method_steps(task):
    """Made problems, seconds: explicit SFT reads sums off; the latent start and its RL run."""
    cfg = tiny_config("explicit", test_rows=0)
    model = build_model(cfg, task)
    untrained = train_sft(model, task, False, 3, 32, 4e-3, bar=False)["loss"]
    trained = train_sft(model, task, False, 60, 32, 4e-3, bar=False)["loss"]
    assert trained < 0.6 * untrained
    train_sft(model, task, True, 20, 32, 4e-3, bar=False)
    for method in ("explicit", "vanilla", "released", "exact", "centred"):
        rows = train_rl(model, task, tiny_config(method, steps=1), bar=False)
        assert rows[0]["first_ratio_gap"] < 0.01 if rows[0]["groups"] else True
    scores = score_policy(model, task, tiny_config(), ["multiarith_174"], reference=model)
    assert scores["multiarith_174"]["noise_free"]["problems"] == 12
