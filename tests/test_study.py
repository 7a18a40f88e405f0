"""The study: what it runs, that it resumes, and that its rules of judgement are the written ones."""
import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from latent_grpo import study as package
from latent_grpo.compare import Job
from latent_grpo.evaluate import hierarchical_bootstrap, rank_correlation, seed_interval
from latent_grpo.evidence import forecast, leak_table, leak_threshold, outcomes
from latent_grpo.presets import make_config
from latent_grpo.regions import effect_word, mapped, region_table, regions
from latent_grpo.runs import provenance
from latent_grpo.stability import clipped, figures, late_collapses
from latent_grpo.study import (RATES, SEARCH_SEEDS, SEARCHES, SEEDS, STUDIES, Arm, Cell, answers, arms, chosen_rates, grid_cells,
                               pick, read_table, report, run_row, study, write_table)
from latent_grpo.verdicts import (CLAIMS, Claim, at_seeds, collapsed, difference, if_cut, if_moved, joined,
                                  judge, leak_and_drift, leak_predicts, main_effect, overall, passes, verdict_table, verdicts,
                                  wider)


def run(cell, seed, right, arm="toy", study="toy", **more):
    """A row of the table with these right answers."""
    scores = {"test": {m: dict(right=right, samples=1, kl=.1, invalid=0., latent_length=4., text_length=2.)
                       for m in ("noise_free", "sampled")}}
    return dict(study=study, arm=arm, cell=cell, seed=seed, scores=scores, curve={}) | more


# ---------------------------------------------------------------------------------------------- what is run

@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_is_a_valid_configuration(name):
    for arm in arms(name):
        names = [c.name for c in arm.cells]
        assert len(set(names)) == len(names)
        settings = [(c.method, str(sorted((arm.settings | c.settings).items(), key=str))) for c in arm.cells]
        assert len(set(settings)) == len(settings), "two cells of an arm are the same run"
        for c in arm.cells: make_config(arm.preset, c.method, **arm.settings | c.settings)


def test_no_seed_both_searches_and_reports():
    used = {s for name in STUDIES if name not in SEARCHES.values() for a in arms(name) for s in a.seeds}
    assert used <= set(SEEDS) and not used & set(SEARCH_SEEDS)


@pytest.mark.parametrize("search, after", [("search", "toy"), ("words-search", "words-searched")])
def test_a_search_is_the_same_for_everybody(search, after):
    found = arms(search)
    assert [a.settings["lr"] for a in found] == list(RATES)
    assert len({tuple(c.name for c in a.cells) for a in found}) == 1
    assert {c.name for a in arms(after) for c in a.cells if not c.name.startswith("paper, ")} == \
           {c.name for c in found[0].cells}


def test_a_study_takes_the_rates_of_its_own_search(tmp_path):
    rows = [dict(study=s, cell="paper", settings=dict(lr=lr), curve=dict(validation=[.5, v]))
            for s, best in (("search", 3e-5), ("words-search", 3e-4)) for lr in (3e-5, 3e-4) for v in [.1 + (lr == best)]]
    for name, lr in (("toy", 3e-5), ("words-searched", 3e-4)):
        arm = arms(name, chosen_rates(rows, SEARCHES[name]))[0]
        assert {c.name: c.settings.get("lr") for c in arm.cells}["paper"] == lr
    with pytest.raises(ValueError, match="centred has no learning rate; run the study words-search first"):
        study("words-searched", tmp_path / "t.gz", tmp_path / "runs")


def test_the_grid_of_other_toys_is_the_half_with_masking_on():
    grid = arms("grid")[0].cells
    for arm in arms("grid-toys"): assert arm.cells == tuple(c for c in grid if c.settings["masking"] == "paper")


def test_searched_rates_reach_the_cells():
    rates = {"paper": 3e-5, "exact": 3e-4}
    cells = {c.name: c.settings.get("lr") for c in arms("toy", rates)[0].cells}
    assert cells["paper"] == cells["paper, two-sided"] == 3e-5 and cells["exact"] == 3e-4
    assert cells["vanilla"] is None                       # not searched: the preset's


def test_an_unknown_study_and_an_unknown_arm_are_refused(tmp_path):
    with pytest.raises(ValueError, match="study 'toys': choose one of search"): arms("toys")
    with pytest.raises(ValueError, match="study 'toys': choose one of search"): report("toys", tmp_path / "t.gz")
    with pytest.raises(ValueError, match="arm 'x': grid has none of this name"):
        study("grid", tmp_path / "t.gz", tmp_path / "runs", only="x")


def test_the_grid_flips_one_switch_at_a_time():
    names = {c.name for c in grid_cells()}
    for position, (a, b) in {1: ("one-sided", "two-sided"), 2: ("released", "aligned"), 3: ("paper", "off"),
                             4: ("paper", "off")}.items():
        flipped = [", ".join(b if i == position else x for i, x in enumerate(n.split(", ")))
                   for n in names if n.split(", ")[position] == a]
        assert sum(n in names for n in flipped) >= 8


# ------------------------------------------------------------------------------------------------ the table

