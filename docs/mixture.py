"""What the tiny model says after each mixture of three words: `python docs/mixture.py` writes it down.

The front page draws from docs/results/mixture.json; its script only looks numbers up.
"""
import json
from pathlib import Path

import torch

from latent_grpo.latent import mix
from latent_grpo.runs import provenance
from latent_grpo.sampling import gumbel, noise_keys
from latent_grpo.sft import toy_start

PROBLEM = "a 5 * 1 b 2 - 3 c b * a d c - 4 ? c"    # two right first steps: a = 5 * 1, b = 2 - 3
WORDS = ["a", "b", "5"]                            # the three most probable words of the first latent
STEPS = {"a": ["1", "*", "a"], "b": ["3", "-", "b"]}   # what the next latent holds after either first step
GRID, DRAWS = 40, 12


@torch.no_grad()
def after(model, prompt, ids=None, weights=None):
    """Probabilities [N, V] of the next word after a prompt and, if given, one mixture [N, K] each."""
    inputs = model.embed[torch.tensor(prompt)][None]
    if ids is not None:
        latents = mix(model.embed, torch.tensor(ids).expand(len(weights), -1), weights)
        inputs = torch.cat([inputs.expand(len(weights), -1, -1), latents[:, None]], 1)
    return model.head(model.hidden(inputs)[0][:, -1]).softmax(-1)


def points(grid):
    """All mixtures of three words with weights in steps of 1/grid, in the order of the file."""
    return torch.tensor([(i, j, grid - i - j) for i in range(grid + 1) for j in range(grid + 1 - i)]) / grid


def table(task, model):
    """Everything that the page shows: probabilities in percent, noise before it is clipped."""
    prompt = task.encode(task.prompt_text(PROBLEM))
    ids, first = task.encode(" ".join(WORDS)), after(model, prompt)[0]
    assert set(first.topk(3).indices.tolist()) == set(ids)
    probs = after(model, prompt, ids, points(GRID))
    shown = task.encode(" ".join(sum(STEPS.values(), [])))
    assert set((probs.max(0).values > .02).nonzero().flatten().tolist()) == set(shown)
    noise = gumbel(noise_keys(0, torch.arange(DRAWS)), torch.tensor(ids).expand(DRAWS, -1))
    return dict(problem=PROBLEM, words=WORDS, probabilities=[round(p, 3) for p in first[ids].tolist()],
                grid=GRID, steps=STEPS,
                next_percent=(100 * probs[:, shown]).round().int().tolist(),
                noise=[[round(g, 2) for g in row] for row in noise.tolist()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = provenance([0], "python docs/mixture.py") | table(*toy_start(seed=0))
    path = Path(__file__).parent / "results/mixture.json"
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n", "utf-8")
