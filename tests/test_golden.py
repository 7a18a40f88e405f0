"""The released variants reproduce the numbers of the released code; see data/README.md."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import config
from latent_grpo.grpo import kl_k3, ppo_terms, step_weights
from latent_grpo.masking import masked_advantages, valid_rollouts
from latent_grpo.rollout import Rollout
from latent_grpo.sampling import (LATENT, PAD, TEXT, Sampling, candidates, mixture_weights, perturb,
                                  score_steps)
from latent_grpo.selection import first_step_mask
from latent_grpo.train import step_advantages

PATH = os.environ.get("LATENT_GRPO_VECTORS") or Path(__file__).parent / "data/official_seed7.npz"


class Vectors(dict):
    """Arrays of the file as tensors; `part` gives those with one prefix."""
    def part(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def vectors():
    with np.load(PATH) as data: return Vectors({k: torch.from_numpy(data[k]) for k in data})


def close(ours, theirs): torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", range(4))
def test_sampler(vectors, number):
    v = vectors.part(f"sampler{number}_")
    top_p, K, scale, tau, one_sided = v["settings"].tolist()
    s = Sampling(top_k=int(K), top_p=top_p, noise_scale=scale, gumbel_tau=tau,
                 shift=1.5 * one_sided)
    ids, top = candidates(v["logits"].log_softmax(-1), s)
    ids, scores = perturb(ids, top, v["gumbel"].gather(1, ids), s)
    assert torch.equal(ids, v["topk_ids"])
    close(scores, v["topk_scores"])
    close(mixture_weights(scores, s), v["topk_weights"])


@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_surrogate(vectors, phase):
    v = vectors.part(f"surrogate_{phase}_")
    discrete = (v["topk_ids"][:, 1:] == -100).all(1)
    assert discrete.any() and not discrete.all()
    ids = v["topk_ids"].clamp(min=0)
    ids[discrete, 0] = v["labels"][discrete]
    kind = torch.where(discrete, TEXT, LATENT)
    s = Sampling(top_k=ids.shape[1], estimator="released", temperature=v["temperature"].item())
    logits = v["logits"].clone().requires_grad_()
    logps = score_steps(logits, ids, v["topk_scores"], kind, s, advantages=v.get("advantages"))
    close(logps, v["logprob"])
    (logps * v["weights"]).sum().backward()
    close(logits.grad, v["grad_logits"])


def rollout_of(v):
    """The rollouts of the file, as far as advantages need them."""
    mask, groups = v["mask"].bool(), int(v["group"].max()) + 1
    N, T = mask.shape
    prompt = torch.zeros(groups, 1, dtype=torch.long)
    assert torch.equal(v["group"], torch.arange(groups).repeat_interleave(N // groups))
    return Rollout(prompt, prompt == 0, torch.zeros(N, T, 1, dtype=torch.long),
                   torch.zeros(N, T, 1), torch.where(mask, LATENT, PAD), v["old_logprob"] * mask,
                   mask.sum(1) < T, torch.arange(N), 0)


# name in the file: our masking, our selection; full length counts as invalid in all of them
ADVANTAGES = {"vanilla": ("off", "off"), "first_token": ("off", "released"),
              "masked_first_token": ("paper", "released")}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(vectors, name):
    """The pure functions; the released rule compares mean log-probabilities of whole responses."""
    v, (masking, selection) = vectors.part("advantage_"), ADVANTAGES[name]
    r = rollout_of(v)
    rewards = v["rewards"].sum(1).view(len(r.prompt_ids), -1)
    lengths = r.response_mask.sum(1)
    valid = valid_rollouts(r.ended, lengths, int(v["max_length"]), "length").view_as(rewards)
    A = masked_advantages(rewards, valid, masking)
    mean = (r.logps.sum(1) / lengths).view_as(A)
    steps = A.flatten()[:, None] * r.response_mask
    steps[:, 0] *= first_step_mask(A, rewards == 1, mean, selection).flatten()
    close(steps, v[name] * r.response_mask)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_the_trainer(vectors, name):
    """The same numbers through the function that the trainer calls."""
    v, (masking, selection) = vectors.part("advantage_"), ADVANTAGES[name]
    r = rollout_of(v)
    cfg = config(masking=masking, selection=selection, overlong="length",
                 max_steps=int(v["max_length"]))
    ours = step_advantages(r, v["rewards"].sum(1).view(len(r.prompt_ids), -1), cfg)
    close(ours, v[name] * r.response_mask)


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_loss(vectors, how):
    v, mask = vectors.part("loss_"), vectors["advantage_mask"].bool()
    logps, name = v["logprob"].clone().requires_grad_(), how.replace("-", "_")
    loss = (ppo_terms(logps, v["old_logprob"], v["advantages"]) * step_weights(mask, how)).sum()
    close(loss, v[name])
    loss.backward()
    close(logps.grad, v[f"{name}_grad"])


def test_clipped_share(vectors):
    """Where the released code counts a clipped step, our loss has no gradient any more."""
    v, mask = vectors.part("loss_"), vectors["advantage_mask"].bool()
    logps = v["logprob"].clone().requires_grad_()
    ppo_terms(logps, v["old_logprob"], v["advantages"])[mask].sum().backward()
    flat = ((logps.grad == 0) & (v["advantages"] != 0))[mask].float().mean()
    close(flat, v["clipfrac"] + v["clipfrac_lower"])


def test_k3(vectors):
    close(kl_k3(vectors["loss_logprob"], vectors["loss_old_logprob"]), vectors["loss_kl_k3"])