@pytest.mark.slow
def test_a_study_resumes_and_repeats(tmp_path, monkeypatch):
    tiny = dict(train_rows=300, test_rows=40, latent_sft=10, steps=1, prompts=8, eval_every=1)
    arm = Arm("a", (Cell("vanilla", "vanilla"), Cell("centred", "centred")), (1, 2), tiny, noises=(0., 1.))
    monkeypatch.setitem(package.STUDIES, "tiny", lambda rates: [replace(arm, seeds=(1,))])
    table = tmp_path / "t.jsonl.gz"
    first = study("tiny", table, tmp_path / "runs", 1, bar=False)
    assert {r["cell"] for r in first} == {"latent-start", "vanilla", "centred"}
    monkeypatch.setitem(package.STUDIES, "tiny", lambda rates: [arm])
    rows = study("tiny", table, tmp_path / "other", 1, bar=False)
    assert len(rows) == 6
    assert {p.name for p in (tmp_path / "other").rglob("seed*")} == {"seed2"}         # seed 1 was there
    row = next(r for r in rows if r["cell"] == "vanilla")
    assert len(row["scores"]["test"]["noise_free"]["right"]) == 40
    assert set(row["pass_at"]) == {"0.0", "1.0"} and row["at_start"]["leak"] > 0
    assert row["made"]["command"] == "latent-grpo study tiny"
    more = replace(arm, cells=(*arm.cells, Cell("exact", "exact")), seeds=(1,))
    monkeypatch.setitem(package.STUDIES, "tiny", lambda rates: [more])
    study("tiny", table, tmp_path / "third", 1, bar=False)                             # a seed with one start
    assert {p.parent.name for p in (tmp_path / "third").rglob("study.json")} == {"vanilla", "centred", "exact"}
    one = {r["start"] for r in read_table(table) if r["seed"] == 1 and "start" in r}
    other = {r["start"] for r in read_table(table) if r["seed"] == 2 and "start" in r}
    assert len(one) == len(other) == 1 and one != other
    text = report("tiny", table)
    assert "vanilla" in text and len(text.splitlines()) == 6


def test_a_problem_of_two_tests_counts_once(tmp_path):
    """`multiarith_174` is MultiArith without six problems: three tests make the mean, as the protocol says."""
    score = dict(pass1=.5, latent_length=4., text_length=2., support=1., invalid=0., unparsed=0., kl=.1, samples=1,
                 counts=[1, 0])
    tests = "multiarith", "svamp", "mawps", "multiarith_174"
    scores = {k: dict(noise_free=score, sampled=score) for k in tests}
    scores |= dict(minutes={}, made={}, data={}, best={k: score for k in tests})
    job = Job("wordproblems", "vanilla", 20, {}, {}, tmp_path)
    row = run_row("words", arms("words")[0], "vanilla", job, dict(scores=scores, curve={}))
    assert list(row["scores"]) == list(row["best"]) == ["multiarith", "svamp", "mawps"]
    assert answers(row).mean() == .5 and len(answers(row)) == 6


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [run("a", 1, "01"), run("b", 1, "11"), run("a", 2, "00")]
    write_table(rows, tmp_path / "one.gz")
    write_table(rows[::-1], tmp_path / "two.gz")
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert sorted(map(str, read_table(tmp_path / "one.gz"))) == sorted(map(str, rows))


def test_a_line_cut_short_is_dropped(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(run("a", 1, "1")) + '\n{"study": "to')
    assert [r["cell"] for r in read_table(tmp_path / "rows.jsonl")] == ["a"]
    assert read_table(tmp_path / "none.gz") == []


def test_rates_are_chosen_by_the_mean_at_the_last_step():
    rows = [dict(study="search", cell="a", settings=dict(lr=lr), curve=dict(validation=[.9, None, v]))
            for lr, values in ((1e-4, (.5, .6)), (3e-4, (.2, .8))) for v in values]
    other = [dict(study="toy", cell="a", settings=dict(lr=1.), curve=dict(validation=[1.]))]
    assert chosen_rates(rows + other) == {"a": 1e-4}


# ------------------------------------------------------------------------------------------------- judgement

@pytest.mark.parametrize("kind, interval, verdict", [
    ("more", (.05, .01, .09), "holds"), ("more", (0., -.01, .019), "fails"), ("more", (.01, -.01, .03), "open"),
    ("level", (0., -.019, .02), "holds"), ("level", (-.05, -.08, -.01), "fails"), ("level", (-.01, -.03, .01), "open"),
    ("flat", (0., -.01, .019), "holds"), ("flat", (.1, .03, .2), "fails"), ("flat", (.02, .01, .05), "open"),
    ("less", (-.1, -.2, -.01), "holds"), ("less", (.1, .01, .2), "fails"), ("less", (0., -.1, .1), "open"),
    ("above", (3.5, 3.1, 4.), "holds"), ("above", (2.5, 2., 2.9), "fails"), ("above", (3., 2.5, 3.5), "open")])
def test_rules_of_the_protocol(kind, interval, verdict):
    assert judge(kind, interval, line=3. if kind == "above" else 0.) == verdict


def test_half_of_the_runs_collapsing_is_unstable():
    assert judge("flat", (.1, .05, .2), collapses=.5) == "holds"
    rows = [run("latent-start", s, "1111") for s in (1, 2)] + [run("vanilla", 1, "1000"), run("vanilla", 2, "1100")]
    assert collapsed(rows, "toy", "vanilla") == .5        # half of the start's is not below half


