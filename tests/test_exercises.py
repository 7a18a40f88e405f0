"""Exercises: their form, and the answers that test_notebooks.py puts to their checks."""
import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXEMPT = {18, 19, 20, 21, 25, 31, 32}     # pages on infrastructure, guides
LESSONS = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if int(p.name[:2]) not in EXEMPT]
HEAD = re.compile(r"^\*\*(\d+)\. \((easy|medium|hard), (\d+) minutes\)\*\* \S", re.M)
FOLDED = re.compile(r"<details><summary>Answer</summary>\n\n(.*?)\n</details>", re.S)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)

# Plausible mistakes, one a check, as expressions in the page: each must be refused.
WRONG = {
    "01_tasks": ["lambda rows: 1 / len({r['answer'] for r in rows})", "3.34 * 6 / 4",
                 "lambda cot, modulus: True"],
    "02_grading": ["'15'", "' '.join(map(str, range(21)))", "'12.0'"],
    "03_model": [".5", "lambda table, w: float((table[0] - table[1]).abs().sum() * w * (1 - w))", "1"],
    "04_latent": ["(.75, .25)", "lambda i, w, j, v: (i + j, [x / 2 for x in w + v])"],
    "05_sampling": [".049", "lambda sigma: 1 - math.exp(-sigma)", "lambda p, i, j: float(p[i] * p[j])"],
    "06_rollout": ["lambda r: r.response_mask.all(1)",
                   "lambda s, r, i, t: lm.head(s[i, t - 1]).log_softmax(-1)[r.ids[i, t, 0]].item()"],
    "07_sft": ["lambda weights: torch.special.entr(weights).sum(-1).mean().item()", "5 / 12",
               "lambda sigma: .45 * sigma"],
    "08_grpo": ["lambda G, n: ((G / n - 1)**.5, -(n / (G - n))**.5)", "lambda G: 1.",
                "{'token-mean': 1., 'seq-mean-token-mean': 1., 'seq-mean-token-sum': 4.}"],
    "17_evaluate": ["lambda a, b: wilson_interval(int(b.sum()), 100).low > "
                    "wilson_interval(int(a.sum()), 100).high", "3",
                    "lambda p, k: (1 - (1 - p)**k, 1 - (1 - p)**k)"],
    "10_manifold": ["(lambda s: 3 * s, .513)", "True", "lambda p, a, b: math.log(1 / p) / (b - a)"],
    "11_misalignment": [".5", "(lambda c: math.exp(-c), 1.53)"],
    "12_closure": ["lambda h: h / 2", "(lambda s1, s2: s1 * s2, 0)",
                   "lambda q, logps: (logps.exp() * logps).sum() - (logps.exp() * q.log()).sum()"],
    "13_masking": ["{'off': (.5, -1.5), 'paper': (.5, 0.), 'released': (.5, 0.)}",
                   "lambda ended, right: right > 0", "0."],
    "14_noise": ["1.", "lambda sigma: 1.5 * sigma"],
    "15_selection": ["-2.82", "1.5"],
    "16_zero_mean": ["lambda sigma: 0.", "lambda R, mu: (R[:, None] * mu).sum(0)", "1."],
    "22_compare": ["lambda d: sum(d) > 0", "lambda none, a, b, both: both - none"],
    "23_released": ["10", "lambda p, kept, word: math.log(p[word])",
                    "lambda A, liking, valid: A * valid * first_step_mask((A * valid)[None], "
                    "(A > 0)[None], liking[None], 'released')[0]"],
    "26_data": ["lambda p, c, n: p", "lambda text: re.sub(r'\\d', '', text)",
                "lambda rows: str(sum(int(digest([r]), 16) for r in set(map(tuple, rows))))"],
    "27_labels": ["lambda q, n, t, r: (q + n + n // r, q + n + n // r + t)",
                  "lambda n, r: n * (n - 1) // 2"],
    "28_distributed": ["lambda s, n: (4 + 12 * s + 4) / n", "lambda a, b: (sum(a + b), sum(a) + sum(b))"],
    "30_wordproblems": ["lambda n: (len(str(n)), len(str(n)))", "lambda h: 2 * h * (1 - h)", "(1., 5.)"],
    "34_peers": ["[.4, .4, .4, -.6, -.6]", "lambda logp, K: logp", "lambda K, C, sigma: K / sigma**2"],
    "37_evidence": ["(0, 10)", "lambda points, limit: forecast(points, .5)['area']"],
    "38_regions": ["11", "lambda words: (words[0], words.count(words[0]))"],
    "39_stability": ["lambda m, share: m", "lambda rows, arm, cell: 0."],
    "24_explore": [".9", "('11000000', '11000000')", "lambda own: own / 2"],
}

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


