"""Draws follow the stated law, noise is a pure function, scores have the mean they claim."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from helpers import END, EOS, METHODS, config, rand, standard_error, tiny
from latent_grpo.noise import one_sided
from latent_grpo.presets import sampling_of
from latent_grpo.rollout import generate
from latent_grpo.sampling import END as END_STEP
from latent_grpo.sampling import (LATENT, TEXT, Sampling, draw_step, exact_logp, gumbel,
                                  mixture_weights, noise_keys, score_steps, surrogate_logp)

STATE = torch.tensor([1.0, 0.3, 1.6, -0.5, -1.0, 0.1])    # logits; END is the likeliest
PLAIN = Sampling(top_k=6, top_p=1.0, clip=None)           # no selection, no clipping, no end


def draws(sampling, n=20_000, state=STATE, thinking=True, seed=0):
    """n independent draws at one state: logits, keys, ids, scores, kind."""
    logits, keys = state.expand(n, -1).clone(), noise_keys(seed, torch.arange(n))
    return logits, keys, *draw_step(logits, keys, torch.full((n,), thinking), sampling)


def score_gradients(sampling, n=20_000, **kwargs):
    """Gradient of the score of each draw with respect to its logits [n, V], and the step kinds."""
    logits, keys, ids, scores, kind = draws(sampling, n, **kwargs)
    logits.requires_grad_()
    score_steps(logits, ids, scores, kind, sampling, keys).sum().backward()
    return logits.grad, kind


def z_scores(samples):
    mean, error = standard_error(samples)
    return (mean / error.clamp(min=1e-9)).abs()


# --- draws ---

def fits(counts, shares):
    """Chi-square: could these counts come from these shares?"""
    used = shares > 0
    assert (counts[~used] == 0).all()
    expected = shares[used].double() / shares.double().sum() * counts.sum()
    return stats.chisquare(counts[used], expected).pvalue > 1e-4


@pytest.mark.parametrize("thinking", [True, False], ids=["latent", "text"])
def test_best_word_follows_softmax(thinking):
    ids = draws(PLAIN, thinking=thinking)[2]
    counts = ids[:, 0].bincount(minlength=6)
    assert fits(counts, STATE.softmax(-1))
    assert not fits(counts, (0.9 * STATE).softmax(-1))


def test_text_is_drawn_from_what_it_is_scored_by():
    s = Sampling(top_k=1, temperature=0.7, text_top_k=4, text_top_p=0.8)
    logits, keys, ids, scores, kind = draws(s, thinking=False)
    chance = score_steps(logits[:6], torch.arange(6)[:, None], scores[:6], kind[:6], s).exp()
    counts = ids[:, 0].bincount(minlength=6)
    support = counts > 0
    assert 1 < support.sum() < 5
    assert chance[support].sum() == pytest.approx(1, abs=1e-5)
    assert fits(counts[support], chance[support])


def test_full_text_score_ignores_the_truncation():
    s = Sampling(top_k=1, text_top_k=2)
    logits, keys, ids, scores, kind = draws(s, 200, thinking=False)
    score = lambda how: score_steps(logits, ids, scores, kind, replace(s, text_score=how))
    full = STATE.log_softmax(-1)[ids[:, 0]]
    torch.testing.assert_close(score("full"), full)
    assert (score("truncated") > full + 0.1).all()


def test_zero_temperature_is_greedy():
    assert (draws(Sampling(top_k=1, temperature=0.0), thinking=False)[2] == STATE.argmax()).all()


def test_latent_margins_are_the_noise():
    """What a draw stores gives back, word by word, the noise that made it."""
    s = one_sided(Sampling(top_k=3, top_p=0.9, noise_scale=0.5))
    logits, keys, ids, scores, kind = draws(s, 500)
    margins = scores - STATE.log_softmax(-1)[ids]
    expected = 0.5 * (gumbel(keys, ids).clamp(-1.5, 3) + 1.5)
    torch.testing.assert_close(margins, expected, atol=1e-5, rtol=0)
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("rule", ["sampled", "argmax"])
def test_end_rule(rule):
    """END comes when the end marker wins with noise; by the released rule also without."""
    s = Sampling(top_k=2, end_id=END, end_rule=rule)
    logits, _, ids, scores, kind = draws(s, 5_000)
    free = draws(replace(s, end_id=-1), 5_000)[2]
    assert ((kind == END_STEP) == ((free[:, 0] == END) | (rule == "argmax"))).all()
    assert (ids[kind == END_STEP, 0] == END).all() and (kind != TEXT).all()
    score = score_steps(logits, ids, scores, kind, s)[kind == END_STEP]    # an ordinary word
    torch.testing.assert_close(score, STATE.log_softmax(-1)[END].expand_as(score))


def test_more_components_than_words():
    with pytest.raises(ValueError, match=r"top_k=7.*vocabulary \(6\)"):
        draws(Sampling(top_k=7), 3)


def test_mixed_batch_equals_separate_batches():
    """Settings that differ by row, and rows in different phases, do not touch each other."""
    n = 40
    logits, keys, thinking = rand(n, 9, scale=2), noise_keys(3, torch.arange(n)), rand(n) > -0.5
    rows = torch.arange(n)
    each = dict(noise_scale=0.2 + rows % 3, gumbel_tau=0.5 + rows % 2, top_p=0.3 + 0.2 * (rows % 4),
                temperature=0.4 + 0.3 * (rows % 3))
    mixed = Sampling(top_k=3, end_id=END, **each)
    ids, scores, kind = draw_step(logits, keys, thinking, mixed)
    logps, weights = score_steps(logits, ids, scores, kind, mixed), mixture_weights(scores, mixed)
    assert {LATENT, END_STEP, TEXT} == set(kind.tolist())
    for i in range(n):
        one = replace(mixed, **{k: v[i].item() for k, v in each.items()})
        at = slice(i, i + 1)
        alone = draw_step(logits[at], keys[at], thinking[at], one)
        for whole, part in zip((ids, scores, kind), alone): assert torch.equal(whole[at], part)
        torch.testing.assert_close(score_steps(logits[at], *alone, one), logps[at])
        if kind[i] == LATENT:
            torch.testing.assert_close(mixture_weights(alone[1], one), weights[at])


# --- noise ---

AXES = {"token": lambda n: (noise_keys(1, torch.tensor([5])), torch.arange(n)[None]),
        "row": lambda n: (noise_keys(1, torch.arange(n), 4), torch.full((n, 1), 7)),
        "step": lambda n: (noise_keys(1, 2, torch.arange(n)), torch.full((n, 1), 7)),
        "seed": lambda n: (torch.stack([noise_keys(s, 2, 4) for s in range(n)]),
                           torch.full((n, 1), 7))}


@pytest.mark.parametrize("axis", AXES)
def test_noise_is_gumbel_along_each_axis(axis):
    g = gumbel(*AXES[axis](4_000)).flatten()
    assert stats.kstest(g.double().numpy(), "gumbel_r").pvalue > 1e-4
    u = torch.exp(-torch.exp(-g))
    for lag in (1, 2, 16):    # neighbours fall into each cell of a 5 x 5 table equally often
        cell = 5 * (5 * u[:-lag]).long().clamp(max=4) + (5 * u[lag:]).long().clamp(max=4)
        assert fits(cell.bincount(minlength=25), torch.full((25,), 1 / 25))


def test_noise_is_independent_across_axes():
    """Streams that differ in one counter only, or have two counters exchanged, are unrelated."""
    ids, i = torch.arange(50)[None], torch.arange(40)
    base = noise_keys(1, i, 3)
    others = [noise_keys(2, i, 3), noise_keys(1, i + 1, 3), noise_keys(1, i, 4),
              noise_keys(1, 3, i), noise_keys(0, base)]
    g = gumbel(base, ids).flatten()
    for keys in others:
        h = gumbel(keys, ids).flatten()
        assert (g == h).float().mean() < 0.03     # (3, 3) is the same stream exchanged
        assert abs(stats.pearsonr(g, h).statistic) < 0.1


def test_noise_does_not_depend_on_batch_shape_or_order():
    keys, ids = noise_keys(0, torch.arange(30)), (20 * rand(30, 8)).long().abs()
    whole, order = gumbel(keys, ids), rand(30).argsort()
    assert torch.equal(gumbel(keys[order], ids[order]), whole[order])
    assert torch.equal(gumbel(keys[4:5], ids[4:5, 2:3]), whole[4:5, 2:3])
    assert torch.equal(noise_keys(0, torch.arange(30)[:, None], torch.arange(5))[7, 3],
                       noise_keys(0, 7, 3))


# --- scores ---

def test_two_sided_score_has_zero_mean_where_nothing_is_selected():
    gradients, _ = score_gradients(PLAIN)
    assert z_scores(gradients).max() < 5


@pytest.mark.parametrize("change", [dict(shift=1.5), dict(noise_scale=0.5), dict(top_k=2),
                                    dict(clip=(-1.5, 3.0), top_k=3)], ids=str)
def test_shift_scale_and_selection_bias_the_published_score(change):
    gradients, _ = score_gradients(replace(PLAIN, **change))
    assert z_scores(gradients).max() > 15


CENTRED = [(side, scale, K, end) for side in ("one-sided", "two-sided")
           for scale in (0.25, 1.0, 2.0) for K, end in ((2, -1), (4, END))]


@pytest.mark.parametrize("side,scale,K,end", CENTRED)
def test_centred_score_has_zero_mean(side, scale, K, end):
    s = Sampling(top_k=K, top_p=0.9, noise_scale=scale, end_id=end, centre_draws=4)
    s = one_sided(s) if side == "one-sided" else s
    gradients, kind = score_gradients(s)
    assert z_scores(gradients).max() < 5
    assert (kind == END_STEP).any() == (end == END)
    assert z_scores(score_gradients(replace(s, centre_draws=0))[0]).max() > 15


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("K,top_p,end", [(1, 1.0, -1), (3, 0.8, END), (6, 1.0, END)])
def test_exact_score_has_zero_mean(scale, K, top_p, end):
    s = Sampling(top_k=K, top_p=top_p, noise_scale=scale, end_id=end, score="exact", clip=None)
    gradients, kind = score_gradients(s)
    assert z_scores(gradients).max() < 5
    assert gradients.abs().mean() > 0.01
    assert (kind == END_STEP).any() == (end == END)


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_exact_density_integrates_to_one(scale):
    logps, axis = torch.tensor([0.7, 0.3]).log(), torch.linspace(-9, 25, 1_200, dtype=torch.double)
    grid = torch.cartesian_prod(axis, axis)
    density = exact_logp(logps.expand(len(grid), 2), grid, scale).exp()
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_exact_score_is_the_derivative_of_its_density():
    """E[score x f(draw)] is the derivative of E[f], here of the chance that the first word wins."""
    s = Sampling(top_k=3, top_p=1.0, noise_scale=1.0, score="exact", clip=None)
    logits, keys, ids, scores, kind = draws(s, 100_000)
    logits.requires_grad_()
    score_steps(logits, ids, scores, kind, s).sum().backward()
    mean, error = standard_error(logits.grad * (ids[:, :1] == 0))
    p = STATE.softmax(-1)
    truth = p[0] * (torch.eye(6)[0] - p)
    assert ((mean - truth).abs() < 5 * error).all() and (truth.abs() > 5 * error).any()


def push(margin, advantage, estimator):
    """Ascent direction on the log-probability of one component."""
    logp = torch.tensor([[-1.0]], requires_grad=True)
    A = torch.tensor([float(advantage)])
    (A * surrogate_logp(logp, logp.detach() + margin, estimator, A)).sum().backward()
    return logp.grad.item()


@settings(max_examples=200, deadline=None)
@given(st.floats(-8, 8), st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3))
def test_aligned_estimator_never_pushes_the_wrong_way(margin, advantage):
    assert push(margin, advantage, "aligned") * advantage >= 0


def test_released_estimator_bounds_the_wrong_push_without_turning_it():
    assert push(-1, -1, "none") == pytest.approx(1.718, abs=1e-3)
    assert push(-1, -1, "released") == pytest.approx(0.632, abs=1e-3)
    assert push(-1, +1, "released") == push(-1, +1, "none") < 0
    assert push(-1, -1, "aligned") == pytest.approx(-0.632, abs=1e-3)


@pytest.mark.parametrize("estimator", ["none", "released", "aligned"])
def test_estimators_agree_where_margins_are_positive_and_keep_the_value(estimator):
    logps, A = rand(5, 3), torch.tensor([1.0, -1, 2, -2, 0])
    above, below = logps + rand(5, 3, seed=1).abs(), logps - rand(5, 3, seed=2).abs()
    value = lambda x, e: surrogate_logp(logps, x, e, A)
    torch.testing.assert_close(value(below, estimator), value(below, "none"))
    for margin in (0.1, 1, 4):
        assert push(margin, -1, estimator) == push(margin, -1, "none")
    torch.testing.assert_close(value(above, estimator), value(above, "none"))


def test_one_sided_noise_never_pushes_the_wrong_way_before_an_update():
    s = one_sided(Sampling(top_k=4, top_p=0.9))
    for sampling, expected in ((s, 0), (replace(s, shift=0.0), 1)):
        _, _, ids, scores, _ = draws(sampling, 2_000)
        margins = scores - STATE.log_softmax(-1)[ids]
        assert (margins < 0).any() == expected


def test_one_sided_noise_changes_no_draw_and_no_mixture():
    two = Sampling(top_k=3, noise_scale=0.7)
    (_, _, ids, scores, _), (_, _, other, shifted, _) = draws(two, 500), draws(one_sided(two), 500)
    assert torch.equal(ids, other)
    torch.testing.assert_close(mixture_weights(scores, two), mixture_weights(shifted, two))
    assert (shifted > scores + 0.5).all()


def test_centring_changes_the_gradient_and_not_the_value():
    s = one_sided(Sampling(top_k=3, end_id=END))
    logits, keys, ids, scores, kind = draws(s, 300)

    def value_and_gradient(sampling):
        x = logits.clone().requires_grad_()
        value = score_steps(x, ids, scores, kind, sampling, keys)
        value.sum().backward()
        return value.detach(), x.grad

    plain, centred = value_and_gradient(s), value_and_gradient(replace(s, centre_draws=3))
    assert torch.equal(plain[0], centred[0])
    assert (plain[1] - centred[1]).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_logits_that_are_not_numbers_are_an_error(method):
    cfg, model = config(method), tiny()
    with torch.no_grad(): model.unembed.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [[3, 4]], sampling_of(cfg, END), (END,), EOS, max_steps=4,
                 thinking=cfg.latent)
