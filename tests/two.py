"""What `tests/test_engine.py` lets several processes do: train some cases, and say what came out."""
import sys
from pathlib import Path

import torch

from helpers import config, word_task
from latent_grpo.model import HFLM
from latent_grpo.train import processes, train_rl

CASES = {
    "paper": dict(method="paper", minibatches=2, micro_groups=1, groups=5, max_extra=3),
    "kl": dict(method="vanilla", kl_coef=0.1, minibatches=5, groups=5, eval_every=2),     # idle processes
    "exact": dict(method="exact", aggregation="seq-mean-token-mean", epochs=2),
    "words": dict(method="explicit", grad_clip=0.05),
    "tied": dict(method="vanilla", minibatches=1, micro_groups=1, groups=3, max_extra=40),
}


def model_of(name, start):
    """A tied Llama with recomputed layers for one case, for the others the TinyLM of `start`."""
    from test_models import family
    from latent_grpo.model import TinyLM
    if name == "tied": return HFLM(family("Llama", tied=True), checkpointing=True)
    model = TinyLM(12, width=16, layers=2, heads=2, ff=24)
    model.load_state_dict(torch.load(start))
    return model


def go(name, folder, compute="float32", resume=False, steps=2):
    """Log and trained weights of a case."""
    cfg = config(**CASES[name] | dict(device="cpu", compute=compute, steps=steps))
    ranks = processes(cfg)
    model = model_of(name, folder / "start.pt")
    out = folder / f"{name}-{ranks.world}" if not resume else resume
    rows = train_rl(model, word_task(), cfg, out, bool(resume), False, None, ranks)
    weights = {n: p.detach().clone() for n, p in ranks.whole(model).named_parameters()}
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows], weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {name: go(name, folder) for name in CASES}
    found["resumed"] = go("paper", folder, resume=folder / "one", steps=3)
    torch.save(found, folder / f"found-{torch.distributed.get_rank()}.pt")
