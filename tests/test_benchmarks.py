"""Benchmarks: what each control takes away, every answer kept, protocols and the paper's numbers, the command."""
import json
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch

from helpers import END, EOS, MODELS, config, tiny, word_task
from latent_grpo.benchmarks import (CONTROLS, PAPER, PROTOCOLS, Protocol, answers, beside_paper,
                                    benchmark, control_table, make_protocol, open_policy,
                                    rollouts_that_fit, run_protocol, score)
from latent_grpo.cli import main
from latent_grpo.data import digest
from latent_grpo.evaluate import Interval, benchmark_mean, bootstrap_interval, evaluate, rollouts, seed_interval
from latent_grpo.presets import build_model, build_task, make_config, sampling_of, train_tokenizer
from latent_grpo.rollout import replay_logps
from latent_grpo.sampling import END as ENDED
from latent_grpo.sampling import FORCED, LATENT, Sampling
from latent_grpo.train import save_policy
from test_cli import made_up
from test_docs import keys

TASK = word_task()
PLAIN = Sampling(top_k=3, noise_scale=0., temperature=0.)
NOISY = Sampling(top_k=3, noise_scale=1., temperature=1.)


def thinking_model(): return tiny(seed=36, sharp=3.)      # thinks for 1 to 12 steps, is sometimes right


def drawn(model, sampling, control=None, task=TASK, rows=None, **how):
    """All rollouts of a small model, joined in lists: one (kinds, ids, scores) a rollout."""
    make = control and partial(CONTROLS[control], task=task)
    how = dict(samples=2, max_steps=12, batch=6, control=make) | how
    out = []
    for _, r in rollouts(model, task, rows or task.rows["train"][:7], sampling, **how):
        for i in range(len(r.kind)):
            real = r.response_mask[i]
            out.append((r.kind[i, real], r.ids[i, real], r.scores[i, real]))
    return out


# --- what the engine is made to do ---

@pytest.fixture(scope="module")
def thinker():
    """A random model that takes a few latent steps before it ends them."""
    model = thinking_model()
    lengths = [(kind == LATENT).sum().item() for kind, *_ in drawn(model, NOISY)]
    assert len(set(lengths)) > 3 and sum(n >= 2 for n in lengths) > 5
    return model


def latents(kind, ids, scores):
    """The latent steps of a rollout as comparable tuples."""
    at = kind == LATENT
    return [(*i, *s) for i, s in zip(ids[at].tolist(), scores[at].mul(1000).round().int().tolist())]


def test_removed_ends_at_once(thinker):
    for kind, ids, _ in drawn(thinker, NOISY, "removed"):
        assert kind[0] == ENDED and ids[0, 0] == END and LATENT not in kind


def test_removed_speaks_a_marker_of_several_ids(thinker):
    task = word_task()
    task.end_latent_ids = (END, 5)
    for kind, ids, _ in drawn(thinker, NOISY, "removed", task):
        assert kind[:2].tolist() == [ENDED, FORCED] and ids[:2, 0].tolist() == [END, 5]


def test_argmax_feeds_the_embedding_of_the_heaviest_word(thinker):
    free = drawn(thinker, NOISY)
    for (kind, ids, _), (before, wanted, _) in zip(drawn(thinker, NOISY, "argmax"), free):
        at = kind == LATENT
        assert (ids[at] == ids[at][:, :1]).all()
        if before[0] == LATENT: assert ids[0, 0] == wanted[0, 0]    # the first step is still the same


def test_argmax_is_the_policy_itself_with_one_component(thinker):
    one = Sampling(top_k=1, noise_scale=0., temperature=0.)
    for a, b in zip(drawn(thinker, PLAIN, "argmax"), drawn(thinker, one)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1][:, 0], b[1][:, 0])


def test_shuffled_moves_what_can_be_moved_and_keeps_the_rest(thinker):
    rows, lengths = TASK.rows["train"], set()
    ask = lambda c: drawn(thinker, NOISY, c, rows=rows, max_steps=6, batch=256)
    for a, b in zip(ask("shuffled"), ask(None)):
        new, old = latents(*a), latents(*b)
        lengths.add(len(old))
        assert sorted(new) == sorted(old)
        assert (new != old) == (len(old) > 1)
    assert lengths >= {1, 2, 3, 4}


