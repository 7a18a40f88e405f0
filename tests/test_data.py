"""Generated chains are right and their splits apart; real files, when there are any, load."""
import os
import re
from pathlib import Path

import pytest

from latent_grpo.grading import as_number, check_gold, is_correct
from latent_grpo.tasks import chain_rows, chain_task, load_rows, split_of

SIZES = dict(train=600, validation=80, test=80)
STEP = re.compile(r"let : (\w) (\d+) and \1 ([-+*]) (\d+) so = \1 (\d+) ?")


@pytest.fixture(scope="module", params=[7, 97])
def chains(request): return request.param, chain_task(SIZES, request.param)


# --- generated chains ---

def test_splits_are_disjoint_and_of_the_size_asked_for(chains):
    _, task = chains
    problems = {s: {r["problem"] for r in rows} for s, rows in task.rows.items()}
    assert {s: len(p) for s, p in problems.items()} == SIZES    # distinct within, too
    assert not (problems["train"] & problems["validation"] or problems["train"] & problems["test"]
                or problems["validation"] & problems["test"])


def test_the_split_of_a_problem_does_not_depend_on_the_seed():
    """The same problem can come up with another seed; it must not change sides."""
    small = dict(modulus=3, slots=2, steps=(1, 2))
    a = chain_rows(dict(train=300, test=30), seed=0, **small)
    b = chain_rows(dict(train=300, test=30), seed=1, **small)
    train, test = ({r["problem"] for r in x} for x in (a["train"], b["test"]))
    both = {r["problem"] for r in a["test"]} & {r["problem"] for r in b["test"]}
    assert both and not train & test
    assert all(split_of(r["problem"]) == s for s, rows in b.items() for r in rows)


def definitions(problem):
    """The definitions of a problem and its question, read back from the text."""
    text, query = problem.split(" ? ")
    words = text.split()
    return {words[i]: words[i + 1:i + 4] for i in range(0, len(words), 4)}, query


def solve(defs, name, modulus):
    """The value of a name by recursion: independent of the order of the chain."""
    if name.isdigit(): return int(name)
    a, op, b = defs[name]
    x, y = solve(defs, a, modulus), solve(defs, b, modulus)
    return {"+": x + y, "-": x - y, "*": x * y}[op] % modulus


def test_answers_and_every_step_of_the_chains_are_true(chains):
    modulus, task = chains
    for row in task.rows["train"][:200]:
        defs, query = definitions(row["problem"])
        assert int(row["answer"]) == solve(defs, query, modulus)
        steps = STEP.findall(row["cot"])
        assert STEP.sub("", row["cot"]) == "" and 3 <= len(steps) <= 4
        known = {}
        for name, left, op, right, result in steps:
            a, op_there, b = defs[name]
            assert op == op_there and int(result) == solve(defs, name, modulus)
            for word, value in ((a, left), (b, right)):    # operands are known before they are used
                assert known.get(word, word) == value
            known[name] = result
        assert steps[-1][0] == query and steps[0][0] in row["first_steps"]


def test_several_first_steps_are_common_and_all_of_them_right(chains):
    modulus, task = chains
    several = [r for r in task.rows["train"] if len(r["first_steps"]) > 1]
    assert 0.6 < len(several) / SIZES["train"] < 0.9
    assert {r["cot"].split()[2] == r["first_steps"][0] for r in several} == {True, False}
    for row in several:
        defs, _ = definitions(row["problem"])
        assert all(w.isdigit() for v in row["first_steps"] for w in defs[v][::2])


def test_rewards(chains):
    _, task = chains
    row = task.rows["test"][0]
    right = task.explicit_target(row)
    wrong = task.explicit_target(row | dict(answer="1" if row["answer"] != "1" else "2"))
    end = right.index(task.end_latent_ids[0])
    assert task.reward(row, right, True) == task.reward(row, right[end:], True) == 1.0
    assert task.reward(row, wrong, True) == 0.0
    assert task.reward(row, right, False) == 0.0                         # never ended
    assert task.reward(row, right[:end] + right[end + 1:], True) == 0.0  # never left the latents
    assert task.reward(row, right[:-1] + right[-2:], True) == 0.0        # says it twice
    assert task.reward(row, [*task.end_latent_ids, task.eos_id], True) == 0.0


def test_labels_keep_every_word_that_says_something(chains):
    _, task = chains
    for row in task.rows["test"]:
        labels, tail = task.latent_target(row)
        words = [i for ids, _ in labels for i in ids]
        said = [i for i in task.encode(row["cot"]) if i not in task.filler]
        assert set(words) == set(said) and task.decode(tail[1:-1]) == row["answer"]
        assert all(abs(sum(w) - 1) < 1e-6 and min(w) > 0 for _, w in labels)
        assert 3 * len(labels) < len(task.encode(row["cot"])) < 5 * len(labels)


def test_generated_rows_repeat_with_their_seed():
    a, b, c = (chain_rows(dict(train=20), seed=s) for s in (5, 5, 6))
    assert a == b != c


# --- real files ---

FOLDER = Path(os.environ.get("LATENT_GRPO_DATA")
              or Path(__file__).parent.parent.parent / "shared" / "data")

# file: rows, field whose true rows are left out, rows then left
REAL = {"gsm8k_eq_train": (7473, "in_aug_valid", 6973), "gsm8k_aug_test": (1319, "", 1319),
        "multiarith": (600, "", 600), "math500": (500, "", 500), "aime2024": (30, "", 30)}


def real(name, **kwargs):
    path = FOLDER / f"{name}.jsonl"
    if not path.exists(): pytest.skip(f"no {path.name}: set LATENT_GRPO_DATA to a folder with it")
    return load_rows(path, **kwargs)


@pytest.mark.parametrize("name", REAL)
def test_real_file_loads(name):
    total, drop, left = REAL[name]
    rows = real(name)
    assert len(rows) == total and len({r["id"] for r in rows}) == total
    kept = real(name, drop=drop)
    assert len(kept) == left and not any(r.get(drop) for r in kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_answers_can_be_graded(name):
    """Every gold answer parses, is equal to itself in a box, and not to another answer."""
    for row in real(name):
        gold = row["answer"]
        check_gold(gold, row["id"])
        assert is_correct(f"so it is \\boxed{{{gold}}}", gold, row["id"]), row["id"]
        assert not is_correct("it is \\boxed{123456789.5}", gold, row["id"]), row["id"]
        if as_number(gold) is not None and name != "math500":
            assert is_correct(f"first 99, then it is {gold}.", gold), row["id"]
            assert not is_correct(f"it is {gold}, no: {as_number(gold) + 1}", gold), row["id"]
