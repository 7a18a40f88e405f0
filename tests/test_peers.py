"""Other papers' draws, scores and advantages: against integrals, simulation and hand numbers."""
import math
from dataclasses import replace

import pytest
import torch

from helpers import END, EOS, config, rand, standard_error, started, tiny, word_task
from latent_grpo.diagnostics import diagnose, score_gradients
from latent_grpo.grpo import group_advantages, step_weights
from latent_grpo.masking import masked_advantages
from latent_grpo.model import TableLM
from latent_grpo.peers import concrete_logp, multiplex_draw, multiplex_logps
from latent_grpo.presets import make_config, sampling_of
from latent_grpo.rollout import generate, replay_logps
from latent_grpo.sampling import END as END_STEP
from latent_grpo.sampling import (LATENT, Sampling, candidates, draw_step, exact_logp,
                                  mixture_weights, noise_keys, score_steps)
from latent_grpo.train import step_advantages, train_rl

STATE = torch.tensor([1.0, 0.3, 1.6, -0.5, -1.0, 0.1])    # logits; END is the likeliest
CONCRETE = Sampling(top_k=3, top_p=0.9, clip=None, score="concrete", noise_scale=0.6)
MULTIPLEX = Sampling(top_k=3, top_p=0.9, clip=None, score="multiplex", noise_scale=0.6)
BOTH = pytest.mark.parametrize("sampling", [CONCRETE, MULTIPLEX], ids=lambda s: s.score)


def draws(sampling, n, state=STATE):
    logits, keys = state.expand(n, -1).clone(), noise_keys(0, torch.arange(n))
    return logits, *draw_step(logits, keys, torch.ones(n, dtype=torch.bool), sampling)


# --- the Concrete density ---

def pair_logp(logps, i, j, gap, scale):
    """Density of: i is the best, j the second, their scores differ by `gap` >= 0. V = 4, K = 2."""
    rest = [v for v in range(4) if v not in (i, j)]
    n = len(gap)
    ids = torch.tensor([[i, j, *rest]]).expand(n, -1)
    below = torch.full((n, 2), -50.) - gap[:, None]      # where the others fell does not matter
    scores = torch.cat([torch.zeros(n, 1), -gap[:, None], below], 1)
    return concrete_logp(logps.expand(n, -1).gather(1, ids), scores, torch.full((n,), 2), scale)


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
def test_concrete_density_integrates_to_one(scale):
    logps, step = STATE[:4].log_softmax(0), 0.005
    gap = (torch.arange(8000) + 0.5) * step
    mass = {(i, j): pair_logp(logps, i, j, gap, scale).exp().sum().item() * step
            for i in range(4) for j in range(4) if i != j}
    assert sum(mass.values()) == pytest.approx(1, abs=1e-3)
    p = (logps / scale).softmax(0)      # ranks follow the Plackett-Luce law of temperature sigma
    for (i, j), m in mass.items():
        assert m == pytest.approx((p[i] * p[j] / (1 - p[i])).item(), abs=1e-3)


def test_concrete_density_is_the_integral_over_the_common_shift():
    """Two Gumbel densities and the chance that the two other words stay below, over all shifts."""
    logps, scale, gap = STATE[:4].log_softmax(0).double(), 0.7, 0.9
    shift = torch.linspace(-15, 40, 200_001, dtype=torch.double)
    density = lambda s, v: exact_logp(logps[[v]].expand(len(s), 1), s[:, None], scale).exp()
    below = lambda s, v: torch.exp(-torch.exp((logps[v] - s) / scale))
    joint = density(shift, 2) * density(shift - gap, 0)
    joint = joint * below(shift - gap, 1) * below(shift - gap, 3)
    truth = torch.trapezoid(joint, shift).log().item()
    found = pair_logp(logps.float(), 2, 0, torch.tensor([gap]), scale)
    assert found.item() == pytest.approx(truth, abs=1e-4)


def test_concrete_score_sees_neither_the_shift_nor_where_the_others_fell():
    logits, ids, scores, kind = draws(CONCRETE, 300)
    value = score_steps(logits, ids, scores, kind, CONCRETE)
    torch.testing.assert_close(value, score_steps(logits, ids, scores + 1.7, kind, CONCRETE))
    lower = scores.clone()
    lower[:, 3:] -= rand(300, scores.shape[1] - 3).abs()
    torch.testing.assert_close(value, score_steps(logits, ids, lower, kind, CONCRETE))
    apart = scores.clone()
    apart[:, 0] += 0.5
    assert (value - score_steps(logits, ids, apart, kind, CONCRETE)).abs().min() > 1e-3


