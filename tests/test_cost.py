"""Fast paths give the plain loop's words and scores; where their assumptions fail they go the slow way."""
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import latent_grpo.sampling as sampling
from helpers import hf, rand
from latent_grpo.cli import main
from latent_grpo.cost import (SMALL, TOY, bench_table, build, exponent, floor, naive_logps,
                              plain_draw, plain_generate, score_case, spread, step_times)
from latent_grpo.rollout import _read_prompts, generate, replay_logps
from latent_grpo.sampling import (END, LATENT, PAD, TEXT, Sampling, draw_scored, largest, noise_keys,
                                  score_steps, word_logps)

KEYS = noise_keys(5, torch.arange(64))


def agree(logits, thinking, s):
    """Ids, perturbed scores, kind, log-probabilities of latent steps, as of the plain sampler, bit by bit."""
    keys = KEYS[:len(logits)]
    fast, slow = draw_scored(logits, keys, thinking, s), plain_draw(logits, keys, thinking, s)
    at = thinking[:, None].expand_as(fast[0])
    assert torch.equal(fast[0][at], slow[0][at]) and torch.equal(fast[0][:, 0], slow[0][:, 0])
    for f, p in zip(fast[1:3], slow[1:3], strict=True): assert torch.equal(f, p)
    assert torch.equal(fast[3][thinking], slow[3][thinking])
    torch.testing.assert_close(fast[3], slow[3], atol=1e-6, rtol=1e-6)    # a sum over another number of words


# --- the same words and scores ---

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.sampled_from([2, 7, 40, 130, 700, 3000]), st.integers(1, 12),
       st.sampled_from([0.05, 1.0, 4.0, 30.0]), st.integers(0, 999),
       st.sampled_from([0.3, 0.95, 0.999]), st.sampled_from([0, 1, 5, 300]), st.booleans())
def test_the_engine_draws_what_a_sorted_vocabulary_with_noise_for_every_word_draws(
        N, V, K, sharp, seed, top_p, top_k, clipped):
    """Any shape, both phases in a batch, flat and sharp logits, truncated text or not."""
    s = Sampling(top_k=min(K, V), top_p=top_p, noise_scale=.7, text_top_k=top_k, end_id=1,
                 text_top_p=top_p if top_k else 1.0, clip=(-1.5, 3.) if clipped else None)
    agree(rand(N, V, seed=seed, scale=sharp), rand(N, seed=seed) > 0, s)


@pytest.mark.parametrize("change", [dict(top_k=1), dict(noise_scale=0.0), dict(temperature=0.0),
                                    dict(temperature=0.6, text_top_p=0.9), dict(shift=1.5),
                                    dict(gumbel_tau=1e-6)], ids=str)
def test_degenerate_settings(change):
    agree(rand(40, 900, scale=3), torch.arange(40) % 2 == 0, replace(Sampling(top_k=5, end_id=3), **change))


def test_settings_of_each_row_are_used_in_mixed_phases():
    logits, thinking = rand(12, 300, scale=3), torch.arange(12) % 3 > 0
    s = Sampling(top_k=4, noise_scale=torch.linspace(.2, 2, 12), top_p=torch.linspace(.5, .99, 12),
                 temperature=torch.linspace(.4, 1.6, 12), text_top_k=9)
    whole = draw_scored(logits, KEYS[:12], thinking, s)
    for i in range(12):
        one = replace(s, **{n: getattr(s, n)[i].item() for n in ("noise_scale", "top_p", "temperature")})
        alone = plain_draw(logits[i:i + 1], KEYS[i:i + 1], thinking[i:i + 1], one)
        for f, p in zip(whole[1:3], alone[1:3], strict=True): assert torch.equal(f[i], p[0])
        torch.testing.assert_close(whole[3][i], alone[3][0], atol=1e-6, rtol=1e-6)
        assert torch.equal(whole[0][i, :4 if thinking[i] else 1], alone[0][0, :4 if thinking[i] else 1])


def test_ties_give_a_valid_choice():
    """Of words that are equally good any may be taken: the values agree, and no word comes twice."""
    x = torch.randint(5, (20, 4000), generator=torch.Generator().manual_seed(0)).float()
    values, ids = largest(x, 40)
    assert torch.equal(values, x.topk(40)[0]) and torch.equal(x.gather(1, ids), values)
    assert all(len(set(row)) == 40 for row in ids.tolist())


@pytest.mark.parametrize("thinking", [True, False])
def test_rollouts_are_those_of_the_plain_loop(thinking):
    """Shared prompts, rows that leave, room behind the cache: nothing of it changes a draw."""
    model, s = hf("Llama", vocab=14, seed=3, sharp=30.), Sampling(top_k=3, text_top_k=12)
    prompts = [[3, 4, 5], [7], [8, 9, 10, 11]]
    r = generate(model, prompts, s, (2,), 0, 8, 30, thinking)
    ids, scores, kind, logps = plain_generate(model, prompts, s, 2, 0, 8, 30, thinking)
    T, real = r.kind.shape[1], r.response_mask
    assert torch.equal(kind[:, :T], r.kind) and (kind[:, T:] == PAD).all()
    assert len(set(real.sum(1).tolist())) > 1 and r.ended.any()
    at = real & (r.kind == LATENT)
    assert torch.equal(ids[:, :T][at], r.ids[at])
    assert torch.equal(ids[:, :T, 0][real], r.ids[..., 0][real])
    torch.testing.assert_close(scores[:, :T][at], r.scores[at], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logps[:, :T][real], r.logps[real], atol=1e-4, rtol=1e-4)