def test_swapped_feeds_the_latents_of_the_next_problem(thinker):
    free = [latents(*x) for x in drawn(thinker, NOISY)]
    fed = [latents(*x) for x in drawn(thinker, NOISY, "swapped")]
    assert fed == free[2:] + free[:2] and fed != free


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", ["tiny", "Llama"])
def test_the_batch_changes_no_control(kind, control):
    model = MODELS[kind]()
    ask = lambda b: [(k.tolist(), i[:, 0].tolist()) for k, i, _ in
                     drawn(model, NOISY, control, rows=TASK.rows["train"][:4], max_steps=8, batch=b)]
    assert ask(1) == ask(6) == ask(256)


@pytest.mark.parametrize("control", CONTROLS)
def test_what_was_done_is_what_is_recorded(thinker, control):
    make = partial(CONTROLS[control], task=TASK)
    for _, r in rollouts(thinker, TASK, TASK.rows["train"][:4], NOISY, max_steps=10, control=make):
        again = replay_logps(thinker, r, Sampling(END, top_k=3, noise_scale=1., temperature=1.))
        torch.testing.assert_close(again, r.logps, atol=1e-4, rtol=1e-4)


# --- what it means: a model whose answer depends on its latents loses it, another does not ---

class Memory:
    """A cache that remembers all inputs."""
    def __init__(self, x): self.x = x
    def batch_repeat_interleave(self, n): self.x = self.x.repeat_interleave(n, 0)
    def batch_select_indices(self, rows): self.x = self.x[rows]


class Reader(torch.nn.Module):
    """Prompt `x y <think>`; thinks x, then y, and answers with its last latent, or with the prompt's y."""
    def __init__(self, reads):
        super().__init__()
        self.embed, self.reads = torch.eye(12), reads
    def hidden(self, x, mask=None, cache=None, use_cache=False):
        x = torch.cat([cache.x, x], 1) if cache else x
        words, n = x.argmax(-1), x.shape[1]
        if (words[0] == END).any() and words[0, -1] != END: said = torch.full((len(x),), EOS)
        elif words[0, -1] == END: said = words[:, -2] if self.reads else words[:, 1]
        else: said = words[:, n - 3] if n < 5 else torch.full((len(x),), END)
        return 30. * torch.eye(12)[said][:, None], Memory(x)
    def head(self, h): return h


PAIRS = [dict(problem=f"{a} {b}", answer=b, id=a + b, cot=None) for a in "abcde" for b in "abcde" if a != b]


@pytest.mark.parametrize("reads, kept", [(True, dict(removed=0, shuffled=0, swapped=0, argmax=1)),
                                         (False, dict(removed=1, shuffled=1, swapped=1, argmax=1))])
def test_only_a_policy_that_reads_its_latents_needs_them(reads, kept):
    right = lambda c: np.mean([x["right"] for x in answers(
        Reader(reads), TASK, PAIRS, PLAIN, max_steps=9, control=c and partial(CONTROLS[c], task=TASK))])
    assert right(None) == 1
    assert {c: right(c) for c in CONTROLS} == kept


def test_swapped_answers_are_those_of_the_donor():
    control = partial(CONTROLS["swapped"], task=TASK)
    items = answers(Reader(True), TASK, PAIRS, PLAIN, max_steps=9, control=control)
    assert [x["answer"] for x in items] == [r["answer"] for r in PAIRS[1:] + PAIRS[:1]]


# --- evaluation: means are over rollouts and steps, whatever the batch ---

def test_batch_size_changes_nothing():
    model, rows = thinking_model(), TASK.rows["train"][:7]
    ask = lambda b: evaluate(model, TASK, rows, NOISY, samples=3, max_steps=12, batch=b, reference=tiny(seed=5))
    one, many, all_ = ask(1), ask(12), ask(256)          # 7 batches; 4 + 3 problems; one batch
    for name in ("latent_length", "text_length", "support", "kl", "invalid", "pass1", "low", "high"):
        assert one[name] == pytest.approx(all_[name], abs=1e-5) == pytest.approx(many[name], abs=1e-5), name
    every = drawn(model, NOISY, rows=rows, samples=3, batch=256, seed=1_000_003)
    assert all_["latent_length"] == pytest.approx(np.mean([(k == LATENT).sum() for k, *_ in every]))