@pytest.mark.parametrize("found, verdict", [
    ([], "not run"), (["holds"], "holds here"), (["holds", "holds", "open"], "holds here"),
    (["fails", "fails", "open"], "does not hold here"), (["holds", "fails"], "mixed"),
    (["holds", "open"], "open"), (["open"], "open")])
def test_one_verdict_from_several_rungs(found, verdict): assert overall(found) == verdict


def test_differences_are_paired_by_seed_and_problem():
    rows = [run("a", s, "1" * (20 + s) + "0" * (80 - s)) for s in (1, 2, 3)]
    rows += [run("b", s, "1" * (10 + s) + "0" * (90 - s)) for s in (1, 2, 3)] + [run("b", 9, "1" * 100)]
    rows += [run("c", s, "1" * 5 + "0" * 95) for s in (1, 2, 3)]
    d = difference(rows, "toy", ("a", "b"))
    assert d.mean == pytest.approx(.1) and d.low > .03 and d.high < .18       # seed 9 has no partner
    assert difference(rows, "toy", ("a", "missing")) is None
    assert difference(rows, "toy", ("a", "b", "b", "c")).mean == pytest.approx(.1 - .07)     # of gains
    assert difference([r for r in rows if r["seed"] != 3], "toy", ("a", "b")) is None        # two seeds


def test_the_wider_interval_counts():
    """Seeds that differ, problems that do not: the bootstrap over three seeds is too narrow, t is not."""
    d = np.repeat([[.1], [.2], [.3]], 50, axis=1)
    assert wider(d)[1:] == seed_interval(d.mean(1))[1:]
    one = np.random.default_rng(0).normal(size=(1, 60)).repeat(3, 0)       # problems differ, seeds do not
    assert wider(one)[1:] == hierarchical_bootstrap(one)[1:]


def test_tests_of_unequal_size_weigh_the_same():
    row = run("a", 1, "")
    row["scores"] = {name: {"noise_free": dict(right=right, samples=1)} for name, right in
                     (("small", "1111"), ("large", "0" * 12))}
    assert len(answers(row)) == 16 and answers(row).mean() == pytest.approx(.5)


def test_the_best_checkpoint_is_the_last_where_none_was_better():
    row = run("a", 1, "10")
    assert answers(row, "best").mean() == .5
    assert answers(row | dict(best={"test": dict(right="11", samples=1)}), "best").mean() == 1.


def test_a_main_effect_is_a_mean_over_pairs():
    """Masking adds 1 where selection is on and 3 where it is off: 2."""
    cell = lambda m, s: f"published, two-sided, none, {m}, {s}"
    value = {("off", "off"): 0, ("paper", "off"): 3, ("off", "paper"): 10, ("paper", "paper"): 11}
    rows = [run(cell(*k), s, "0", arm="grid", x=v + s / 10) for k, v in value.items() for s in (1, 2, 3)]
    effect, seeds = main_effect(3, "paper", "off", lambda r: r["x"])(rows, "grid")
    assert effect.mean == pytest.approx(2.) and effect.high - effect.low < 1e-6 and seeds == 3
    broken = [r | dict(x=float("nan")) if r["seed"] == 1 and "off, off" in r["cell"] else r for r in rows]
    assert main_effect(3, "paper", "off", lambda r: r["x"])(broken, "grid")[0].mean == pytest.approx(5 / 3)
    part = [r for r in rows if r["seed"] != 3 or "off, off" not in r["cell"]]    # the grid of seed 3 is not whole
    assert main_effect(3, "paper", "off", lambda r: r["x"])(part, "grid") is None


def test_pass_at_k_is_compared_problem_by_problem():
    counts = lambda *c: dict(pass_at={"0.0": " ".join(map(str, c))})
    rows = [run("a", s, "1", arm="p", **counts(64, 1)) for s in (1, 2, 3)]
    rows += [run("b", s, "1", arm="p", **counts(64, 0)) for s in (1, 2, 3)]
    assert passes("a", "0.0", 64, "b", "0.0", 64)(rows, "p")[0].mean == pytest.approx(.5)
    assert passes("a", "0.0", 1, "b", "0.0", 1)(rows, "p")[0].mean == pytest.approx(.5 / 64)


def points(x, y, names=None): return [list(zip(names or map(str, range(len(x))), x, y))]


def test_rank_correlation_sees_order_only():
    x = np.arange(8.)
    assert rank_correlation(points(x, np.exp(x))).mean == 1 and rank_correlation(points(x, -x**3)).mean == -1
    assert rank_correlation(points(x, np.ones(8))).mean == 0
    assert rank_correlation(points([1, 2, 3, 4], [1, 3, 2, 4])).mean == pytest.approx(.8)


def test_copies_of_a_point_are_no_further_evidence():
    rng = np.random.default_rng(1)
    x, y, names = rng.normal(size=6), rng.normal(size=6), list("abcdef")
    many = lambda v: np.concatenate([v + e for e in (0, 1e-6, 2e-6, 3e-6)])
    one, own = (rank_correlation(points(many(x), many(y), n)) for n in (names * 4, None))
    assert one.high - one.low > 1.3 * (own.high - own.low)


