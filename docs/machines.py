"""The same runs of the toy on two machines: `python docs/machines.py TABLE` compares an older copy of study.jsonl.gz with
docs/results/study.jsonl.gz and writes docs/results/machines.json. The older copy: `git show 7a4b085:docs/results/study.jsonl.gz`."""
import json
import sys
from pathlib import Path

import numpy as np

from latent_grpo.runs import provenance
from latent_grpo.study import answers, read_table
from latent_grpo.verdicts import verdicts

RESULTS = Path(__file__).parent / "results"


def twice(older, newer):
    """Differences in points of noise-free Pass@1, newer less older, of every method and seed that were trained twice."""
    key = lambda r: (r["cell"], r["seed"])
    before = {key(r): r for r in older if r["study"] == "toy"}
    found = {}
    for r in sorted((r for r in newer if r["study"] == "toy"), key=key):
        was = before.get(key(r))
        if was and was["made"]["commit"] != r["made"]["commit"]:
            found.setdefault(r["cell"], {})[r["seed"]] = round(100 * float(answers(r).mean() - answers(was).mean()), 2)
    return found


def changed(older, newer):
    """Verdicts on the toy that come out differently, over the runs that both tables have: claim -> [older, newer]."""
    key = lambda r: (r["study"], r["arm"], r["cell"], r["seed"])
    both = {key(r) for r in older} & {key(r) for r in newer}
    words = []
    for rows in (older, newer):
        found = verdicts([r for r in rows if key(r) in both and r["study"] == "toy"])
        words.append({v["claim"]: next((f"{x['verdict']} (best: {x['at_best']})" if "at_best" in x else x["verdict"]
                                        for x in v["rungs"] if x["arm"] == "toy"), "none") for v in found})
    return {c: [words[0][c], words[1][c]] for c in words[0] if words[0][c] != words[1][c]}, len(words[0])


def summary(found, older, newer):
    """How they were made, and how far they lie apart; starts are apart from what was trained with rewards."""
    starts = {c: v for c, v in found.items() if "start" in c}
    trained = {c: v for c, v in found.items() if "start" not in c}
    sizes = [abs(v) for by_seed in trained.values() for v in by_seed.values()]
    joined = lambda rows, what: ", ".join(sorted({r["made"][what] for r in rows if r["study"] == "toy"}))
    made = provenance(sorted({s for by_seed in found.values() for s in by_seed}),
                      "git show 7a4b085:docs/results/study.jsonl.gz > older.jsonl.gz; python docs/machines.py older.jsonl.gz")
    verdicts_changed, claims = changed(older, newer)
    return made | dict(tables={name: dict(commit=joined(rows, "commit"), date=joined(rows, "date"), hardware=joined(rows, "hardware"))
                               for name, rows in (("older", older), ("newer", newer))},
                       runs=len(sizes), mean=round(float(np.mean(sizes)), 2), points=trained, starts=starts,
                       claims=claims, verdicts_changed=verdicts_changed)


if __name__ == "__main__":
    older, newer = read_table(Path(sys.argv[1])), read_table(RESULTS / "study.jsonl.gz")
    text = json.dumps(summary(twice(older, newer), older, newer), indent=1)
    (RESULTS / "machines.json").write_text(text + "\n", "utf-8")