def test_mean_of_benchmarks_has_the_interval_of_its_parts():
    a, b = Interval(.5, .4, .7), Interval(.3, .3, .3)
    assert benchmark_mean([a]) == pytest.approx(a)
    assert benchmark_mean([a, b]) == pytest.approx((.4, .35, .5))
    assert benchmark_mean([a, a]) == pytest.approx((.5, .5 - .1 / 2**.5, .5 + .2 / 2**.5))
    rng = np.random.default_rng(0)                       # against redrawing two benchmarks
    x, y = rng.random(400) < .3, rng.random(50) < .6
    means = [(rng.choice(x, 400).mean() + rng.choice(y, 50).mean()) / 2 for _ in range(4000)]
    found = benchmark_mean([bootstrap_interval(x), bootstrap_interval(y)])
    assert found[1:] == pytest.approx(np.quantile(means, [.025, .975]), abs=.01)


# --- every answer is kept ---

ITEM = {"id", "sample", "answer", "right", "ended", "latent", "text"}


def test_a_line_for_every_answer(tmp_path):
    rows, path = TASK.rows["train"][:5], tmp_path / "a.jsonl"
    items = answers(thinking_model(), TASK, rows, NOISY, 3, path, max_steps=12)
    assert [json.loads(x) for x in path.read_text().splitlines()] == items and len(items) == 15
    assert [(x["id"], x["sample"]) for x in items] == [(r["id"], s) for r in rows for s in range(3)]
    free = drawn(thinking_model(), NOISY, rows=rows, samples=3)
    for x, (kind, ids, _) in zip(items, free):
        assert set(x) == ITEM == keys("Answers of `eval --protocol`")
        assert (x["latent"], x["latent"] + x["text"]) == ((kind == LATENT).sum(), len(kind))
        assert x["ended"] == (ids[-1, 0] == EOS and kind[-1] != LATENT)
        assert x["right"] <= (x["answer"] is not None) <= x["ended"]
    assert any(x["right"] for x in items) and not all(x["ended"] for x in items)


@pytest.mark.parametrize("control", [None, "swapped"])
@pytest.mark.parametrize("lines", [0, 1, 6, 8, 15])
def test_an_evaluation_that_was_killed_goes_on(tmp_path, lines, control):
    model, rows, path = thinking_model(), TASK.rows["train"][:5], tmp_path / "a.jsonl"
    make = control and partial(CONTROLS[control], task=TASK)
    ask = lambda: answers(model, TASK, rows, NOISY, 3, path, max_steps=12, batch=6, control=make)
    whole = ask()
    kept = path.read_text().splitlines(True)
    path.write_text("".join(kept[:lines]) + (kept[lines][:9] if lines < 15 else ""))
    assert ask() == whole and path.read_text() == "".join(kept)
    with pytest.raises(ValueError, match="other problems"):
        answers(model, TASK, rows[1:], NOISY, 3, path)


def test_a_finished_file_asks_nobody(tmp_path):
    rows = TASK.rows["train"][:3]
    whole = answers(thinking_model(), TASK, rows, NOISY, 2, tmp_path / "a.jsonl", max_steps=9)
    assert answers(None, TASK, rows, NOISY, 2, tmp_path / "a.jsonl") == whole


# --- scores ---

def item(i, j, right, latent=3, text=2, ended=True, answer="x"):
    return dict(id=str(i), sample=j, answer=answer, right=right, ended=ended, latent=latent, text=text)


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_pass_at_k_by_enumeration(samples):
    rng = np.random.default_rng(samples)
    right = rng.random((5, samples)) < .4
    s = score([item(i, j, bool(right[i, j])) for i in range(5) for j in range(samples)], samples)
    assert list(s["pass_at"]) == [k for k in (1, 2, 4) if k <= samples]
    for k, found in s["pass_at"].items():
        subsets = [[row[list(c)].any() for c in combinations(range(samples), k)] for row in right]
        assert found.mean == pytest.approx(np.mean(subsets)) and found.low <= found.mean <= found.high
    assert s["pass1"] == pytest.approx(s["pass_at"][1]) and s["counts"] == right.sum(1).tolist()


