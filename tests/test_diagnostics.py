"""The metrics of the failures, on cases whose value is known beforehand."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import END, EOS, config, rand, started, tiny, word_task
from latent_grpo.diagnostics import (ExtendedLM, baseline_leak, closure_violation, component_margins,
                                     continue_from, diagnose, drift_index, expected_score,
                                     js_divergence, manifold_deviation, misalignment_rate,
                                     nearest_valid, off_manifold, right_pairs, rollout_deviation,
                                     score_gradients)
from latent_grpo.latent import mix
from latent_grpo.model import TableLM
from latent_grpo.presets import sampling_of
from latent_grpo.rollout import generate, replay_states
from latent_grpo.sampling import Sampling, draw_latent, mixture_weights, noise_keys

STATES = rand(300, 12, seed=1, scale=2.0).log_softmax(-1)


def drawn(logps, s, seed=0):
    ids, scores, _ = draw_latent(logps, noise_keys(seed, torch.arange(len(logps))), s)
    return ids[:, :s.top_k], mixture_weights(scores, s)


# --- deviation from the manifold ---

@settings(deadline=None, max_examples=40)
@given(K=st.integers(1, 12), scale=st.floats(.1, 3), tau=st.floats(.2, 3), top_p=st.floats(.3, 1),
       shift=st.floats(0, 2))
def test_own_draws_lie_on_the_manifold(K, scale, tau, top_p, shift):
    s = Sampling(top_k=K, noise_scale=scale, gumbel_tau=tau, top_p=top_p, shift=shift)
    assert manifold_deviation(STATES, *drawn(STATES, s), s).max() < 1e-4


def test_deviation_is_the_widening_that_is_needed():
    """With the bounds of the noise wider by D on both sides the latent can be drawn; by less, not."""
    s = Sampling(top_k=3, top_p=1.0, noise_scale=1.0)
    ids, w = drawn(STATES, replace(s, noise_scale=4.0))
    D = manifold_deviation(STATES, ids, w, s)
    assert (D > 0.1).float().mean() > 0.5
    for i in (D > 0.1).nonzero().flatten().tolist()[:20]:
        one = (STATES[i:i + 1], ids[i:i + 1], w[i:i + 1])
        wider = lambda x: replace(s, clip=(-1.5 - x * D[i].item(), 3.0 + x * D[i].item()))
        assert manifold_deviation(*one, wider(1.001)).item() < 1e-4
        assert manifold_deviation(*one, wider(0.9)).item() > 0.05 * D[i]


def test_latents_of_other_states_are_off_and_more_noise_is_further():
    s = Sampling(top_k=3, noise_scale=0.3)
    ids, w = drawn(STATES, s)
    assert off_manifold(manifold_deviation(STATES, ids.roll(1, 0), w.roll(1, 0), s)) > 0.9
    far = [manifold_deviation(STATES, *drawn(STATES, replace(s, noise_scale=c)), s).mean()
           for c in (0.3, 0.6, 1.2, 2.4)]
    assert far[0] < 1e-5 and far == sorted(far)


def test_no_edge_without_clipping():
    with pytest.raises(ValueError, match="clip=None"):
        manifold_deviation(STATES, *drawn(STATES, Sampling(top_k=2)), Sampling(top_k=2, clip=None))


def test_deviation_of_a_rollout_does_not_depend_on_its_batch():
    model, s = tiny(), Sampling(end_id=END, top_k=3, noise_scale=0.7)
    rows = torch.arange(6)
    whole = generate(model, [[3, 4, 1], [5, 1], [6, 7, 8, 1]], s, (END,), EOS, 2, 8, rows=rows)
    alone = generate(model, [[5, 1]], s, (END,), EOS, 2, 8, rows=rows[2:4])
    other = tiny(seed=4)
    at = whole.latent_mask.nonzero()[:, 0]
    part = rollout_deviation(other, whole, s)[(at == 2) | (at == 3)]
    torch.testing.assert_close(part, rollout_deviation(other, alone, s), atol=1e-4, rtol=1e-4)
    assert part.max() > 0 and rollout_deviation(model, whole, s).max() < 1e-4


# --- latents as words ---

def test_latents_given_back_as_words_change_nothing():
    model, task = started(word_task()), word_task()
    s = Sampling(end_id=END, top_k=3, noise_scale=0.7)
    rows = task.rows["test"]
    r = generate(model, [task.prompt(x) for x in rows], s, (END,), EOS, 1, 8)
    read = mix(model.embed.detach(), r.ids, mixture_weights(r.scores, s))
    logps = model.head(replay_states(model, r, s)).log_softmax(-1)
    n = r.latent_lengths.clamp(max=r.kind.shape[1] - 1)
    _, after, _ = continue_from(model, task, rows, [read[i, :n[i]] for i in range(len(rows))], s, 8)
    torch.testing.assert_close(after, logps[torch.arange(len(rows)), n].detach(), atol=1e-4, rtol=1e-4)


def test_extended_model_leaves_the_first_words_alone():
    model = tiny()
    extended = ExtendedLM(model, rand(2, 16))
    assert torch.equal(extended.embed[:12], model.embed) and len(extended.embed) == 14


# --- closure ---

def test_js_between_identical_and_disjoint():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.0, 0.0, 1.0]]).log()
    assert js_divergence(p, p, p).item() == pytest.approx(0, abs=1e-7)
    assert js_divergence(q, p, p).item() == pytest.approx(math.log(2))
    half = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert js_divergence(half, p, q).item() == pytest.approx(0, abs=1e-7)   # a linear model


def test_pairs_are_right_distinct_and_extreme():
    z, right = rand(40, 6, 3), rand(40, 6, seed=2) > 0
    use, far, near = right_pairs(z, right)
    assert torch.equal(use, (right.sum(1) > 1).nonzero().flatten())
    for b, f, n in zip(use.tolist(), far.tolist(), near.tolist()):
        ok = right[b].nonzero().flatten().tolist()
        d = {(i, j): (z[b, i] - z[b, j]).norm().item() for i in ok for j in ok if i < j}
        assert d[tuple(sorted(f))] == pytest.approx(max(d.values()))
        assert d[tuple(sorted(n))] == pytest.approx(min(d.values()))


def test_averaging_a_latent_with_itself_violates_nothing():
    task = word_task()
    model, s = started(task), Sampling(end_id=END, top_k=3, noise_scale=0.0, temperature=0.0)
    z = rand(len(task.rows["test"]), 16, scale=3.0)
    found = closure_violation(model, task, task.rows["test"], z, z, s)
    assert torch.equal(found["each"], found["mean"]) and found["js"].max() < 1e-6
    other = closure_violation(model, task, task.rows["test"], z, -z, s)
    assert other["js"].max() > 1e-3


def test_nearest_valid_point():
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    valid = [torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    assert nearest_valid(z, valid).tolist() == [1.0, 5.0]


# --- misalignment ---

def test_misalignment_rates_of_planted_margins():
    margins = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [-1.0, 2.0]])
    A = torch.tensor([[1.0], [-1.0], [0.0]])
    assert misalignment_rate(margins, A) == pytest.approx(3 / 4)      # A = 0 moves nothing
    assert misalignment_rate(margins, A, "released") == pytest.approx(3 / 4)
    assert misalignment_rate(margins, A, "aligned") == 0


def test_margins_at_sampling_time_are_scaled_noise():
    model, s = tiny(), Sampling(end_id=END, top_k=3, noise_scale=0.7, shift=1.5)
    r = generate(model, [[3, 4, 1], [5, 6, 1]], s, (END,), EOS, 4, 8)
    margins, row = component_margins(model, r, s)
    assert len(margins) == r.latent_mask.sum() == len(row)
    assert margins.min() > -1e-4 and margins.max() < 0.7 * 4.5 + 1e-4


# --- mean of the score ---

def test_leak_of_known_gradients():
    assert baseline_leak(torch.ones(10, 4)) == pytest.approx(1)
    signs = torch.tensor([1.0, -1.0]).repeat(50)[:, None] * torch.ones(100, 4)
    assert baseline_leak(signs) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind, low, high", [("exact", 0, 0.06), ("centred", 0, 0.06),
                                             ("one-sided", 0.3, 1)])
def test_leak_by_score(kind, low, high):
    s = Sampling(top_k=3, top_p=1.0, noise_scale=0.5)
    s = {"exact": replace(s, score="exact", clip=None), "one-sided": replace(s, shift=1.5),
         "centred": replace(s, shift=1.5, centre_draws=8)}[kind]
    leaks = [baseline_leak(score_gradients(h, s, 4000)) for h in STATES[:4]]
    assert low <= min(leaks) and max(leaks) <= high


def test_expected_score_has_the_mean_gradient():
    """Two routes to the mean of one state: many single gradients, and the gradient of the mean."""
    s, n = Sampling(top_k=3, top_p=1.0, noise_scale=0.5, shift=1.5), 3000
    single = score_gradients(STATES[0], s, n).mean(0)
    leaf = STATES[:1].clone().requires_grad_()
    mean = expected_score(leaf.log_softmax(-1), torch.zeros(1, dtype=torch.long), s, n)
    (grad,) = torch.autograd.grad(mean.sum(), leaf)
    torch.testing.assert_close(grad[0], single, atol=0.03, rtol=0)


def test_drift_index_counts_the_common_part_only():
    d, noise = rand(4000), rand(6, 4000, seed=1)
    assert drift_index(d + noise, d + noise) == pytest.approx(1)
    assert drift_index(0.5 * d + noise, d + noise) == pytest.approx(0.5, abs=0.1)
    assert drift_index(noise, d + noise) < 0.2


# --- all of them ---

def test_diagnose_of_the_initialisation_and_of_another_policy():
    task = word_task()
    model, cfg = started(task), config("vanilla")
    s = sampling_of(cfg, END)
    own = diagnose(model, model, task, task.rows["test"], s, 8, 8)
    assert own["off_manifold"] == 0 and own["deviation"] < 1e-4
    other = diagnose(model, started(task, steps=5), task, task.rows["test"], s, 8, 8)
    assert other["off_manifold"] > 0 and other["misaligned"] == own["misaligned"]
    aligned = diagnose(model, model, task, task.rows["test"], replace(s, estimator="aligned"), 8, 8)
    assert aligned["misaligned"] == 0 and aligned["leak"] > own["leak"]


def test_diagnose_has_nothing_to_say_where_no_latent_is_drawn():
    task = word_task()
    table = torch.zeros(12, 12)
    table[:, END], table[END] = 99.0, 0.0
    model = TableLM(table)                 # it ends its thought at once
    s = Sampling(end_id=END, top_k=3, noise_scale=0.5)
    assert diagnose(model, model, task, task.rows["test"], s, 8, 8) == {}