def test_concrete_varies_less_than_exact_and_points_the_same_way():
    """It is the mean of the exact score given what is executed."""
    g = {s: score_gradients(STATE, replace(CONCRETE, score=s), 20_000) for s in ("exact", "concrete")}
    spread = {s: x.var(0).sum() for s, x in g.items()}
    assert spread["concrete"] < 0.8 * spread["exact"]
    assert ((g["exact"] - g["concrete"]) * g["concrete"]).sum(1).mean().abs() < 0.05 * spread["concrete"]


# --- multiplex ---

def test_multiplex_draws_follow_the_next_word_distribution_independently():
    s = replace(MULTIPLEX, top_p=1.0, noise_scale=1.0)
    _, ids, scores, _ = draws(s, 40_000)
    p = STATE.softmax(0)
    for k in range(3):
        torch.testing.assert_close(ids[:, k].bincount(minlength=6) / 4e4, p, atol=0.01, rtol=0)
    pairs = (6 * ids[:, 0] + ids[:, 2]).bincount(minlength=36).view(6, 6) / 4e4
    torch.testing.assert_close(pairs, p[:, None] * p, atol=0.01, rtol=0)


def test_multiplex_mixture_is_the_mean_of_its_draws():
    _, ids, scores, _ = draws(MULTIPLEX, 2_000)
    share = torch.nn.functional.one_hot(ids, 6).float().mean(1)
    mixture = torch.zeros(2_000, 6).scatter_add(1, ids, mixture_weights(scores, MULTIPLEX))
    torch.testing.assert_close(mixture, share)
    assert {1, 2, 3} == set((share > 0).sum(1).tolist())
    by_hand = multiplex_draw(torch.tensor([[4, 7]]), torch.tensor([[-1., -1.]]),
                             torch.tensor([[[2., 0.], [0., 3.], [1., 0.]]]), 1.0)
    assert by_hand[0].tolist() == [[4, 7, 4]]
    assert by_hand[1].exp()[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_multiplex_likelihoods_sum_to_one_over_everything_that_can_happen():
    s = MULTIPLEX
    ids = torch.cartesian_prod(*[torch.arange(6)] * 3)
    kind = torch.full((216,), LATENT)
    logps = STATE.expand(216, -1).log_softmax(-1)
    words, kept = candidates(logps, s)
    inside = words[0, kept[0] > -torch.inf]
    reachable = torch.isin(ids, inside).all(1)
    assert len(inside) == 4 and reachable.sum() == 64
    value = score_steps(STATE.expand(216, -1), ids, torch.zeros(216, 3), kind, s)
    assert value[reachable].exp().sum().item() == pytest.approx(1, abs=1e-5)
    each = multiplex_logps(logps.gather(1, ids), ids, words, kept, s.noise_scale)
    torch.testing.assert_close(each.sum(1), value)
    p = (STATE / s.noise_scale).softmax(0)      # a draw that has left the nucleus stands beside it
    alone = p / (p[inside].sum() + p)
    left = ~torch.isin(ids, inside)
    torch.testing.assert_close(each[left].exp(), alone[ids[left]])


# --- both ---

@BOTH
def test_an_end_is_scored_as_the_word_that_it_is(sampling):
    """Nothing else of an END step is executed: the best word, or the first of the draws."""
    s = replace(sampling, end_id=END)
    logits, ids, scores, kind = draws(s, 4_000)
    assert torch.equal(kind == END_STEP, ids[:, 0] == END)
    assert ((ids[:, 1:3] == END).any(1) & (kind == LATENT)).any()
    each = score_steps(logits, ids, scores, kind, s)[kind == END_STEP]
    kept = candidates(STATE[None].log_softmax(-1), s)[1][0] / s.noise_scale
    p = STATE.log_softmax(0)[END] / s.noise_scale - kept.logsumexp(0)
    torch.testing.assert_close(each, p.expand_as(each))
    assert p.exp().item() == pytest.approx((kind == END_STEP).float().mean().item(), abs=0.03)


@BOTH
def test_score_has_mean_zero_over_latents_and_ends(sampling):
    """Every component of the mean gradient within 5 standard errors; the published one is not."""
    mean, error = standard_error(score_gradients(STATE, replace(sampling, end_id=END), 60_000))
    assert ((mean / error.clamp(min=1e-9)).abs() < 5).all()
    published = replace(sampling, end_id=END, score="published")
    mean, error = standard_error(score_gradients(STATE, published, 60_000))
    assert ((mean / error.clamp(min=1e-9)).abs() > 20).any()


@BOTH
def test_score_is_the_derivative_of_what_happens(sampling):
    """E[score x (the latent phase ends)] is the derivative of the chance of an end."""
    s, x = replace(sampling, end_id=END, top_p=1.0), STATE.clone().requires_grad_()
    chance = (x / s.noise_scale).softmax(0)[END]
    truth, = torch.autograd.grad(chance, x)
    logits, ids, scores, kind = draws(s, 60_000)
    logits.requires_grad_()
    score_steps(logits, ids, scores, kind, s).sum().backward()
    mean, error = standard_error(logits.grad * (kind == END_STEP)[:, None])
    assert ((mean - truth).abs() < 5 * error).all() and (truth.abs() > 20 * error).any()


def test_with_one_component_both_are_the_softmax():
    logps = STATE.log_softmax(0)
    for s in (CONCRETE, MULTIPLEX):
        s = replace(s, top_k=1, top_p=1.0)
        logits, ids, scores, kind = draws(s, 100)
        expected = (logps / s.noise_scale).log_softmax(0)[ids[:, 0]]
        torch.testing.assert_close(score_steps(logits, ids, scores, kind, s), expected)


@BOTH
@pytest.mark.parametrize("noise", ["one for all", "by row"])
def test_replay_gives_the_log_probabilities_of_the_rollout(sampling, noise):
    model, n = tiny(), 12
    if noise == "by row": sampling = replace(sampling, noise_scale=0.4 + 0.1 * torch.arange(n))
    r = generate(model, [[3, 4], [5], [6, 7, 8]], sampling, (END,), EOS, 4, 8)
    assert r.latent_mask.any() and (r.kind == END_STEP).any()
    torch.testing.assert_close(replay_logps(model, r, sampling), r.logps, atol=1e-4, rtol=1e-4)
    again = generate(model, [[3, 4], [5], [6, 7, 8]], sampling, (END,), EOS, 4, 8)
    assert torch.equal(r.ids, again.ids) and torch.equal(r.scores, again.scores)
    other = replay_logps(tiny(seed=1), r, sampling)
    assert other.isfinite().all() and (other - r.logps).abs().max() > 0.1


@BOTH
def test_gradient_of_a_rollout_equals_finite_differences(sampling):
    table, way = rand(5, 5, seed=3) + 1.5 * torch.eye(5)[[1, 2, 3, 4, 0]], rand(5, 5, seed=6)
    s = replace(sampling, top_p=1.0)
    r = generate(TableLM(table), [[4]] * 4, s, (1,), 0, 8, 5)
    weight = rand(*r.kind.shape, seed=4)
    model = TableLM(table)
    (replay_logps(model, r, s) * weight).sum().backward()
    step = lambda h: (replay_logps(TableLM(table + h * way), r, s) * weight).sum().item()
    slope = (8 * (step(.01) - step(-.01)) - (step(.02) - step(-.02))) / 0.12
    assert (model.table.grad * way).sum().item() == pytest.approx(slope, rel=0.01, abs=1e-3)
    assert abs(slope) > 0.02


# --- advantages ---

FOUR = torch.tensor([[1., 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])


def test_advantages_by_hand():
    dr, rloo = (group_advantages(FOUR, how=how) for how in ("dr-grpo", "rloo"))
    torch.testing.assert_close(dr, torch.tensor([[.5, -.5, -.5, .5], [.75, -.25, -.25, -.25], [0, 0, 0, 0]]))
    third = 1 / 3      # each against the mean of the three others
    torch.testing.assert_close(rloo, torch.tensor([[2 * third, -2 * third, -2 * third, 2 * third],
                                                   [1, -third, -third, -third], [0, 0, 0, 0]]))
    others = (FOUR.sum(1, keepdim=True) - FOUR) / 3
    torch.testing.assert_close(rloo, FOUR - others)
    torch.testing.assert_close(group_advantages(FOUR), dr / (FOUR.std(1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("how", ["grpo", "dr-grpo", "rloo"])
def test_masked_rollouts_are_left_out(how):
    valid = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    A = masked_advantages(FOUR, valid, "paper", how)
    torch.testing.assert_close(A[:1, :3], group_advantages(FOUR[:1, :3], how=how))
    assert A[0, 3] == 0 and A[1].abs().sum() == 0       # nobody is left to compare with
    changed = FOUR + torch.tensor([[0, 0, 0, 9.], [0, 9, 9, 9], [0, 0, 0, 0]])
    torch.testing.assert_close(masked_advantages(changed, valid, "paper", how), A)
    assert torch.equal(masked_advantages(FOUR, valid, "off", how), group_advantages(FOUR, how=how))
    assert torch.equal(masked_advantages(FOUR, valid, "released", how),
                       group_advantages(FOUR, how=how) * valid)


def test_dr_grpo_and_rloo_are_one_method_at_two_learning_rates():
    """At equal group sizes; the sum over responses is the token mean times the mean length."""
    dr, rloo = (group_advantages(FOUR, how=how) for how in ("dr-grpo", "rloo"))
    torch.testing.assert_close(rloo, dr * 4 / 3)
    steps = torch.arange(12) < torch.tensor([[3], [12], [9], [4]])
    total, mean = (step_weights(steps, make_config("toy", m).aggregation) for m in ("dr-grpo", "rloo"))
    torch.testing.assert_close(total, mean * 7)
    assert make_config("toy", "dr-grpo").aggregation == "seq-mean-token-sum"
    assert make_config("toy", "rloo").aggregation == make_config("toy", "vanilla").aggregation


@pytest.mark.parametrize("how", ["dr-grpo", "rloo"])
def test_the_trainer_uses_the_advantage_that_is_set(how):
    r = generate(tiny(), [[3, 4], [5]], sampling_of(config(), END), (END,), EOS, 4, 8)
    rewards = FOUR[:2]
    A = step_advantages(r, rewards, config(advantage=how))
    expected = group_advantages(rewards, how=how).flatten()[:, None] * r.action_mask
    torch.testing.assert_close(A, expected)


# --- as methods ---

PEERS = ["concrete", "multiplex", "soft-grpo", "dr-grpo", "rloo"]


@pytest.mark.parametrize("method", PEERS)
def test_each_trains_on_the_ratio_one(method):
    task = word_task()
    model = started(task)
    before = model.unembed.weight.clone()
    rows = train_rl(model, task, config(method, steps=2), bar=False)
    assert all(r["groups"] and r["first_ratio_gap"] < 1e-3 for r in rows)
    assert (model.unembed.weight - before).abs().max() > 1e-4


def test_a_small_tau_makes_mixtures_words():
    tau = [sampling_of(config(m)).gumbel_tau for m in ("vanilla", "soft-grpo")]
    assert tau == [1.0, 0.1]
    scores = torch.tensor([[0., -.5, -1.]])
    heavy = [mixture_weights(scores, sampling_of(config(m)))[0, 0] for m in ("vanilla", "soft-grpo")]
    assert heavy[0] < 0.6 and heavy[1] > 0.99


@pytest.mark.parametrize("method", PEERS)
def test_evaluation_without_noise_is_everybodys(method):
    free = sampling_of(config(method), END, noise_free=True)
    assert (free.score, free.noise_scale, free.clip) == ("published", 0.0, (-1.5, 3.0))
    logits = STATE.expand(3, -1)
    ours = draw_step(logits, noise_keys(0, torch.arange(3)), torch.ones(3).bool(), free)
    theirs = draw_step(logits, noise_keys(0, torch.arange(3)), torch.ones(3).bool(),
                       sampling_of(config("vanilla"), END, noise_free=True))
    for a, b in zip(ours, theirs): assert torch.equal(a, b)
    torch.testing.assert_close(mixture_weights(ours[1], free),
                               STATE.softmax(0).topk(3)[0].div(STATE.softmax(0).topk(3)[0].sum()).expand(3, -1))


def test_diagnostics_of_multiplex_leave_out_what_it_does_not_have():
    task = word_task()
    model, s = started(task), sampling_of(config("multiplex"), END)
    found = diagnose(model, model, task, task.rows["test"], s, 4, 8)
    assert "leak" in found and not {"deviation", "off_manifold", "misaligned"} & set(found)
    assert all(math.isfinite(v) for v in found.values())


@pytest.mark.parametrize("settings,message", [
    (dict(score="concret"), "score='concret': choose one of"),
    (dict(score="concrete"), "score='concrete' is a density only for unclipped"),
    (dict(score="multiplex", clip=None, shift=1.0), "score='multiplex' is a density only for"),
    (dict(score="multiplex", clip=None, end_rule="argmax"), "end_rule='sampled'"),
    (dict(score="concrete", clip=None, estimator="aligned"), "needs neither repair"),
    (dict(score="multiplex", clip=None, centre_draws=4), "needs neither repair"),
    (dict(score="concrete", clip=None, noise_scale=0.0), "noise_scale=0: there is no density"),
    (dict(score="multiplex", clip=None, gumbel_tau=0.5), "gumbel_tau=0.5: score='multiplex' weighs"),
], ids=str)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(ValueError, match=message): Sampling(**settings)


def test_an_unknown_advantage_is_refused():
    for make in (lambda: group_advantages(FOUR, how="rlo"), lambda: make_config("toy", advantage="rlo")):
        with pytest.raises(ValueError, match=r"advantage='rlo': choose"): make()
