"""Sets by name: every loader on its real file where there is one, and on made rows everywhere."""
import json
import os
import re
import warnings
from pathlib import Path

import datasets
import pytest

from latent_grpo.cli import main
from latent_grpo.data import (NAMED, _equations, _once, _svamp, contamination, counts, data_record, describe,
                              digest, letters, load_named, load_source, marked, part_of, plain_number,
                              problem_rows, split_name, survey)
from latent_grpo.grading import as_number, check_gold
from latent_grpo.presets import build_task, make_config
from latent_grpo.tasks import FIELDS, load_rows

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("LATENT_GRPO_DATA") or ROOT.parent / "shared/data")
RECORD = json.loads((ROOT / "docs/results/data.json").read_text("utf-8"))
PARTS = [(name, split) for name, named in NAMED.items() for split in named.parts]
each_part = pytest.mark.parametrize("name, split", PARTS, ids=map("@".join, PARTS))


def lines(path, *rows):
    """A JSONL file of some rows."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def row(problem, answer="1", **more): return dict(problem=problem, answer=answer) | more


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of files; nothing can be fetched."""
    def offline(*args, **kwargs): raise ConnectionError("no network in a test")
    monkeypatch.setenv("LATENT_GRPO_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", offline)
    return tmp_path


@pytest.fixture
def real(monkeypatch):
    """The folder of real files, or no test."""
    if not FOLDER.is_dir(): pytest.skip("set LATENT_GRPO_DATA to a folder with the real files")
    monkeypatch.setenv("LATENT_GRPO_DATA", str(FOLDER))
    return lambda stem: load_rows(next(FOLDER.glob(f"{stem}.jsonl*"), FOLDER / f"{stem}.jsonl"))


# --- the real files ---