def test_all_finish_at_the_first_step():
    model = hf("Llama", vocab=12)
    last = lambda t, rows, ids, scores, kind: (ids * 0, scores, torch.full_like(kind, TEXT))
    r = generate(model, [[3, 4], [5]], Sampling(top_k=3), (2,), 0, 3, 9, edit=last)
    assert r.kind.shape == (6, 1) and r.ended.all() and (r.kind == TEXT).all()


# --- where an assumption fails ---

def test_a_flat_distribution_is_looked_at_a_second_time(monkeypatch):
    """64 words first; all that may be needed, only where those do not hold the nucleus."""
    looked = []
    monkeypatch.setattr(sampling, "largest", lambda x, n: looked.append(n) or largest(x, n))
    sharp, flat, s = rand(4, 5000, scale=20), rand(4, 5000, scale=.1), Sampling(top_k=3)
    sampling.candidates(sharp.log_softmax(-1), s)
    assert looked == [sampling.FEW]
    sampling.candidates(flat.log_softmax(-1), s)
    assert looked == [sampling.FEW, sampling.FEW, 256]
    one = torch.cat([sharp, flat[:1]])        # a single row is enough
    sampling.candidates(one.log_softmax(-1), s)
    assert looked[3:] == [sampling.FEW, 256]
    agree(one, torch.ones(5, dtype=torch.bool), s)


def test_a_cache_without_room_is_copied_to_one_with_room():
    model = hf("Llama", vocab=30)
    with torch.no_grad():
        _, _, _, cache = _read_prompts(model, [[3, 4, 5]], 2)
        places, x = [], model.embed[torch.tensor([[4], [5]])]
        for t in range(8):
            model.hidden(x, torch.ones(2, 4 + t, dtype=torch.bool), cache, True)
            places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places)) == 2 and cache.get_seq_length() == 11    # room for 8, then for 16


# --- the update ---

def test_scores_in_chunks_have_the_values_and_gradients_of_the_naive_ones():
    model, r, s = score_case(3, 20, 500, 16)
    push = rand(3, 20)

    def gradients(logps):
        model.zero_grad()
        (logps * push).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours, theirs = replay_logps(model, r, s, chunk=3000), naive_logps(model, r, s)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    pairs = list(zip(gradients(ours), gradients(theirs), strict=True))
    assert len(pairs) > 2
    for a, b in pairs: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_table_of_log_probabilities_is_kept():
    """What autograd keeps for latent and text steps: the logits, and nothing else of their size."""
    logits, kept = rand(8, 1000).requires_grad_(), []
    thought = torch.tensor([LATENT] * 4 + [END] * 4)
    save = lambda t: kept.append(t) or t
    for kind in (thought, torch.full((8,), TEXT)):
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            score_steps(logits, torch.zeros(8, 3).long(), torch.zeros(8, 3), kind, Sampling(top_k=3))
    large = {t.data_ptr() for t in kept if t.numel() >= 8000}
    assert len(large) <= 2        # the logits, and those divided by the temperature


def test_word_logps_in_double_agree_with_finite_differences():
    z, ids = rand(4, 9).double().requires_grad_(), torch.tensor([[0, 3], [8, 8], [1, 2], [5, 0]])
    assert torch.autograd.gradcheck(lambda x: word_logps(x, ids), (z,))


# --- the bench ---

def test_floor_by_hand():
    """Two numbers of a model of one layer with all sizes 1: 4 + 3 + 1 weights."""
    one = replace(TOY, vocab=1, width=1, layers=1, heads=1, ff=1)
    f = floor(one, 2, 5, dict(copy=1., matrix=1e9))
    assert one.weights == 8 and f["bytes"] == 4 * (8 + 2 * 5 * 2 + 2) == f["seconds"]
    assert f["operations"] == 2 * 8 * 2 + 4 * 5 * 2
    assert floor(SMALL, 1, 1, dict(copy=1e99, matrix=1.))["seconds"] >= 2 * SMALL.weights


def test_weights_are_those_of_the_model():
    matrices = {n: p.numel() for n, p in build(TOY).named_parameters() if "norm" not in n}
    assert sum(matrices.values()) == TOY.weights


def test_a_step_is_a_difference(monkeypatch):
    """A prompt that takes 100 and steps that take 3: a step takes 3."""
    now = [0.]
    monkeypatch.setattr("latent_grpo.cost.clock", lambda device="cpu": now[0])
    def work(T): now[0] += 100 + 3 * T
    assert step_times(dict(x=work), 7, 2)["x"] == [3, 3, 3]


def test_summaries():
    assert spread([4., 1., 3., 2., 5.]) == dict(median=3, min=1, q1=2, q3=4, n=5)
    assert exponent([1, 10, 100], [2., 20., 200.]) == pytest.approx(1)


def test_bench_writes_every_part_with_its_origin(tmp_path, capsys):
    assert main(["bench", "--quick", "--out", str(tmp_path / "b.json")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert {r["part"] for r in found["rows"]} == set("abcdef")
    assert {"command", "commit", "hardware", "date", "rates"} <= set(found)
    times = [r for r in found["rows"] if "unit" not in r]
    assert len(times) > 40 and all(0 < r["min"] <= r["median"] for r in times)
    assert all(r["floor"] < r["median"] for r in times if "floor" in r)    # nothing beats its floor
    assert not any("aim" in r for r in found["rows"])       # aims are for the full sizes
    assert capsys.readouterr().out.strip() == bench_table(found)


def test_an_unknown_part_is_named(capsys):
    assert main(["bench", "--only", "a,q"]) == 2
    assert "--only q: choose among a,b,c,d,e,f" in capsys.readouterr().err