def test_ranks_are_compared_within_a_rung():
    falling = [list(zip("abcd", [1, 2, 3, 4], [4, 3, 2, 1])), list(zip("abcd", [11, 12, 13, 14], [14, 13, 12, 11]))]
    assert rank_correlation(falling).mean == -1           # pooled it would rise
    assert rank_correlation([sum(falling, [])]).mean > 0


def test_the_leak_is_compared_with_the_drift_of_the_same_cells():
    rows = [run(f"c{i}", s, "1", arm="grid", at_start=dict(leak=i / 10)) for i in range(6) for s in (1, 2)]
    for r in rows: r["scores"]["test"]["sampled"]["kl"] = r["at_start"]["leak"]**2
    assert leak_predicts(rows, "grid")[0].mean == pytest.approx(1.)
    assert leak_predicts(rows[:8], "grid") is None        # four cells are too few


def test_cells_with_one_sampler_are_one_piece_of_evidence():
    rows = [run(c, s, "1", at_start=dict(leak=leak + s / 100)) for c, leak in (("p", .9), ("p, less", .9), ("v", .2))
            for s in (1, 2)]
    assert [p[0] for p in leak_and_drift(rows, "toy")] == ["p", "p", "v"]


def test_what_changes_no_answer_is_not_judged():
    claim = Claim("C", "", "more", ("toy",), ("a", "b"))
    rows = [run(c, s, "1100") for c in "ab" for s in (1, 2, 3)]
    assert claim.on(rows, "toy") is None
    assert {v["verdict"] for v in verdicts([run("paper", s, "1") for s in (1, 2, 3)]) if v["claim"] == "C6"} == {"no verdict"}


def test_two_lost_policies_are_not_compared():
    claim = Claim("C", "", "more", ("toy",), ("a", "b"))
    rows = [run(c, s, r) for s in (1, 2, 3) for c, r in (("latent-start", "1" * 8), ("a", "1" + "0" * 7), ("b", "0" * 8))]
    assert claim.on(rows, "toy") is None
    assert claim.on([r | run("b", r["seed"], "1" * 8) if r["cell"] == "b" else r for r in rows], "toy")["verdict"] == "fails"


def test_claims_on_some_seeds_take_only_those():
    """The explicit start is solved at seeds 1 to 3; where it is not, two seeds are too few."""
    rows = [run("explicit-start", s, "1111" if s < 4 else "1000") for s in range(1, 6)]
    rows += [run(c, s, r) for s in range(1, 6) for c, r in (("a", "1110"), ("b", "1111" if s < 4 else "0000"))]
    effect, seeds = at_seeds(("a", "b"))(rows, "toy")
    assert effect.mean == -.25 and seeds == 3
    assert at_seeds(("a", "b"), False)(rows, "toy") is None


def test_where_nothing_moves_nothing_is_judged():
    rows = [run(c, s, r) for s in (1, 2, 3) for c, r in (("latent-start", "1100"), ("paper", "1000"))]
    for r in rows: r["scores"]["test"]["sampled"]["kl"] = 1e-4
    assert if_moved(("paper", "latent-start"))(rows, "toy") is None
    rows[-1]["scores"]["test"]["sampled"]["kl"] = .1
    effect, seeds = if_moved(("paper", "latent-start"))(rows, "toy")
    assert effect.mean == -.25 and seeds == 3


def test_a_limit_that_cuts_nothing_decides_nothing():
    rows = [run(c, s, r) for s in (1, 2, 3) for c, r in (("vanilla", "1100"), ("masked", "1000"))]
    for r in rows: r["curve"] = dict(invalid=[0., 0.])
    assert if_cut(("masked", "vanilla"))(rows, "toy") is None
    rows[0]["curve"]["invalid"] = [0., .2]                     # in training; the test has a limit of its own
    effect, seeds = if_cut(("masked", "vanilla"))(rows, "toy")
    assert effect.mean == -.25 and seeds == 3


def test_lost_pairs_and_seeds_without_any_value_have_no_main_effect():
    cell = "published, {}, none, off, off".format
    made = lambda values, right: [run(cell(n), s, right[n], "grid", x=values[n]) for n in values for s in (1, 2, 3)]
    start = [run("latent-start", s, "1111", "grid") for s in (1, 2, 3)]
    effect = lambda rows: main_effect(1, "one-sided", "two-sided", lambda r: r.get("x"))(rows, "grid")
    one = {"one-sided": 1., "two-sided": 0.}
    assert effect(start + made(one, {"one-sided": "0000", "two-sided": "1110"}))[0].mean == 1
    assert effect(start + made(one, {"one-sided": "0000", "two-sided": "1000"})) is None          # both lost
    assert effect(start + made({"one-sided": 0., "two-sided": 0.}, {"one-sided": "1110", "two-sided": "1110"})) is None


def test_word_problems_are_one_rung():
    found = lambda *words: joined([dict(arm=a, verdict=v) for a, v in zip(("toy", "r = 2", "r = 3", "r = 4"), words)])
    assert found("open", "holds", "holds", "open") == ["open", "holds"]
    assert found("open", "holds", "fails", "holds") == ["open", "open"]
    assert found("holds") == ["holds"]