@dataclass
class Exercise:
    """One exercise of a page: its text, answer included, and its code cells."""
    number: int
    minutes: int
    text: str
    code: list

    @property
    def checked(self): return any(f"def check_{self.number}(" in c for c in self.code)

    @property
    def answer(self):
        """The code in the folded answer; None when it is in words only."""
        folded = FOLDED.search(self.text)
        fence = folded and FENCE.search(folded[1])
        return fence and fence[1]


def exercises(path):
    """The exercises of a notebook: what stands between the heading and the summary."""
    found, inside = [], False
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if found and inside: found[-1].code.append(source)
            continue
        heading = re.search(r"^## Exercises$", source, re.M)
        if heading: inside, source = True, source[heading.end():]
        if not inside: continue
        source, end, _ = source.partition("## Summary")
        heads = list(HEAD.finditer(source))
        if found: found[-1].text += source[:heads[0].start() if heads else None]
        for head, following in zip(heads, [*heads[1:], None]):
            text = source[head.start():following and following.start()]
            found.append(Exercise(int(head[1]), int(head[3]), text, []))
        if end: break
    return found


def put_to_the_check(path):
    """Cells for the end of a notebook: each folded answer, and what its check says of it."""
    for e in exercises(path):
        if not (e.checked and e.answer): continue
        mistakes = ["object()", *WRONG.get(path.stem, [])[e.number - 1:e.number]]
        yield e.answer
        yield (f"assert check_{e.number}(None) == 'no answer yet'\n"
               f"assert check_{e.number}(answer_{e.number}) == 'right'")
        for mistake in mistakes:
            yield (f"try: said = check_{e.number}({mistake})\nexcept Exception as e: said = repr(e)\n"
                   f"assert said != 'right', {'accepted: ' + mistake!r}")


@each_lesson
def test_form(path):
    """Two to four exercises, numbered, each with minutes and a folded answer, two with a check."""
    found = exercises(path)
    assert [e.number for e in found] == list(range(1, len(found) + 1)) and 2 <= len(found) <= 4
    for e in found:
        assert 1 <= e.minutes <= 60, e.number
        assert len(FOLDED.findall(e.text)) == 1, f"exercise {e.number} has no folded answer"
    assert sum(e.checked for e in found) >= 2


@each_lesson
def test_checks(path):
    """A cell to write in that ends in the check, and an answer in code for it."""
    for e in exercises(path):
        if not e.checked:
            assert not e.answer or f"answer_{e.number}" not in e.answer, "an answer without a check"
            continue
        (cell,) = [c for c in e.code if f"def check_{e.number}(" in c]
        body = ast.parse(cell).body
        assert ast.unparse(body[0]) == f"answer_{e.number} = None"
        assert ast.unparse(body[-1]) == f"check_{e.number}(answer_{e.number})"
        check = next(n for n in body if isinstance(n, ast.FunctionDef))
        assert any(isinstance(n, ast.Assert) and n.msg for n in ast.walk(check)), "no hint"
        assert check.end_lineno - check.lineno < 16 and ast.get_docstring(check)
        assert max(map(len, cell.splitlines())) <= 100
        assert e.answer, f"the folded answer {e.number} has no code"
        sets = ast.walk(ast.parse(e.answer))
        assert f"answer_{e.number}" in {getattr(n, "name", getattr(n, "id", "")) for n in sets}


def test_the_parser_sees_what_is_wrong(tmp_path):
    page = lambda *cells: (tmp_path / "n.ipynb").write_text(json.dumps(
        dict(cells=[dict(cell_type=kind, source=source) for kind, source in cells])))
    task = "**{}. (easy, 5 minutes)** How many?\n"
    folded = "<details><summary>Answer</summary>\n\nTwo.\n\n```python\nanswer_1 = 2\n```\n\n</details>\n"
    code = "answer_1 = None\n\ndef check_1(answer): return 'right'\n\ncheck_1(answer_1)"
    page(("markdown", "text\n\n## Exercises"), ("markdown", task.format(1)), ("code", code),
         ("markdown", folded + "\n" + task.format(2)), ("markdown", "## Summary\n" + task.format(3)))
    one, two = exercises(tmp_path / "n.ipynb")
    assert (one.number, one.minutes, one.checked, one.answer) == (1, 5, True, "answer_1 = 2\n")
    assert two.number == 2 and not two.checked and two.answer is None
    for wrong in ("2. *(easy, 5 minutes)* How many?", "**2. (soon)** How many?"):
        page(("markdown", "## Exercises\n\n" + wrong))
        assert not exercises(tmp_path / "n.ipynb")
