"""Run a random sample of the verdicts again: `python docs/recheck.py [SAMPLE]`.

Three rows (a claim on a rung), one of the seeds of each instead of all, the same budget otherwise. The new difference has
to lie where a further seed would be expected: in the 99 % prediction interval of the differences in the table. SAMPLE, a
number, names the choice; without it the day does.
"""
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from latent_grpo.compare import Job, run_jobs
from latent_grpo.evaluate import t_quantile
from latent_grpo.study import arms, chosen_rates, read_table
from latent_grpo.verdicts import CLAIMS, MARGIN, answers, shared

TABLE = Path(__file__).parent / "results/study.jsonl.gz"


def sample(rows, rng, count=3):
    """Some pairs of cells on some rungs that the table judges and that take a minute a run."""
    found = [a for name in ("toy", "ladder", "grid-toys", "ppo-clip", "components") for a in arms(name, chosen_rates(rows))]
    tests = [(claim, arm) for claim in CLAIMS if not callable(claim.what) and len(claim.what) == 2 for arm in found
             if arm.name in claim.arms and len(shared(rows, arm.name, *claim.what)) > 2]
    return rng.sample(tests, min(count, len(tests)))


def expected(rows, claim, arm):
    """Where the difference at a further seed should lie."""
    d = np.array([answers(x).mean() - answers(y).mean() for x, y in shared(rows, arm.name, *claim.what)])
    half = t_quantile(len(d) - 1, .99) * d.std(ddof=1) * (1 + 1 / len(d))**.5
    half = max(half, MARGIN)          # where all seeds agree, a problem or two may still differ
    return d.mean() - half, d.mean() + half


def main(number):
    """Run, compare, and fail where a row does not come back."""
    rows, rng = read_table(TABLE), random.Random(number)
    chosen = [(claim, arm, rng.choice(arm.seeds)) for claim, arm in sample(rows, rng)]
    job = lambda arm, cell, seed, out: Job(arm.preset, cell.method, seed, arm.settings | cell.settings, {}, out)
    with TemporaryDirectory() as folder:
        pairs = [[next((job(a, c, s, Path(folder)) for c in a.cells if c.name == name), None)
                  for name in claim.what] for claim, a, s in chosen]     # None: the start
        jobs = {j.folder: j for pair in pairs for j in pair if j}
        by_folder, keep = {}, lambda job, result: by_folder.update({job.folder: result["scores"]})
        run_jobs(list(jobs.values()), 2, False, each=keep)
    score = lambda j, other: by_folder[j.folder if j else other.start.folder]["test"]["noise_free"]["pass1"]
    wrong = 0
    for (claim, arm, seed), (a, b) in zip(chosen, pairs):
        d, (low, high) = score(a, b) - score(b, a), expected(rows, claim, arm)
        wrong += not low <= d <= high
        print(f"{claim.name} on {arm.name}, seed {seed}: {100 * d:+.1f} points, expected "
              f"[{100 * low:+.1f}, {100 * high:+.1f}] {'' if low <= d <= high else '<- DIFFERS'}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else int(time.strftime("%Y%m%d"))))