def test_the_length_of_nonsense_is_no_claim():
    claim = next(c for c in CLAIMS if c.name == "C2, length")
    rows = [run(c, s, r) for s in (1, 2, 3) for c, r in (("latent-start", "1111"), ("paper", "1110"), ("explicit", "1111"))]
    assert claim.on(rows, "toy")["effect"].mean == pytest.approx(1.)
    lost = [r | dict(scores=run("", 0, "1000")["scores"]) if r["cell"] == "paper" else r for r in rows]
    assert claim.on(lost, "toy") is None


def test_a_missing_metric_gives_no_verdict():
    cell = lambda m: f"published, two-sided, none, {m}, off"
    rows = [run(cell(m), s, "0", arm="grid", x=None if s == 1 and m == "off" else 1.) for m in ("off", "paper") for s in (1, 2, 3)]
    assert main_effect(3, "paper", "off", lambda r: r["x"])(rows, "grid") is None


def test_a_study_does_not_mix_settings(tmp_path, monkeypatch):
    arm = Arm("a", (Cell("vanilla", "vanilla", dict(lr=1e-5)),), (1,))
    monkeypatch.setitem(package.STUDIES, "tiny", lambda rates: [arm])
    write_table([run("vanilla", 1, "1", arm="a", study="tiny", settings=dict(lr=1e-4))], tmp_path / "t.gz")
    with pytest.raises(ValueError, match="holds vanilla, seed 1, with {'lr': 0.0001}, not {'lr': 1e-05}"):
        study("tiny", tmp_path / "t.gz", tmp_path / "runs", bar=False)
    with pytest.raises(ValueError, match="toy: .* has no learning rate; run the study search first"):
        study("toy", tmp_path / "none.gz", tmp_path / "runs2", bar=False)


def test_claims_name_cells_that_are_run():
    starts = {"latent-start", "explicit-start", "latent-start, latent_sft 0"}
    cells = {a.name: {c.name for c in a.cells} | starts for n in STUDIES for a in arms(n)}
    for claim in CLAIMS:
        if claim.name == "O1": continue                   # computed, not run
        for arm in (a for name in claim.arms for a in name.split("|")):
            assert arm in cells, (claim.name, arm)
            if not callable(claim.what): assert set(claim.what) <= cells[arm], (claim.name, arm)
    assert len({c.name for c in CLAIMS}) == len(CLAIMS)


def test_a_claim_without_runs_says_so():
    found = verdicts([])
    assert [v["claim"] for v in found] == [c.name for c in CLAIMS]
    assert {v["verdict"] for v in found if v["claim"] != "O1"} == {"not run"}


def test_the_table_shows_effect_interval_and_verdict():
    claim = Claim("C", "a is better", "more", ("toy",), ("a", "b"))
    rows = [run("a", s, "1" * 50) for s in (1, 2, 3)] + [run("b", s, "0" * 50) for s in (1, 2, 3)]
    x = claim.on(rows, "toy")
    table = verdict_table([dict(claim="C", text="a is better", rungs=[x], verdict="holds here", planned=1)])
    assert "+100.0 [+100.0, +100.0], 3 seeds: holds" in table and "**holds here**" in table
    both = [dict(claim="C", text="", rungs=[x, x | dict(arm="other", verdict="open")], verdict="open", planned=4)]
    assert "**open** (2 of 4)" in verdict_table(both)
    assert "other" in verdict_table(both) and "other" not in verdict_table(both, rungs=False)
    assert "; all: holds 1, open 1" in verdict_table(both, rungs=False)


# --------------------------------------------------------------------------------------------- the evidence

def made(study_name):
    """Rows of every cell of a study: Pass@1 rises with the cell's place, the start's is a half."""
    rows = []
    for arm in arms(study_name):
        for seed in arm.seeds[:3]:
            rows.append(run("latent-start", seed, "10" * 20, arm.name, study_name))
            for i, cell in enumerate(arm.cells):
                right = "1" * (i + seed % 3) + "0" * (40 - i - seed % 3)
                rows.append(run(cell.name, seed, right, arm.name, study_name, at_start=dict(leak=(i + 1) / 100), preset=arm.preset,
                                method=cell.method, settings=arm.settings | cell.settings, curve=dict(step=[1, 2, 3], validation=[None, .5, i / 40], clipped=[.1, .2, .3]),
                                pass_at={n: "64 1 0" for n in ("0.0", "0.5", "1.0")}))
    return rows


@pytest.mark.parametrize("name", [n for n in STUDIES if n not in ("words", "search")])
def test_every_study_can_be_drawn(name):
    import matplotlib.pyplot as plt
    found = figures(made(name), name)
    assert found and all(f.axes for f in found.values())
    assert figures([], name) == {}
    for f in figures([r for r in made(name) if r["seed"] == arms(name)[0].seeds[0]][:3], name).values(): plt.close(f)     # begun
    for f in found.values():
        f.draw_without_rendering()
        plt.close(f)


