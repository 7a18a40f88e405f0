"""Direct against learned labels on the toy: `python docs/labels.py FOLDER` writes docs/results/labels.json.

For each seed: Latent-SFT whole (encoder, decoder, joint, labels, stage 2), and stage 2 alone on direct labels,
with the same problems, fresh weights, order of rows, noise and number of updates. FOLDER keeps what is finished.
"""
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from latent_grpo.evaluate import seed_interval
from latent_grpo.labels import STAGES, sft
from latent_grpo.latent import effective_support
from latent_grpo.presets import make_config
from latent_grpo.runs import provenance
from latent_grpo.sft import with_labels
from latent_grpo.train import load_policy, prepare, score_policy

SEEDS = range(5)
SETTINGS = dict(sft_batch=32, explicit_sft=300)
KEYS = ("pass1", "latent_length", "text_length", "support", "invalid")


def last(path):
    """The last row of a log."""
    return json.loads(path.read_text().splitlines()[-1])


def measure(cfg, policy, log, labels=None):
    """Scores of a policy on the test problems, its KL to its labels, and what these are like."""
    model, task, _ = load_policy(policy)
    scores = score_policy(model, task, cfg, ["test"])["test"]
    found = {how: {k: scores[how][k] for k in KEYS} for how in ("noise_free", "sampled")}
    rows = (with_labels(task, labels) if labels else task).rows["train"][:500]
    mixtures = [torch.tensor(w) for r in rows for _, w in task.latent_target(r)[0]]
    support = sum(effective_support(w).item() for w in mixtures) / len(mixtures)
    return found | dict(kl=last(log)["kl"], label_support=support)


def one(seed, out):
    """Both kinds of labels for one seed; CPU minutes of each stage."""
    cfg, minutes = make_config("toy", seed=seed, **SETTINGS), {}
    for name in (*STAGES, "direct"):
        start, where = time.process_time(), out / f"{seed}" / ("direct" if name == "direct" else "learned")
        if name == "direct": prepare(replace(cfg, explicit_sft=0), where, bar=False)
        else: sft(cfg, where, name, bar=False)
        minutes[name] = (time.process_time() - start) / 60
    learned, direct = out / f"{seed}/learned", out / f"{seed}/direct"
    result = dict(
        seed=seed, minutes=minutes, stage1={s: last(learned / f"sft-{s}.jsonl") for s in STAGES[:3]},
        learned=measure(cfg, learned / "train", learned / "sft-latent.jsonl", learned / "label"),
        direct=measure(cfg, direct / "init", direct / "sft-latent.jsonl"))
    (out / f"{seed}.json").write_text(json.dumps(result))
    return result


def summary(results):
    """Mean and 95 % interval over seeds of each measure, and of the difference learned - direct, seed by seed."""
    of = lambda r, kind, how, k: r[kind][how][k] if how else r[kind][k]
    table = {}
    for how, keys in (("noise_free", KEYS), ("sampled", KEYS), ("", ("kl", "label_support"))):
        for k in keys:
            values = {kind: [of(r, kind, how, k) for r in results] for kind in ("direct", "learned")}
            values["difference"] = [b - a for a, b in zip(values["direct"], values["learned"])]
            table[f"{how} {k}".strip()] = {kind: list(seed_interval(v)) for kind, v in values.items()}
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    results = [json.loads((out / f"{s}.json").read_text()) if (out / f"{s}.json").exists() else one(s, out)
               for s in SEEDS]
    record = provenance(list(SEEDS), f"python docs/labels.py {sys.argv[1]}")
    record |= dict(preset="toy", overrides=SETTINGS, summary=summary(results), results=results)
    path = Path(__file__).parent / "results/labels.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
