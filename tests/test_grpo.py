"""Advantages, loss and the three fixes by what they mean; the gradient against the exact one."""
import itertools

import pytest
import torch

from helpers import config, rand, standard_error
from latent_grpo.grpo import group_advantages, kl_k3, ppo_terms, step_weights
from latent_grpo.masking import masked_advantages, valid_rollouts
from latent_grpo.model import TableLM
from latent_grpo.presets import sampling_of
from latent_grpo.rollout import generate
from latent_grpo.sampling import Sampling, mixture_weights
from latent_grpo.selection import first_step_mask
from latent_grpo.vanilla import policy_loss

REWARDS = (rand(40, 8, seed=1) > 0.3).float()    # groups of all kinds, all-wrong ones among them
VALID = rand(40, 8, seed=2) > -0.5
SOME = torch.tensor([[1., 0, 1, 0]])


# --- advantages ---

def test_advantages_sum_to_zero_in_each_group():
    torch.testing.assert_close(group_advantages(REWARDS).sum(1), torch.zeros(40), atol=1e-5, rtol=0)
    A = masked_advantages(REWARDS, VALID, "paper")
    torch.testing.assert_close(A.sum(1), torch.zeros(40), atol=1e-5, rtol=0)
    assert group_advantages(SOME.repeat(2, 1)).abs().sum() > 4


@pytest.mark.parametrize("variant", ["off", "paper", "released"])
def test_advantages_follow_a_permutation(variant):
    advantages = lambda at: masked_advantages(REWARDS[at], VALID[at], variant)
    groups, rows = rand(40).argsort(), (slice(None), rand(8).argsort())
    for at in (groups, rows): torch.testing.assert_close(advantages(at), advantages(...)[at])


def test_advantages_do_not_feel_other_groups_or_the_scale_of_rewards():
    A = group_advantages(REWARDS)
    torch.testing.assert_close(group_advantages(REWARDS[3:4]), A[3:4])
    torch.testing.assert_close(group_advantages(10 * REWARDS - 3), A, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("variant", ["off", "paper", "released"])
def test_equal_rewards_give_no_gradient(reward, variant):
    A = masked_advantages(torch.full((1, 5), reward), VALID[:1, :5], variant).flatten()[:, None]
    logps = rand(5, 3).requires_grad_()
    ppo_terms(logps, rand(5, 3, seed=1), A).sum().backward()
    assert logps.grad.abs().max() == 0


# --- masking ---

@pytest.mark.parametrize("valid,paper", [
    ([1, 1, 0, 0], [1, -1, 0, 0]),    # only the valid ones are compared
    ([1, 0, 1, 0], [0, 0, 0, 0]),     # valid ones agree
    ([1, 0, 0, 0], [0, 0, 0, 0]),     # one valid rollout: nothing to compare with
    ([0, 0, 0, 0], [0, 0, 0, 0]),
    ([1, 1, 1, 1], [1, -1, 1, -1])])
def test_masking(valid, paper):
    valid = torch.tensor([valid]).bool()
    A = masked_advantages(SOME, valid, "paper")
    assert A.sign().tolist() == [paper] and A.isfinite().all()
    released = masked_advantages(SOME, valid, "released")
    assert torch.equal(released, group_advantages(SOME) * valid)    # zeroed, but they count
    assert torch.equal(masked_advantages(SOME, valid, "off"), group_advantages(SOME))


def test_masking_leaves_invalid_rollouts_out_of_the_statistics():
    rewards, valid = torch.tensor([[1., 0, 0, 0]]), torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(masked_advantages(rewards, valid, "paper")[:, :2],
                               group_advantages(rewards[:, :2]))
    assert masked_advantages(rewards, valid, "released")[0, 0] > 1.4


def test_what_counts_as_invalid():
    ended, lengths = torch.tensor([True, True, False]), torch.tensor([3, 5, 5])
    assert valid_rollouts(ended, lengths, 5).tolist() == [True, True, False]
    assert valid_rollouts(ended, lengths, 5, "length").tolist() == [True, False, False]


# --- selection ---

LOGPS = torch.tensor([[-2., -1, -3, -0.5]])    # the best correct first step is the first rollout's


@pytest.mark.parametrize("variant,speaks", [
    ("off", [1, 1, 1, 1]), ("paper", [1, 1, 0, 1]), ("released", [1, 0, 0, 0])])
def test_selection(variant, speaks):
    mask = first_step_mask(group_advantages(SOME), SOME == 1, LOGPS, variant)
    assert mask.tolist() == [[bool(x) for x in speaks]]


@pytest.mark.parametrize("variant", ["off", "paper", "released"])
def test_selection_without_a_correct_rollout_silences_nobody(variant):
    nothing = torch.zeros(1, 4)
    assert first_step_mask(nothing, nothing == 1, LOGPS, variant).all()


@pytest.mark.parametrize("valid,speaks", [
    ([0, 1, 1, 1], [1, 1, 1, 1]),    # the better one is invalid: the other correct one is chosen
    ([0, 1, 0, 1], [1, 1, 1, 1]),    # no correct rollout is valid
    ([1, 1, 1, 0], [1, 1, 0, 1]),
    ([0, 0, 0, 0], [1, 1, 1, 1])])
def test_selection_chooses_among_valid_rollouts(valid, speaks):
    A = masked_advantages(SOME, torch.tensor([valid]).bool(), "paper")
    mask = first_step_mask(A, SOME == 1, LOGPS, "paper")
    assert mask.tolist() == [[bool(x) for x in speaks]]


def test_exactly_one_correct_rollout_keeps_its_first_step():
    A, correct = group_advantages(REWARDS), REWARDS == 1
    mixed = correct.any(1) & ~correct.all(1)
    for variant, wrong in (("paper", 1), ("released", 0)):
        mask = first_step_mask(A, correct, rand(40, 8, seed=5), variant)[mixed]
        assert ((mask & correct[mixed]).sum(1) == 1).all()
        assert (mask[~correct[mixed]] == wrong).all()


# --- loss ---

@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clipping_stops_the_push_once_the_ratio_has_moved_far_enough(advantage):
    """No gradient beyond the clip in the wanted direction; a way back is left open, up to 3."""
    ratio = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1])
    logps = ratio.log().requires_grad_()
    terms = ppo_terms(logps, torch.zeros(8), torch.full((8,), advantage))
    terms.sum().backward()
    moves = [1, 1, 1, 1, 1, 0, 0, 0] if advantage > 0 else [0, 0, 1, 1, 1, 1, 1, 0]
    assert (logps.grad != 0).tolist() == [bool(x) for x in moves]
    assert (logps.grad * advantage <= 0).all()    # descent raises log p of the good
    if advantage < 0: assert terms.max() == 3


