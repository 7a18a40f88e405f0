"""Summarise the table of the study: `python docs/verdicts.py` writes docs/results/study.json from study.jsonl.gz."""
import json
from collections import Counter
from pathlib import Path

from latent_grpo.study import read_table
from latent_grpo.verdicts import verdicts

RESULTS = Path(__file__).parent / "results"


def short(found):
    """Verdicts with rounded effects, ready for JSON."""
    rounded = lambda x: x | {"effect": [round(v, 8) for v in x["effect"]]}
    return [v | {"rungs": [rounded(x) for x in v["rungs"]]} for v in found]


def summary(rows):
    """How the rows were made, how many there are, and what follows from them."""
    made = [r["made"] for r in rows]
    joined = lambda key: ", ".join(sorted({m[key] for m in made}))
    return dict(command="latent-grpo study NAME --table docs/results/study.jsonl.gz", commit=joined("commit"),
                seeds=sorted({r["seed"] for r in rows}), hardware=joined("hardware"),
                date=max(m["date"] for m in made), runs=dict(Counter(r["study"] for r in rows)),
                minutes=round(sum(r["minutes"].get("training", 0) for r in rows), 1),
                verdicts=short(verdicts(rows)))


if __name__ == "__main__":
    text = json.dumps(summary(read_table(RESULTS / "study.jsonl.gz")), indent=1)
    (RESULTS / "study.json").write_text(text + "\n", "utf-8")