def test_the_map_compares_with_vanilla_at_the_same_setting():
    rows = made("map")
    found = regions(rows)
    place = {c.name: i for i, c in enumerate(arms("map")[0].cells)}
    assert {k[0] for k in found} == {a.name for a in arms("map")}
    middle = [r for r in made("grid") if r["cell"] in ("published, two-sided, none, off, off", "exact, two-sided, none, paper, off")]
    base = mapped(middle + [r | dict(arm="elsewhere", study="toy") for r in middle])
    assert {(r["study"], r["arm"], r["cell"]) for r in base} == {("map", "base", "vanilla"), ("map", "base", "exact")}
    assert len(base) == len(middle) and set(regions(middle)) == {("base", "exact")}
    assert found["kl_coef 0.1", "one-sided"].mean == pytest.approx((place["one-sided"] - place["vanilla"]) / 40)
    assert {a for a, c in found if c == "masked"} == {"max_steps 14", "max_steps 16", "max_steps 20"}
    words = {(a, c): effect_word(x) for (a, c), x in found.items() if c == "masked"}
    line = next(x for x in region_table(rows).splitlines() if x.startswith("| `masked` |"))
    for word, cell in zip(("helps", "harms", "nothing"), line.split(" | ")[1:]):
        assert cell == (", ".join(a for a, _ in words if words[a, "masked"] == word) or "nowhere")
    assert line.endswith(f"| {list(words.values()).count('unclear')} of 3 |")


def test_the_share_of_clipped_ratios_is_a_mean_over_runs():
    rows = [run("exact", s, "1", "PPO clip 0.2", "ppo-clip", curve=dict(clipped=[s / 10, 0.])) for s in (1, 3)]
    assert clipped(rows, "PPO clip 0.2", "exact").tolist() == pytest.approx([.2, 0.])


def test_a_threshold_of_the_leak_comes_from_the_grid_alone():
    """Cells of the grid lose at a leak above 0.3; elsewhere only what that threshold says counts."""
    def cell(c, leak, right, arm, study, **settings):
        return [run(c, s, right, arm, study, at_start=dict(leak=leak), preset="toy", method="vanilla", settings=settings)
                for s in (1, 2)]
    start = lambda arm, study: [run("latent-start", s, "1100", arm, study) for s in (1, 2)]
    rows = [*start("grid", "grid"), *cell("a", .1, "1110", "grid", "grid"),
            *cell("b", .5, "1000", "grid", "grid", noise="one-sided"),
            *start("top_k 2", "map"), *cell("a", .6, "1111", "top_k 2", "map"), *cell("c", .2, "1111", "top_k 2", "map"),
            *cell("b", .7, "1000", "top_k 2", "map", noise="one-sided"), *cell("d", .9, "1100", "top_k 2", "map")]
    assert leak_threshold(outcomes(rows, "grid", "grid")) == pytest.approx(.3)
    assert forecast(outcomes(rows, "map", "top_k 2"), .3) == dict(
        cells=3, apart=1, high=1, lost=1, leak=pytest.approx(2 / 3), name=1., guess=pytest.approx(2 / 3), area=1., rest=None)
    assert "| map: other samplers, labels, lengths | 3 of 4 | 1 | 1 | 67 % | 100 % | 67 % | 1.00 |  |" in leak_table(rows)
    same = [r | dict(study="search") for r in rows if r["arm"] == "top_k 2"]      # an arm of the same name elsewhere
    assert leak_table(same + rows) == leak_table(rows) == leak_table(rows + same)


def test_what_did_not_move_is_not_forecast():
    points = np.array([(.1, 0., -.1, 0), (.5, .2, -.1, 0), (.4, .2, .1, 0), (.9, .2, .01, 0)])
    assert forecast(points, .45)["apart"] == 2 and forecast(points, .45)["leak"] == 1
    assert forecast(points[:1], .45) == dict(cells=0, apart=1, high=0) and forecast(points, .45)["high"] == 1
    with pytest.raises(ValueError, match="leak_threshold: 0 different leak, needs two"): leak_threshold(points[:1])


def test_a_start_of_its_own_is_the_one_compared_with():
    own = dict(preset="toy", method="vanilla", at_start=dict(leak=.1))
    rows = [run("latent-start, latent_sft 0", 1, "0000", "x", "ladder"),
            run("latent-start, latent_sft 1000", 1, "1100", "x", "ladder"),
            run("paper, no Latent-SFT", 1, "1000", "x", "ladder", settings=dict(latent_sft=0), **own),
            run("paper", 1, "1000", "x", "ladder", settings=dict(latent_sft=1000), **own)]
    assert sorted(outcomes(rows, "ladder", "x")[:, 2]) == [-.25, .25]


def test_a_late_collapse_is_told_from_a_low_run():
    rows = [run("a", s, "1", "long", curve=dict(step=[1, 2], validation=v)) for s, v in ((1, [.9, .4]), (2, [.3, .2]))]
    assert late_collapses(rows, "long") == {"a": (1, 2)}

# -------------------------------------------------------------------------------------------- what is committed

def test_what_two_machines_differ_by_is_what_the_findings_say():
    from test_skeleton import ROOT
    record = json.loads((ROOT / "docs/results/machines.json").read_text("utf-8"))
    sizes = {cell: [abs(v) for v in by_seed.values()] for cell, by_seed in record["points"].items()}
    every = sum(sizes.values(), [])
    assert len(every) == record["runs"] and np.mean(every) == pytest.approx(record["mean"], abs=.005)
    assert round(record["mean"], 1) == 2.5 and max(sizes["centred"]) < 2
    assert (round(max(sizes["vanilla"])), round(max(sizes["explicit"])), max(every)) == (16, 18, max(sizes["explicit"]))
    starts = record["starts"]
    assert max(map(abs, starts["latent-start"].values())) < 2.5 and starts["explicit-start"]["20"] == pytest.approx(-19, abs=.5)
    assert {c: v for c, v in record["verdicts_changed"].items() if c.endswith("- vanilla")} == {
        "O3, exact - vanilla": ["holds (best: holds)", "open (best: open)"],
        "O3, centred - vanilla": ["open (best: holds)", "holds (best: holds)"]}
    findings = " ".join((ROOT / "docs/findings.md").read_text("utf-8").split())
    assert ("by 2.5 points on average: those of centred by less than two points, those of vanilla at its rate of 3e-4 by up to 16, "
            "an explicit one by 18, because its start is 19 points lower") in findings
    assert f"{len(record['verdicts_changed'])} of {record['claims']} rows come out differently" in findings