@each_part
def test_the_real_file_loads_and_is_the_one_of_the_record(name, split, real):
    """The customary number of rows, unique ids, answers that can be graded, the committed hash."""
    part = NAMED[name].parts[split]
    if not (FOLDER / part.file).exists(): pytest.skip(f"no {part.file}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # another number of rows than by custom is a warning
        rows = load_named(name, split)
    assert len(rows) == (part.rows or len(rows)) and len({r["id"] for r in rows}) == len(rows)
    assert all(type(r[f]) is str and r[f].strip() for r in rows for f in FIELDS)
    for r in rows[:300]:                    # of formulas, test_data.py checks every one
        if as_number(r["answer"]) is not None: check_gold(r["answer"], r["id"])
    if noted := RECORD["sets"].get(f"{name}@{split}"):
        assert (noted["rows"], noted["sha256"]) == (len(rows), digest(rows))


def test_the_parts_of_a_set_are_apart_or_whole(real):
    for name, *halves, whole in (("svamp", "train700", "test300", "all"),
                                 ("multiarith", "train420", "test180", "all")):
        a, b, c = ({r["id"] for r in load_named(name, s)} for s in (*halves, whole))
        assert a | b == c and not a & b
    left = {r["id"] for r in load_named("multiarith", "test180")} - {
        r["id"] for r in load_named("multiarith", "test174")}
    assert len(left) == 6


def test_the_files_follow_from_their_raw_fields(real):
    """So would the rows of the hub: the same conversions make them of the same columns."""
    for r in real("svamp"):
        raw = dict(Body=r["body"], Question=r["question"], Equation=r["equation"],
                   Answer=f"{r['answer']}.0", ID=r["id"].removeprefix("svamp-"))
        assert _svamp(raw).items() <= r.items()
    for r in real("asdiv"): assert marked(r["formula"], r["answer"]) == r["cot"]
    for r in real("multiarith"): assert marked(r["equation"], r["answer"]) == r["cot"]
    for r in real("gsm_hard"): assert plain_number(r["target_raw"]) == r["answer"]
    for r, wanted in zip(real("gsm8k_train"), real("gsm8k_eq_train"), strict=True):
        raw = dict(question=r["problem"], answer=f"{r['cot']}\n#### {r['answer']}")
        made = _equations(raw)
        assert (made["cot"] or None, made["answer"]) == (wanted["cot"], wanted["answer"])


def test_clean_dapo_is_what_its_marks_say(real):
    marks = [r for r in load_named("dapo-math-17k", "en") if not (r["repeat"] or r["conflict"])]
    assert [r["id"] for r in load_named("dapo-math-17k", "en-clean")] == [r["id"] for r in marks]


TESTS = ("gsm8k_test gsm8k_aug_valid gsm8k_aug_test gsm_hard svamp multiarith math500 aime2024 "
         "aime2025").split()


@pytest.mark.parametrize("train", ["asdiv", "mawps", *(pytest.param(t, marks=pytest.mark.slow) for t in (
    "paramawps", "gsm8k_train", "gsm8k_icot_train", "math_train", "dapo_math_17k"))])
def test_contamination_agrees_with_an_independent_count(train, real):
    if not (FOLDER / "contamination.json").exists(): pytest.skip("no contamination.json")
    wanted = json.loads((FOLDER / "contamination.json").read_text())[train]
    tests = {t: real(t) for t in TESTS}
    found = contamination(real(train), tests)
    for ours, theirs in dict(exact="exact", near="near_same_answer_test_rows",
                             conflicts="same_text_different_answer").items():
        assert {t: len(found[t][ours]) for t in TESTS} == wanted[theirs], ours
    texts = {t: {r["id"]: letters(r["problem"]) for r in rows} for t, rows in tests.items()}
    hit = {t: {texts[t][x.split(" ~ ")[0]] for x in found[t]["hit"]} for t in TESTS}
    assert {t: len(x) for t, x in hit.items()} == wanted["exact_test_rows_hit"]    # a text counts once


def test_known_defects_are_found(real):
    found = describe(load_named("gsm-hard"))["defects"] + describe(load_named("svamp", "all"))["defects"]
    assert [x.split(":")[0] for x in found] == ["gsm_hard-554", "svamp-chal-680"]


# --- the hub, played by made rows ---

GSM8K = dict(question="Q ?", answer="It is <<3+4=7>>7 and <<7*2=14>>14.\n#### 1,014")
PLAIN = dict(problem="P ?", solution="S", answer="\\frac12", other=1)
VERL = dict(prompt=[dict(role="user", content="Please ... P ?")], extra_info=dict(question="P ?"),
            reward_model=dict(ground_truth="7"))
DAPO = ("Solve the following math problem step by step. The last line ...\n\nFind x.\n\nIt is odd."
        '\n\nRemember to put your answer on its own line after "Answer:".')
RAW = {   # of the hub -> problem, answer, chain
    "gsm8k@train": (GSM8K, "Q ?", "1014", "It is <<3+4=7>>7 and <<7*2=14>>14."),
    "gsm8k@train-eq": (GSM8K, "Q ?", "1014", "<<3+4=7>> <<7*2=14>>"),
    "gsm8k-aug@valid": (dict(question="Q ?", steps=["<<1+1=2>>", "<<2*2=4>>"], answer="4"),
                        "Q ?", "4", "<<1+1=2>> <<2*2=4>>"),
    "gsm-hard": (dict(input="Q ?", code="...", target=-1234567.0), "Q ?", "-1234567", None),
    "svamp@test300": (dict(ID="chal-9", Body="A  has 6.", Question="B ?", Equation="( 6.0 / 4.0 )",
                           Answer="1.5"), "A has 6. B ?", "1.5", "<<6/4=1.5>>"),
    "multiarith@test180": (dict(question=" Q ? ", final_ans="8"), "Q ?", "8", None),
    "asdiv@all": (dict(body="B.", question="Q ?", answer="9 (red apples)", formula="7+2=9"),
                  "B. Q ?", "9", "<<7+2=9>>"),
    "math-500": (PLAIN, "P ?", "\\frac12", "S"), "aime24": (PLAIN, "P ?", "\\frac12", "S"),
    "aime25": (PLAIN, "P ?", "\\frac12", None), "openr1-math": (PLAIN, "P ?", "\\frac12", "S"),
    "dapo-math-17k@en": (dict(prompt=DAPO, solution="7"), "Find x.\n\nIt is odd.", "7", None),
    "latent-grpo-data@math-500": (VERL, "P ?", "7", None),
    "latent-reasoning-data@svamp": (PLAIN, "P ?", "\\frac12", None),
    "latent-reasoning-data@openr1-train": (
        dict(problem="P ?", cot="C", cot_answer="So it is \\boxed{3}."), "P ?", "3", "C")}


@pytest.fixture
def hub(folder, monkeypatch):
    """A function that puts rows on a made hub; it keeps what is asked for."""
    asked = []
    def put(*rows):
        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return datasets.Dataset.from_list(list(rows))
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked
    return put


@pytest.mark.parametrize("source", RAW)
@pytest.mark.filterwarnings("ignore:.*by custom")
def test_rows_of_the_hub_become_ours(source, hub):
    raw, problem, answer, cot = RAW[source]
    asked = hub(raw)
    rows = load_source(source)
    assert [(r["problem"], r["answer"], r["cot"]) for r in rows] == [(problem, answer, cot)]
    named, part = part_of(*source.split("@"))
    assert asked == [((named.hub,), dict(split=part.hub, name=named.config, revision=named.revision,
                                         data_files=part.data_files))]


def test_every_set_that_a_hub_holds_is_tried_on_made_rows():
    held = {name for name, named in NAMED.items() if any(p.hub for p in named.parts.values())}
    assert {s.partition("@")[0] for s in RAW} | {"gpqa"} == held


GPQA = {"Question": "Which made-up answer is right?", "Correct Answer": "this one"} | {
    f"Incorrect Answer {i}": f"not this, {i}" for i in (1, 2, 3)}


def test_gpqa_letters_are_shuffled_by_the_question_alone(hub):
    questions = [GPQA | {"Question": f"Question {i}?"} for i in range(60)]
    hub(*questions)
    with pytest.warns(UserWarning, match="gpqa.*60 rows, 198 by custom"): rows = load_named("gpqa")
    for r, raw in zip(rows, questions):
        options = dict(line.split(". ", 1) for line in r["problem"].splitlines()[2:])
        assert r["problem"].startswith(raw["Question"] + "\n\nA. ") and list(options) == list("ABCD")
        assert options[r["answer"]] == "this one" and len(set(options.values())) == 4
    assert {r["answer"] for r in rows} == set("ABCD")
    hub(*questions[30:])
    with pytest.warns(UserWarning): assert [r["problem"] for r in load_named("gpqa")] == [
        r["problem"] for r in rows[30:]]


def test_gpqa_says_how_to_get_access(folder, monkeypatch):
    def gated(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated.")
    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(PermissionError, match="Idavidrein/gpqa is gated: accept.*hf auth login"):
        load_named("gpqa")


def test_a_renamed_column_is_named(hub):
    hub(dict(question="Q ?", final="8"))
    with pytest.raises(ValueError, match=r"row 0: no field 'final_ans'; fields found: \['final', 'que"):
        load_source("multiarith@test180")


def test_several_numbers_are_no_answer_of_asdiv(hub):
    hub(RAW["asdiv@all"][0], RAW["asdiv@all"][0] | dict(answer="3 (cats); 4 (dogs)"))
    with pytest.warns(UserWarning, match="1 rows, 2084"): assert len(load_source("asdiv@all")) == 1


# --- names ---

def test_names_that_are_not_known():
    for source, said in {"swamp@test300": "unknown set 'swamp'; did you mean 'svamp'?",
                         "what": "known: gsm8k, .* owner/name", "svamp": "one of its parts: svamp@tr",
                         "svamp@test": "svamp@test: name one of its parts: svamp@train700"}.items():
        with pytest.raises(ValueError, match=said.replace("?", r"\?")): load_source(source)


def test_a_file_that_is_nowhere(folder):
    with pytest.raises(ValueError, match="no mawps.jsonl in .*LATENT_GRPO_DATA; these rows.*LYH-YF/MWP"):
        load_named("mawps", "clean")
    with pytest.raises(OSError, match="no svamp.jsonl .*; ChilleD/SVAMP: no network in a test"):
        load_named("svamp", "all")
    os.environ["LATENT_GRPO_DATA"] = str(folder / "nowhere")      # the fixture puts it back
    with pytest.raises(FileNotFoundError, match="LATENT_GRPO_DATA=.*nowhere: no such folder"):
        load_named("svamp", "all")


def test_a_hub_dataset_and_a_file_are_still_sources(hub, tmp_path):
    asked = hub(dict(q="Q ?", answer="2"))
    assert load_source("some/set@test", "problem=q")[0]["problem"] == "Q ?"
    assert asked[0] == (("some/set",), dict(split="test"))
    assert load_source(str(lines(tmp_path / "x.jsonl", row("A"), row("B"))), limit=1)[0]["id"] == (
        "x.jsonl line 1")
    assert [split_name(s) for s in ("a/x.jsonl.gz", "a/b@c", "svamp@all", "gpqa")] == [
        "x", "b", "svamp@all", "gpqa"]


# --- files in the folder ---

def test_made_files_are_cut_into_their_parts(folder):
    lines(folder / "svamp.jsonl", *(row(f"p {i}", split=("train700", "test300")[i % 2]) for i in range(5)))
    lines(folder / "mawps.jsonl", row("a"), row("b", overlap=["multiarith"]))
    with pytest.warns(UserWarning, match="by custom: another copy"):
        assert [r["problem"] for r in load_source("svamp@test300")] == ["p 1", "p 3"]
        assert [r["problem"] for r in load_source("svamp@train700", limit=2)] == ["p 0", "p 2"]
        assert len(load_source("svamp@all")) == 5
        assert [r["problem"] for r in load_source("mawps@clean")] == ["a"]
    assert len(load_source("svamp@all", limit=3)) == 3        # a part of a part warns of nothing


def test_test174_leaves_out_what_stands_in_the_other_part(folder):
    lines(folder / "multiarith.jsonl", row("One pen?", split="train420"), row("ONE  pen", split="test180"),
          row("Two pens?", split="test180"))
    with pytest.warns(UserWarning):
        assert [r["problem"] for r in load_source("multiarith@test174")] == ["Two pens?"]


def test_once():
    rows = [row("A b", "1"), row("c", "2"), row("a B!", "1"), row("d", "3"), row("D", "4")]
    assert _once(rows) == rows[:2]         # a repeat goes, and both of a text with two answers


def test_raw_files_are_converted_too(folder):
    lines(folder / "gsm8k_test.jsonl", GSM8K)
    lines(folder / "GSM8k-Aug-train.jsonl", dict(problem="P ?", cot="C", cot_answer="It is 8."))
    with pytest.warns(UserWarning, match="by custom"):
        assert load_source("gsm8k@test")[0]["answer"] == "1014"
    assert load_source("latent-reasoning-data@gsm8k-aug-train")[0]["answer"] == "8"


def test_a_parquet_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_GRPO_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets.Dataset.from_list([VERL]).to_parquet(tmp_path / "Math-500-test.parquet")
    with pytest.warns(UserWarning, match="by custom"):
        assert load_source("latent-grpo-data@math-500")[0]["problem"] == "P ?"


def test_bad_rows_are_named(folder):
    lines(folder / "gsm_hard.jsonl", row("fine"), dict(input="Q ?", code=""))
    with pytest.raises(ValueError, match="gsm_hard.jsonl line 2: no field 'target'"): load_source("gsm-hard")
    lines(folder / "aime2025.jsonl", row("fine"), row(" "))
    with pytest.raises(ValueError, match="aime2025.jsonl line 2: field 'problem' is missing or empty"):
        load_source("aime25")


# --- numbers and equations ---

@pytest.mark.parametrize("equation, answer, wanted", [
    ("X=((8.0+16.0)/3.0)", "8", "<<(8+16)/3=8>>"), ("(1+2)*(3+4)", "21", "<<(1+2)*(3+4)=21>>"),
    ("8.0", "8", "<<8=8>>"), ("x = 8", "8", "x = 8"), ("1/0", "1", "1/0"), ("2**3=8", "8", "2**3=8"),
    ("9**9**9", "1", "9**9**9"), ("7//2", "3", "7//2"), ("print(3)", "3", "print(3)"),
    ("2(3)", "6", "2(3)"), ("1+", "1", "1+"), ("1.50*2=3", "3", "<<1.50*2=3>>")])
def test_marked(equation, answer, wanted): assert marked(equation, answer) == wanted


# --- what is in a file ---

def made(*pairs):
    return [dict(problem=p, answer=a, cot=None, id=str(i)) for i, (p, a) in enumerate(pairs)]


def test_describe_lists_what_is_wrong():
    rows = made(("One?", "1"), ("two", "2.5"), ("ONE", "1"), ("one", "-3"), ("three", "who knows this"))
    found = describe(rows)
    assert (found["repeats"], found["conflicts"]) == (["2 = 0", "3 = 0"], ["3 / 0"])
    assert found["unreadable"] == ["4"] and found["defects"] == []
    assert (found["rows"], found["numbers"], found["negative"], found["not_whole"], found["no_chain"]) == (
        5, 4, 1, 1, 5)


def test_the_hash_is_of_problem_answer_chain_and_order():
    a = made(("p", "1"), ("q", "2"))
    assert digest(a) == digest([dict(r, id="x", more=1) for r in a])
    other = [[dict(a[0], **{f: "z"}), a[1]] for f in ("problem", "answer", "cot")]
    assert len({digest(x) for x in (a, a[::-1], a[:1], *other)}) == 6


# --- contamination ---

WORDS = [f"w{i}" for i in range(15)]      # 8 windows of 8 words


@pytest.mark.parametrize("kept, near", [(15, 1), (11, 1), (10, 0), (7, 0)])
def test_half_of_the_windows_make_a_near_copy(kept, near):
    """11 of the 15 words in their order hold 4 of the 8 windows, 10 hold 3."""
    train = made((" ".join(WORDS[:kept] + ["other"] * (15 - kept)), "5"))
    found = contamination(train, dict(t=made((" ".join(WORDS), "5"))))["t"]
    assert len(found["near"]) == near and len(found["exact"]) == (kept == 15)
    assert not any(contamination([dict(train[0], answer="6")], dict(t=made(("other", "5"))))["t"].values())


def test_windows_must_stand_in_one_row():
    half = made((" ".join(WORDS[:10]), "5"), (" ".join(WORDS[5:]), "5"))
    assert contamination(half, dict(t=made((" ".join(WORDS), "5"))))["t"]["near"] == []


def test_exact_copies_conflicts_and_each_side_of_the_count():
    train = made(("A b!", "1"), ("a B", "1"), ("ab", "2"), ("c", "1"))
    tests = dict(one=made(("a b", "1")), two=made(("a b", "1"), ("A B", "1")), none=made(("d", "1")))
    found = counts(contamination(train, tests))
    assert found["one"] == dict(exact=2, conflicts=1, hit=1, near=0)
    assert found["two"]["hit"] == 2 and not any(found["none"].values())


# --- what a run does ---

def problems(tmp_path, **settings): return make_config("gsm8k-tiny", **dict(drop="") | settings)


def test_training_rows_of_several_sources(tmp_path, folder):
    lines(folder / "svamp.jsonl", *(row(f"s {i}", split="train700") for i in range(4)))
    file = lines(tmp_path / "own.jsonl", *(row(f"o {i}") for i in range(4)))
    cfg = problems(tmp_path, train=f"{file},svamp@train700")
    with pytest.warns(UserWarning, match="by custom"): splits = problem_rows(cfg)
    assert sorted(r["problem"] for r in splits["train"] + splits["validation"]) == sorted(
        f"{s} {i}" for s in "so" for i in range(4))
    noted = data_record(cfg, splits)
    assert {n["source"] for n in noted.values()} == {"own.jsonl,svamp@train700"}      # no folder
    with pytest.warns(UserWarning):
        limited = problem_rows(problems(tmp_path, train=f"{file},svamp@train700", limit=3))
    assert sum(map(len, limited.values())) == 3


def test_near_copies_stay_and_are_counted(tmp_path):
    text = " ".join(WORDS)
    train = lines(tmp_path / "a.jsonl", row(text, "5"), row(text[:-1] + "x", "5"), row("o", "1"))
    test = lines(tmp_path / "b.jsonl", row(text.upper(), "5"))
    cfg = problems(tmp_path, train=str(train), tests=str(test))
    with pytest.warns(UserWarning) as said: splits = problem_rows(cfg)
    assert [str(w.message)[:46] for w in said] == ["1 training problems also stand in b and are le",
                                                   "1 problems of b have a near copy in training, "]
    assert len(splits["train"] + splits["validation"]) == 2


def test_generated_rows_are_hashed_too():
    cfg = make_config("toy", train_rows=20, test_rows=4)
    task, _ = build_task(cfg)
    noted = data_record(cfg, task.rows)
    assert {s: (n["source"], n["rows"]) for s, n in noted.items()} == {
        "train": ("chains", 20), "validation": ("chains", 4), "test": ("chains", 4)}
    assert noted["test"]["sha256"] == digest(task.rows["test"])
    other, _ = build_task(make_config("toy", train_rows=20, test_rows=4, modulus=5))
    assert data_record(cfg, other.rows)["test"]["sha256"] != noted["test"]["sha256"]


# --- the command ---

def test_the_command_lists_the_sets(folder, capsys):
    lines(folder / "gsm_hard.jsonl", row("p"))
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{said}" for name in NAMED)
    assert "test (1319)*\n" in said and "train700 (700)," in said


def test_the_command_reports_and_keeps_counts(tmp_path, capsys):
    text = " ".join(WORDS)
    train = lines(tmp_path / "a.jsonl", *(row(text, "5", id=f"a{i}") for i in range(8)), row("z", "so so what"))
    test = lines(tmp_path / "b.jsonl", row(text, "5", id="b0"))
    out = tmp_path / "counts.json"
    assert main(["data", str(train), "--test", str(test), "--ids", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "repeats 7: a1 = a0, a2 = a0 ..." in said and "unreadable 1: a.jsonl line 9" in said
    assert "exact 8: a0 ~ b0, a1 ~ b0 ...\n  hit 1: b0 ~ a7\n  near 1: b0 ~ a7" in said
    kept = json.loads(out.read_text())
    assert {"command", "commit", "hardware", "date"} < kept.keys() and text not in out.read_text()
    assert kept["sets"][str(train)] | dict(sha256="") == counts(survey([str(train)])["sets"][str(train)]) | dict(
        sha256="")
    assert kept["contamination"][str(train)][str(test)] == dict(exact=8, conflicts=0, hit=1, near=1)
    assert main(["data", str(test), "--test", str(lines(tmp_path / "c.jsonl", row("y")))]) == 0
    assert "b.jsonl: no overlap found with" in capsys.readouterr().out


def test_mistakes_of_the_command_end_in_a_sentence(folder, capsys):
    for argv, said in {("data", "swamp@all"): "did you mean 'svamp'", ("data", "gpqa"): "no network",
                       ("data", "no.jsonl"): "no such problem file"}.items():
        assert main(list(argv)) == 2
        assert said in capsys.readouterr().err


def test_the_record_holds_counts_only():
    numbers = [x for d in RECORD["sets"].values() for x in d.values()]
    numbers += [x for t in RECORD["contamination"].values() for d in t.values() for x in d.values()]
    assert all(type(x) is int or len(x) == 64 and set(x) <= set("0123456789abcdef") for x in numbers)
    assert letters("A-b 1!") == "ab1"


# --- docs/data.md ---

BLOCK = re.search(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text("utf-8"), re.S)[1]


def test_the_files_of_the_page_are_those_of_the_register():
    page = (ROOT / "docs/data.md").read_text("utf-8")
    files = set(re.findall(r"`(\w+\.jsonl(?:\.gz)?)`", page))
    parts = {f"{n}@{s}": p.file for n, x in NAMED.items() for s, p in x.parts.items()}
    assert files == {parts[s] for s in RECORD["sets"]} | {parts["gsm8k@train-eq"]}


def test_the_mawps_block_on_made_rows(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines(folder / "multiarith.jsonl", row("How many ?", "5", split="train420"))
    source = [("How  many?", "X=(2.0+3.0)", 5.0), ("Cost?", "y=2*3", "6"), ("z?", "4*(x-1)=8", "3")]
    (folder / "mawps_source.json").write_text(json.dumps([
        dict(sQuestion=q, lEquations=[e], lSolutions=[a]) for q, e, a in source]))
    with pytest.warns(UserWarning, match="by custom"): exec(BLOCK, {})
    with pytest.warns(UserWarning, match="by custom"): rows = load_source("mawps@all")
    assert [(r["problem"], r["answer"], r["cot"], "overlap" in r) for r in rows] == [
        ("How many?", "5", "<<2+3=5>>", True), ("Cost?", "6", "y=2*3", False), ("z?", "3", "4*(x-1)=8", False)]


def test_the_mawps_block_makes_the_file_of_the_record(tmp_path, real, monkeypatch):
    source = [dict(sQuestion=r["problem"], lEquations=[r["equation"]], lSolutions=[f"{r['answer']}"])
              for r in real("mawps")]
    lines(tmp_path / "multiarith.jsonl", *real("multiarith"))
    monkeypatch.setenv("LATENT_GRPO_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mawps_source.json").write_text(json.dumps(source))
    exec(BLOCK, {})
    for part in ("mawps@all", "mawps@clean"):
        assert digest(load_source(part)) == RECORD["sets"][part]["sha256"]