def test_k3_is_kl_by_enumeration():
    p, q = rand(7, seed=1).log_softmax(-1), rand(7, seed=2).log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum()
    torch.testing.assert_close((p.exp() * kl_k3(p, q)).sum(), kl(p, q))
    assert (kl(p, q) - kl(q, p)).abs() > 0.05    # the direction is seen
    assert (kl_k3(p, q) > 0).all() and kl_k3(p, p).abs().max() == 0


MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("how,shares", [("token-mean", [4 / 5, 1 / 5, 0]),
                                        ("seq-mean-token-mean", [1 / 3, 1 / 3, 0]),
                                        ("seq-mean-token-sum", [4 / 3, 1 / 3, 0])])
def test_step_weights_say_who_counts_how_much(how, shares):
    weights = step_weights(MASK, how)
    torch.testing.assert_close(weights.sum(1), torch.tensor(shares))
    assert (weights[~MASK] == 0).all() and weights[0].unique().numel() == 1


def test_step_weights_of_nothing_and_of_an_unknown_name():
    assert step_weights(torch.zeros(2, 3).bool()).abs().sum() == 0
    with pytest.raises(ValueError, match="token-mean"): step_weights(MASK, "mean")


# --- gradients: finite differences, enumeration, simulation ---

EOS, END, A, B, C = range(5)
TABLE = rand(5, 5, seed=3) + 1.5 * torch.eye(5)[[1, 2, 3, 4, 0]]
PROMPT = [[C]]


@pytest.mark.parametrize("method", ["explicit", "vanilla", "paper", "exact"])
def test_policy_gradient_equals_finite_differences(method):
    cfg, model = config(method, kl_coef=0.1, noise_scale=1.0), TableLM(TABLE)
    s, reference = sampling_of(cfg, END), TableLM(TABLE + rand(5, 5, seed=8, scale=0.3))
    r = generate(model, PROMPT * 4, s, (END,), EOS, 8, 5, cfg.latent)
    adv = rand(*r.kind.shape, seed=4, scale=20)
    weights, way = step_weights(r.action_mask), rand(5, 5, seed=6)
    loss = lambda m: policy_loss(m, r, adv, weights, cfg, s, reference)[0]
    loss(model).backward()
    step = lambda h: loss(TableLM(TABLE + h * way)).item()
    slope = (8 * (step(.01) - step(-.01)) - (step(.02) - step(-.02))) / 0.12
    assert (model.table.grad * way).sum().item() == pytest.approx(slope, rel=0.01, abs=1e-3)
    assert abs(slope) > 0.02


