"""Do the toy's latents do anything? `python docs/controls.py` trains starts and asks them; lesson 29 reads the record.

Five latent starts, three explicit ones (they train longer), 512 test problems. Controls: deterministic latents, greedy text.
pass@k: 64 samples of 128 problems, text at temperature 1, three scales of the latent noise.
"""
import json
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from latent_grpo.benchmarks import CONTROLS, Protocol, answers, run_protocol
from latent_grpo.presets import build_model, build_task, make_config, sampling_of
from latent_grpo.runs import provenance
from latent_grpo.train import supervised_start

SEEDS, EXPLICIT = range(5), range(3)
GREEDY, NOISY = Protocol(), Protocol(samples=64, noise_scales=(0., .5, 1.), temperature=1.)


def brief(result):
    """The means that the lesson shows."""
    short = {k: round(result[k].mean, 4) for k in ("pass1", "latent", "text")}
    return {"control": result["control"] or "none", **short, "invalid": round(result["invalid"], 4)}


def donors(task, model, cfg):
    """Share of swapped answers that are right for the problem that the latents came from, and the same by chance."""
    rows, sampling = task.rows["test"], sampling_of(cfg, task.end_latent_ids[0], noise_free=True)
    control = partial(CONTROLS["swapped"], task=task)
    items = answers(model, task, rows, sampling, max_steps=cfg.max_steps, control=control)
    lent = [r["answer"] for r in rows[1:] + rows[:1]]
    share = lambda given: round(sum(g == x for g, x in zip(given, lent)) / len(rows), 4)
    return {"follows": share([x["answer"] for x in items]), "by_chance": share([r["answer"] for r in rows])}


def kept(method, seed):
    """What `start` found, from runs/controls when it has been there before."""
    path = Path(f"runs/controls/{method}-{seed}.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(start(method, seed)), "utf-8")
    return json.loads(path.read_text("utf-8"))


def start(method, seed):
    """Train one start of the preset `toy` and ask it."""
    cfg = make_config("toy", method, seed=seed)
    task, _ = build_task(cfg)
    model = build_model(cfg, task)
    supervised_start(model, task, cfg, bar=False)
    rows, names = task.rows["test"], tuple(CONTROLS) if cfg.latent else ("removed",)
    asked = run_protocol(model.eval(), task, cfg, GREEDY, {"test": rows}, names, bar=False)
    out = {"seed": seed, "latent": cfg.latent, "asked": [brief(r) for r in asked]}
    if not cfg.latent: return out
    noisy = run_protocol(model, task, cfg, NOISY, {"test": rows[:128]}, batch=2048, bar=False)
    means = lambda r: {k: round(v.mean, 4) for k, v in r["pass_at"].items()}
    return out | donors(task, model, cfg) | {"pass_at": {r["noise"]: means(r) for r in noisy}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [kept("vanilla", s) for s in SEEDS] + [kept("explicit", s) for s in EXPLICIT]
    rows = build_task(make_config("toy"))[0].rows["test"]
    often = Counter(r["answer"] for r in rows).most_common(1)[0][1]
    record = provenance(list(SEEDS), "python docs/controls.py") | {"problems": len(rows), "constant": often / len(rows)}
    lines = ",\n".join(map(json.dumps, runs))
    text = json.dumps(record, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]}}\n'
    (Path(__file__).parent / "results/controls.json").write_text(text, "utf-8")