def test_scores_of_known_answers():
    items = [item(0, 0, True, 4, 3), item(0, 1, False, 0, 5), item(1, 0, False, 9, 0, ended=False, answer=None),
             item(1, 1, False, 2, 3, answer=None)]
    s = score(items, 2)
    assert s["pass1"].mean == .25 and (s["latent"].mean, s["text"].mean) == (3.75, 2.75)
    assert s["tokens"].mean == 6.5 and (s["invalid"], s["unparsed"]) == (.25, .25)
    three = score([item(i, j, i < 2 and not j) for i in range(3) for j in range(2)], 2)
    assert three["runs"] == pytest.approx(seed_interval([2 / 3, 0]))    # all of run 0 but one, none of run 1
    assert score(items[:2], 1)["runs"] is None
    none = score([item(i, j, False) for i in range(30) for j in range(5)], 5)["pass1"]
    assert none.low == 0 and .05 < none.high < .2                       # 0 of 30 problems proves little


# --- protocols and the paper ---

@pytest.mark.parametrize("name, tokens, sets", [
    ("paper-low", 128, ["gsm8k-aug", "gsm-hard", "svamp", "multiarith"]),
    ("paper-high", 4096, ["math-500", "aime24", "aime25", "gpqa"]),
    ("paper-pass64", 4096, ["math-500", "aime24", "aime25"])])
def test_the_paper_s_protocol(name, tokens, sets):
    p = make_protocol(name)
    assert (p.temperature, p.text_top_p, p.max_steps) == (.6, .95, tokens)
    assert [n for n, _ in p.sets] == sets and p.samples == (64 if "64" in name else 5)
    assert p.noise_scales == ((.5, 1.) if "64" in name else (0.,)) and p.k == (64 if "64" in name else 1)
    assert make_config(p.preset).max_steps == tokens and set(PAPER[p.paper]["Latent-GRPO"]) - {"mean", "tokens"} <= set(sets)


def test_every_value_of_a_protocol_is_a_field_and_has_a_source():
    for name, values in PROTOCOLS.items():
        assert all(len(v) == 2 for v in values.values())
        assert isinstance(make_protocol(name), Protocol)
    with pytest.raises(ValueError, match="--protocol paper: choose one of greedy"): make_protocol("paper")
    with pytest.raises(ValueError, match="samples=8: pass@64 needs"): make_protocol("paper-pass64", samples=8)


def result(name, counts, samples=2, **more):
    lengths = {k: Interval(x, x, x) for k, x in dict(tokens=12, latent=9, text=3).items()}
    return dict(set=name, noise=0., control="", samples=samples, counts=counts, **lengths) | more


def test_difference_from_the_paper():
    low = make_protocol("paper-low")
    results = [result(n, [2] * p + [0] * (50 - p)) for (n, _), p in zip(low.sets, (10, 20, 30, 40))]
    rows = beside_paper(results, low, "Latent-GRPO")
    assert [r["ours"].mean for r in rows] == pytest.approx([.2, .4, .6, .8, .5])
    assert [r["paper"] for r in rows] == [None] * 4 + [58.32]       # rows of the low setting are not public
    mean = rows[-1]
    assert mean["difference"] == pytest.approx([x - .5832 for x in mean["ours"]])
    assert mean["paper_tokens"] == 21.2 and mean["tokens"] == 12
    other = beside_paper(results, low, "explicit GRPO")[-1]
    assert other["difference"].mean == pytest.approx(.5 - .5798)


def test_a_mean_of_other_sets_is_not_set_beside_the_paper_s():
    high = make_protocol("paper-high")
    rows = beside_paper([result("math-500", [1] * 9), result("aime24", [0] * 9)], high, "Latent-GRPO")
    assert [r["paper"] for r in rows] == [80.40, 26.56, None]
    assert rows[1]["difference"].mean == pytest.approx(-.2656) and rows[2]["difference"] is None


def test_the_paper_s_range_widens_the_difference():
    p = make_protocol("paper-pass64")
    row, = beside_paper([result("aime24", [9] * 12 + [0] * 18, 64)], p, "Latent-GRPO")
    assert row["ours"].mean == .4                          # 9 right of 64: pass@64 is 1
    assert row["difference"].low == pytest.approx(row["ours"].low - .5)
    assert row["difference"].high == pytest.approx(row["ours"].high - .467)


