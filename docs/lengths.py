"""How long the responses of the study's starts are: `python docs/lengths.py runs/study` writes docs/results/lengths.json."""
import json
import sys
from pathlib import Path

import torch

from latent_grpo.presets import make_config, sampling_of
from latent_grpo.rollout import generate
from latent_grpo.runs import provenance
from latent_grpo.study import SEEDS
from latent_grpo.train import load_policy


def lengths(start, seed, problems=128, group=8):
    """Steps (latent and text) of sampled responses to validation problems -> how many have them; groups with several."""
    cfg = make_config("toy", "vanilla", seed=seed)
    model, task = load_policy(start)[:2]
    prompts = [task.prompt(x) for x in task.rows["validation"][:problems]]
    r = generate(model, prompts, sampling_of(cfg), task.end_latent_ids, task.eos_id, group, cfg.max_steps, seed=seed)
    steps = (r.latent_lengths + r.text_lengths).view(-1, group)
    numbers, counts = steps.unique(return_counts=True)
    mixed = (steps.amin(1) < steps.amax(1)).float().mean().item()
    return dict(steps=dict(zip(map(str, numbers.tolist()), counts.tolist())), mixed_groups=round(mixed, 4))


if __name__ == "__main__":
    torch.set_num_threads(1)
    seeds = SEEDS[:4]
    made = provenance(list(seeds), "python docs/lengths.py runs/study")
    found = {str(s): lengths(Path(sys.argv[1]) / f"seed{s}" / "latent-start" / "init", s) for s in seeds}
    text = json.dumps(made | dict(starts=found), indent=1)
    (Path(__file__).parent / "results" / "lengths.json").write_text(text + "\n", "utf-8")