def test_kl_penalty_is_the_kl_to_the_reference_and_pulls_towards_it():
    """One word a rollout: the penalty's mean is a KL that can be enumerated."""
    cfg, model = config("explicit", kl_coef=0.5), TableLM(TABLE)
    s, reference = sampling_of(cfg, END), TableLM(TABLE + rand(5, 5, seed=8))
    r = generate(model, PROMPT, s, (END,), EOS, 20_000, 1, thinking=False)
    weights, nothing = step_weights(r.action_mask), torch.zeros(20_000, 1)
    loss, metrics = policy_loss(model, r, nothing, weights, cfg, s, reference)
    p, q = (m.table[C].detach().log_softmax(-1) for m in (model, reference))
    kl = (p.exp() * (p - q)).sum().item()
    assert kl > 0.05 and metrics["kl_penalty"] == pytest.approx(kl, rel=0.1)
    assert loss.item() == pytest.approx(0.5 * metrics["kl_penalty"])
    loss.backward()
    assert ((reference.table - model.table) * -model.table.grad).sum() > 0
    same = policy_loss(model, r, nothing, weights, cfg, s, TableLM(TABLE))[1]
    assert same["kl_penalty"] == pytest.approx(0, abs=1e-6)


def pipeline_gradient(s, cfg, reward, groups, steps, batches=24, G=8):
    """Gradient of the expected reward as training estimates it: one row per batch."""
    model, out = TableLM(TABLE), []
    for i in range(batches):
        rows = torch.arange(groups * G) + i * groups * G
        r = generate(model, PROMPT * groups, s, (END,), EOS, G, steps, cfg.latent, rows=rows)
        R = reward(r).view(groups, G)
        # undo the division by the spread, and the shrinkage by a mean that holds its own reward
        scale = (R.std(1, keepdim=True) + 1e-6) * G / (G - 1)
        adv = (group_advantages(R) * scale).flatten()[:, None] * r.action_mask
        model.zero_grad()
        weights = step_weights(r.action_mask, "seq-mean-token-sum")
        policy_loss(model, r, adv, weights, cfg, s)[0].backward()
        out.append(-model.table.grad.flatten())
    return torch.stack(out)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_the_pipeline_equals_enumeration(temperature):
    """Two words are drawn; the reward is a table; the exact gradient sums over all pairs."""
    table, rewarded = TABLE.clone().requires_grad_(), {(A, B), (A, C), (B, EOS), (EOS,), (C, C)}
    p, J = (table / temperature).softmax(-1), 0
    for a, b in itertools.product(range(5), repeat=2):
        if a != EOS: J = J + p[C, a] * p[a, b] * ((a, b) in rewarded)
    (J + p[C, EOS] * ((EOS,) in rewarded)).backward()

    def reward(r): return torch.tensor([float(tuple(r.tokens(i)) in rewarded)
                                        for i in range(len(r.ids))])

    cfg = config("explicit", temperature=temperature)
    samples = pipeline_gradient(sampling_of(cfg, END), cfg, reward, groups=100, steps=2)
    mean, error = standard_error(samples)
    truth = table.grad.flatten()
    assert ((mean - truth).abs() < 5 * error + 1e-6).all()
    assert (truth.abs() > 5 * error).sum() > 4                # it could have failed
    assert torch.cosine_similarity(mean, truth, dim=0) > 0.98


def latent_reward(r):
    """Smooth in the mixtures, and with a bonus for ending: latents, END and text all matter."""
    weights = mixture_weights(r.scores, Sampling(top_k=2)).nan_to_num()
    share = (weights * (r.ids[..., :2] == A)).sum(-1) * r.latent_mask
    text = ((r.ids[..., 0] == B) & ~r.latent_mask & r.response_mask).any(1)
    return share.sum(1) / 3 + text.float()


def both_gradients(method, n=30_000, h=0.2, **settings):
    """Policy gradient against differences of the mean reward under the same noise."""
    cfg = config(method, top_k=2, top_p=1.0, noise_scale=0.7, **settings)
    s = sampling_of(cfg, END)
    samples = pipeline_gradient(s, cfg, latent_reward, groups=n // 8 // 10, steps=3, batches=10)

    def mean_reward(i, h):
        table = TABLE.flatten().clone()
        table[i] += h
        model = TableLM(table.view(5, 5))
        r = generate(model, PROMPT, s, (END,), EOS, n, 3, seed=1)
        return latent_reward(r).view(10, -1).mean(1)

    slopes = torch.stack([(mean_reward(i, h) - mean_reward(i, -h)) / (2 * h) for i in range(25)], 1)
    (ours, error), (truth, noise) = standard_error(samples), standard_error(slopes)
    return ours, truth, (error ** 2 + noise ** 2).sqrt()


def test_exact_score_climbs_the_expected_reward():
    ours, truth, error = both_gradients("exact", masking="off")
    assert ((ours - truth).abs() < 5 * error + 0.003).all()    # 0.003: curvature of the differences
    assert torch.cosine_similarity(ours, truth, dim=0) > 0.97


@pytest.mark.parametrize("method", ["vanilla", "centred"])
def test_published_score_does_not(method):
    """Selection and scale leave the surrogate a bias; centring removes its mean, not its tilt."""
    ours, truth, error = both_gradients(method, n=10_000)
    assert ((ours - truth).abs() > 10 * error).any()
    assert torch.cosine_similarity(ours, truth, dim=0) < 0.9