def test_what_the_findings_say_of_explicit_starts_is_in_the_table():
    from test_skeleton import ROOT
    rows = read_table(ROOT / "docs/results/study.jsonl.gz")
    starts = {s: answers(r).mean() for s, r in pick(rows, "toy", "explicit-start").items()}
    assert {s for s, v in starts.items() if v < .9} == {20, 23, 25}
    behind = {c: at_seeds((c, "explicit"))(rows, "toy")[0].high < 0 for c in
              {r["cell"] for r in rows if r["arm"] == "toy" and r["method"] != "explicit" and "start" not in r["cell"]}}
    assert [c for c, is_behind in behind.items() if not is_behind] == ["rloo"]
    invalid = {(r["cell"], r["seed"]): r["scores"]["test"]["sampled"]["invalid"] for r in rows if r["study"] == "grid" and r["cell"].count(", ") == 4}
    assert sum(v > 0 for v in invalid.values()) == 5 and {s for (_, s), v in invalid.items() if v} == {23}
    assert max(answers(r).mean() for r in pick(rows, "pass@k", "explicit-start").values()) < .9


def test_what_the_front_page_says_in_short_is_in_the_table():
    from test_skeleton import ROOT
    rows = read_table(ROOT / "docs/results/study.jsonl.gz")
    gain = lambda arm, cell: difference(rows, arm, (cell, "latent-start"))
    above = lambda arm, cell: difference(rows, arm, (cell, "vanilla")).low > 0
    assert round(100 * gain("toy", "vanilla").mean) == 21 and gain("toy", "vanilla").low > 0 and all(gain(a, "vanilla").low < 0 for a in ("peaked", "modulus 13", "modulus 13, peaked"))
    assert min(answers(r).mean() for r in pick(rows, "peaked", "vanilla").values()) < .01
    assert all(gain(a, "paper").low < 0 for a in ("toy", "peaked", "modulus 13", "modulus 13, peaked"))
    for cell in ("exact", "centred"):
        assert min(gain(a, cell).mean for a in ("toy", "peaked")) > .25 and gain("modulus 13, peaked", cell).low < 0
        assert above("toy", cell) and above("modulus 13", cell) and not above("peaked", cell)
    assert gain("modulus 13", "centred").low > 0 and round(100 * gain("modulus 13", "centred").mean) == 8
    ahead = {c: at_seeds((c, "explicit"))(rows, "toy")[0] for c in ("vanilla", "paper", "exact", "centred")}
    assert all(x.high < 0 for x in ahead.values())
    grid = {a: difference(rows, "grid", (f"{a}, none, {m}, off", "published, two-sided, none, off, off"))
            for a, m in (("exact, two-sided", "off"), ("centred, one-sided", "off"))}
    assert all(x.low < 0 < x.high for x in grid.values())
    rows, words = mapped(rows), {k: effect_word(v) for k, v in regions(rows).items() if k[0] == "base" or k[0].startswith("lr ")}
    assert len({arm for arm, _ in words}) == 6 and not [k for k, w in words.items() if k[1] in ("one-sided", "paper") and w == "helps"]
    assert all(words[a, "one-sided"] == "harms" for a in ("lr 1e-05", "lr 3e-05", "base", "lr 0.0003")) and words["lr 1e-06", "one-sided"] == "nothing"
    every = [effect_word(v) for k, v in regions(read_table(ROOT / "docs/results/study.jsonl.gz")).items() if k[1] == "one-sided"]
    assert (len(every), every.count("harms"), every.count("helps")) == (23, 18, 0)
    rows = read_table(ROOT / "docs/results/study.jsonl.gz")
    more = lambda arm, cell: difference(rows, arm, (cell, "vanilla"))
    whole = lambda x: round(100 * x.mean)
    assert [whole(gain("K = 10", c)) for c in ("exact", "centred")] == [18, 19] and [whole(more("K = 10", c)) for c in ("exact", "centred")] == [17, 18]
    assert min(more("K = 10", c).low for c in ("exact", "centred")) > 0 > gain("K = 10", "vanilla").low and len(pick(rows, "K = 10", "vanilla")) == 8
    assert max(answers(r).mean() for r in pick(rows, "PPO clip 0.2", "vanilla").values()) < .2
    assert max(answers(r).mean() for r in pick(rows, "PPO clip off", "exact").values()) < .25
    assert gain("PPO clip 0.2", "exact").low > 0 and whole(gain("PPO clip 0.2", "exact")) == 16
    assert [whole(more("PPO clip 0.02", c)) for c in ("exact", "centred")] == [24, 21] and min(more("PPO clip 0.02", c).low for c in ("exact", "centred")) > 0
    assert difference(rows, "PPO clip 0.2", ("exact", "latent-start"), "sampled").low < 0
    from latent_grpo.stability import late_collapses
    ends = {c: [answers(r).mean() for r in pick(rows, "long", c).values()] for c in ("vanilla", "exact", "centred")}
    assert sum(v < .3 for v in ends["vanilla"]) == 4 and len(ends["vanilla"]) == 5 and .925 < min(ends["exact"] + ends["centred"])
    assert late_collapses(rows, "long, one change") == {"vanilla": (4, 5), "masked": (4, 5), "mean removed": (0, 5)}
    assert whole(difference(rows, "K = 10, one change", ("mean removed", "vanilla"))) == 16
    assert whole(difference(rows, "PPO clip 0.02, one change", ("mean removed", "vanilla"))) == 31
    for arm in ("long, lr 3e-05", "long, small rate"):
        assert late_collapses(rows, arm) == {"vanilla": (0, 5), "paper": (5, 5), "exact": (0, 5), "centred": (0, 5)}
        assert all(29 < 100 * gain(arm, c).mean < 33.5 for c in ("vanilla", "exact", "centred"))
    assert [whole(gain(r, "paper")) for r in ("r = 2", "r = 4")] == [-17, -4] and max(gain(r, "paper").high for r in ("r = 2", "r = 4")) < 0
    assert all(more(r, "exact").high < .02 for r in ("r = 2", "r = 3", "r = 4")) and all(more(r, "centred").high < .02 for r in ("r = 3", "r = 4"))
    assert [round(1000 * gain(r, "centred").mean) for r in ("r = 3", "r = 4")] == [17, 16]
    assert difference(rows, "toy", ("paper", "latent-start"), "best").low > 0
    slow = [gain("K = 10, lr 3e-05", c) for c in ("vanilla", "exact", "centred")]
    assert all(x.low > 0 and 4 < 100 * x.mean < 6.5 for x in slow)
    released = [gain(f"grid, {toy}", "published, two-sided, released, paper, off") for toy in ("peaked", "modulus 13")]
    assert [whole(x) for x in released] == [-25, -17] and max(x.high for x in released) < 0
    assert sorted(answers(r).mean() < .01 for r in pick(rows, "grid, peaked", "published, two-sided, none, paper, off").values()) == [0, 0, 0, 1]
    curves = [[v for v in r["curve"]["validation"] if v is not None] for r in pick(rows, "PPO clip 0.02", "vanilla").values()]
    assert np.mean([c[1] for c in curves]) > .8 > .62 > np.mean([c[-1] for c in curves])