def test_noise_scales_have_rows_of_their_own():
    rows = beside_paper([result("a", [1, 2]), result("a", [0, 0], noise=.5)], Protocol(), "Latent-GRPO")
    assert [(r["noise"], r["ours"].mean) for r in rows] == [(0, .75), (.5, 0)]


def test_controls_are_compared_problem_by_problem():
    base, other = [2] * 60 + [0] * 40, [2] * 50 + [0] * 50               # 10 lost, none won
    text = control_table([result("a", base), result("a", other, control="swapped")])
    cells = [c.strip() for c in text.splitlines()[2].split("|")]
    assert cells[3].startswith("60.0 [") and cells[5].startswith("-10.0 [")
    low, high = map(float, cells[5].split("[")[1].rstrip("]").split(","))
    assert -17 < low < -10 < high < -4.5 + .1                            # paired: much narrower than 2 x 9.7


# --- whole evaluations ---

def test_explicit_policies_have_nothing_to_shuffle():
    cfg = config("explicit")
    sets = {"test": TASK.rows["test"]}
    for control in ("shuffled", "swapped", "argmax"):
        with pytest.raises(ValueError, match=f"--controls {control}: an explicit policy"):
            run_protocol(tiny(), TASK, cfg, Protocol(), sets, (control,))
    found = run_protocol(thinking_model(), TASK, cfg, Protocol(noise_scales=(0., 1.)), sets, ("removed",), bar=False)
    assert [(r["noise"], r["control"], r["latent"].mean) for r in found] == [(0, "", 0), (0, "removed", 0)]
    assert found[0]["text"] != found[1]["text"]                          # the chain is gone


def test_refused_before_anything_runs():
    sets = {"one": TASK.rows["test"][:1]}
    with pytest.raises(ValueError, match="one has one problem"):
        run_protocol(None, TASK, config(), Protocol(), sets, ("swapped",))
    with pytest.raises(ValueError, match="--controls shufled: choose from removed"):
        run_protocol(None, TASK, config(), Protocol(), sets, ("shufled",))


