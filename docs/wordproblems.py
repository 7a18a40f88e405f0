"""Join what the page on word problems shows into one file: `python docs/wordproblems.py RUNS`.

RUNS holds what `latent-grpo compare` wrote (results.json and the saved policies); further JSON
files, as NAME=FILE, are kept beside it. Needs LATENT_GRPO_DATA, as the training does.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from latent_grpo.data import data_record
from latent_grpo.presets import sampling_of
from latent_grpo.rollout import generate
from latent_grpo.train import load_policy
from latent_grpo.wordproblems import judge_chain, top_words

TESTS = ("multiarith", "svamp", "mawps")
SHOWN = 4     # problems of SVAMP, the first two right and the first two wrong ones


def rows_of(folder):
    """Which rows the runs were trained and measured on, by their hashes."""
    _, task, cfg = load_policy(folder)
    return data_record(cfg, task.rows)


def examples(folder):
    """Problems of SVAMP (MIT) and the latents that a policy makes of them, without noise."""
    model, task, cfg = load_policy(folder)
    s = sampling_of(cfg, task.end_latent_ids[0], noise_free=True)
    found = [top_words(model, task, row, s) for row in task.rows["svamp"]]
    right = [x for x in found if x["right"] and len(x["steps"]) > 4]
    return right[:SHOWN // 2] + [x for x in found if not x["right"]][:SHOWN // 2]


def errors(folder):
    """What an explicit policy does wrong on each test: its plan, or its sums."""
    model, task, cfg = load_policy(folder)
    s, out = sampling_of(cfg, task.end_latent_ids[0], noise_free=True), {}
    for name in TESTS:
        rows = task.rows[name]
        r = generate(model, [task.prompt(x) for x in rows], s, task.end_latent_ids, task.eos_id,
                     max_steps=cfg.max_steps, thinking=False)
        kinds = Counter(judge_chain(task.decode(r.tokens(i)), x["answer"])
                        for i, x in enumerate(rows))
        out[name] = dict(kinds)
    return out


def main(runs, *others):
    """Write docs/results/wordproblems.json."""
    torch.set_num_threads(1)
    runs = Path(runs)
    record = json.loads((runs / "results.json").read_text("utf-8"))
    results = record.pop("results")
    start = runs / f"seed{record['seeds'][0]}"
    record["data"] = rows_of(start / "latent-start/init")
    record["examples"] = examples(start / "latent-start/init")
    record["errors"] = errors(start / "explicit-start/init")
    for name, path in (x.split("=") for x in others):
        record[name] = json.loads(Path(path).read_text("utf-8"))
        for run in record[name].get("results", []): run.pop("curve")      # not shown
    lines = ",\n".join(map(json.dumps, results))
    text = json.dumps(record, indent=1)[:-2] + f',\n "results": [\n{lines}\n]}}\n'
    (Path(__file__).parent / "results/wordproblems.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