def test_what_protocol_and_findings_say_of_lengths_and_leaks_was_measured():
    from test_skeleton import ROOT
    starts = json.loads((ROOT / "docs/results/lengths.json").read_text("utf-8"))["starts"].values()
    assert sum(n for s in starts for steps, n in s["steps"].items() if steps not in ("12", "15")) == 1
    assert [round(100 * f(s["mixed_groups"] for s in starts)) for f in (min, max)] == [5, 13]
    rows = read_table(ROOT / "docs/results/study.jsonl.gz")
    leak = lambda arm, cell: np.mean([r["at_start"]["leak"] for r in pick(rows, arm, cell).values()])
    assert (round(leak("top_k 2", "vanilla"), 2), round(leak("K = 10", "vanilla"), 2)) == (.15, .40)
    assert max(leak("K = 10", c) for c in ("exact", "centred")) < .06


def test_the_record_follows_from_the_table():
    import importlib.util
    from test_skeleton import ROOT
    spec = importlib.util.spec_from_file_location("summary", ROOT / "docs/verdicts.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = read_table(ROOT / "docs/results/study.jsonl.gz")
    record = json.loads((ROOT / "docs/results/study.json").read_text("utf-8"))
    assert json.loads(json.dumps(script.summary(rows))) == record
    assert all(r["made"]["commit"] and "dirty" not in r["made"]["commit"] for r in rows)
    assert len({tuple(r[k] for k in ("study", "arm", "cell", "seed")) for r in rows}) == len(rows)
    starts = {}
    for r in rows:
        if r["method"] not in ("explicit", "latent-start", "explicit-start"):
            key = r["study"], r["arm"], r["seed"], r["settings"].get("latent_sft")
            starts.setdefault(key, set()).add(r.get("start"))
    assert not {k for k, v in starts.items() if len(v) > 1 and k[0] != "search"}      # one start for all cells


def test_a_run_is_dirty_by_its_code_not_by_its_results(tmp_path, monkeypatch):
    git = lambda *a: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True)
    code, table = tmp_path / "latent_grpo/__init__.py", tmp_path / "docs/table"
    for file in (code, table): file.parent.mkdir(), file.write_text("x = 1\n")
    git("init", "-q"), git("add", "-A"), git("commit", "-qm", "one")
    monkeypatch.setattr("latent_grpo.__file__", str(code))
    clean = provenance([0])["commit"]
    table.write_text("a result")
    assert provenance([0])["commit"] == clean and "dirty" not in clean
    code.write_text("x = 2\n")
    assert provenance([0])["commit"] == f"{clean}-dirty"