def test_noise_is_that_of_the_protocol(tmp_path):
    model, sets = thinking_model(), {"test": TASK.rows["test"]}
    cfg, p = config(noise_scale=.7, top_k=3, max_steps=8), Protocol(samples=4, noise_scales=(0., .7))
    found = run_protocol(model, TASK, cfg, p, sets, out=tmp_path, bar=False)
    assert [r["noise"] for r in found] == [0, .7]
    random = []
    for name in ("test-noise0", "test-noise0.7"):
        items = [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        same = [len({(x["latent"], x["text"], x["answer"]) for x in items[i:i + 4]}) for i in range(0, 32, 4)]
        random.append(max(same) > 1)
    assert random == [False, True]
    sampling = sampling_of(cfg, END)                       # as trained, where the protocol says nothing else
    by_hand = answers(model, TASK, sets["test"], replace(sampling, temperature=0., text_top_p=1., text_top_k=0),
                      4, max_steps=8, seed=1_000_003)
    assert by_hand == items


def test_how_many_fit():
    lm = MODELS["Llama"]()
    one = 2 * 2 * 1 * 8 * 100 * 4 + 40 * 12               # keys, values; layers; heads; size; tokens; float32
    assert rollouts_that_fit(lm, 100, 10 * one) == 6 and rollouts_that_fit(lm, 100, one) == 1
    assert rollouts_that_fit(lm, 1000, 10 * one) < rollouts_that_fit(lm, 100, 10 * one)
    assert rollouts_that_fit(tiny(), 100) == 256


SMALL = dict(width=16, layers=1, heads=2, ff=24, vocab_size=320, top_k=3, drop="", max_steps=16)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A saved policy for text with random weights, and two small problem files."""
    folder = tmp_path_factory.mktemp("policy")
    files = [made_up(folder / f"{n}.jsonl", 9, i) for i, n in enumerate(("train", "one", "two"))]
    cfg = make_config("gsm8k-tiny", train=str(files[0]), test_rows=4, **SMALL)
    task, tokenizer = build_task(cfg)
    save_policy(folder / "policy", build_model(cfg, task), cfg, tokenizer)
    return folder, files


def test_the_command_end_to_end(policy, tmp_path, capsys, monkeypatch):
    folder, (_, one, two) = policy
    monkeypatch.setitem(PROTOCOLS["paper-low"], "max_steps", (10, "this test"))
    command = ["eval", "--policy", str(folder / "policy"), "--protocol", "paper-low", "--data", f"svamp={one}",
               "--data", str(two), "--controls", "removed,swapped", "--noise", "0,0.5", "--samples", "2",
               "--limit", "5", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 0
    said, out = capsys.readouterr().out, tmp_path / "out"
    names = {f"{n}-noise{s}{c}.jsonl" for n in ("svamp", "two") for s in ("0", "0.5")
             for c in ("", "-removed", "-swapped")}
    assert {p.name for p in out.glob("*.jsonl")} == names
    assert all(len((out / n).read_text().splitlines()) == 10 for n in names)
    record = json.loads((out / "results.json").read_text())
    assert set(record) == keys("results.json of `eval --protocol`")
    assert set(record["results"][0]) == keys("Scores of `eval --protocol`")
    assert set(record["rows"][0]) == keys("Rows of `eval --protocol`")
    assert record["protocol"]["samples"] == 2 and record["protocol"]["temperature"] == .6
    first = [json.loads(x) for x in one.read_text().splitlines()[:5]]
    assert record["data"]["svamp"] == dict(source="one.jsonl", problems=5, sha256=digest(first))
    assert "first 5 problems" in said and said.count("| mean") == 2 and (out / "table.md").read_text() == said
    assert all(len(x.strip("|").split("|")) in (5, 6, 8) for x in said.splitlines() if x.startswith("|"))

    assert main(command) == 0 and capsys.readouterr().out == said       # everything is there already
    assert main([*command[:-3], "--out", str(out), "--limit", "4", "--quiet"]) == 2
    assert "name another --out" in capsys.readouterr().err
    assert main([*command, "--controls", "hidden"]) == 2 and "--controls hidden" in capsys.readouterr().err


def test_all_problems_of_the_file_are_asked(policy):
    folder, (_, one, _) = policy
    *_, cfg, sets = open_policy(folder / "policy", Protocol(), [("a", str(one))])
    assert len(sets["a"]) == 9 and cfg.test_rows == 0                   # the run itself had a cap of 4


def test_generated_problems_need_no_files(tmp_path, capsys):
    cfg = make_config("toy", train_rows=60, test_rows=6, width=16, layers=1, heads=2, ff=16, max_steps=20)
    save_policy(tmp_path / "policy", build_model(cfg, build_task(cfg)[0]), cfg)
    assert main(["eval", "--policy", str(tmp_path / "policy"), "--protocol", "greedy", "--controls", "argmax"]) == 0
    first = capsys.readouterr().out.splitlines()[2]
    assert first.split("|")[1].strip() == "test" and "pass@2" not in first


def transformers_folder(path, texts):
    """A Llama with random weights as `transformers` saves it: none of our settings beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = train_tokenizer(texts, 330)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def test_weights_without_our_settings_get_those_of_the_protocol(policy, tmp_path):
    _, (train, one, _) = policy
    with torch.random.fork_rng(): transformers_folder(tmp_path, [train.read_text()])
    protocol = make_protocol("paper-low", samples=1, max_steps=6)
    with pytest.raises(ValueError, match="name problems with --data"): open_policy(tmp_path, Protocol())
    model, task, cfg, sets = open_policy(tmp_path, protocol, [("svamp", str(one))], max_prompt=400)
    assert (cfg.prompt_style, cfg.top_k, cfg.latent) == ("low", 10, True) and len(sets["svamp"]) == 9
    prompt = task.decode(task.prompt(sets["svamp"][0]))
    assert prompt.startswith("user: Please reason step by step") and prompt.endswith("<think>")
    text = benchmark(tmp_path, protocol, [("svamp", str(one))], limit=3, bar=False, max_prompt=400, dtype="float32")
    assert text.splitlines()[2].startswith("| svamp")
