"""Rollouts do not depend on their batch, replay gives their numbers back, phases end as stated."""
from dataclasses import replace

import pytest
import torch

from helpers import END, EOS, METHODS, MODELS, config, rand, same, tiny
from latent_grpo.latent import mix
from latent_grpo.model import TableLM
from latent_grpo.noise import one_sided
from latent_grpo.presets import sampling_of
from latent_grpo.rollout import (generate, join, replay_logps, replay_states, select_groups,
                                 step_inputs)
from latent_grpo.sampling import END as END_STEP
from latent_grpo.sampling import FORCED, LATENT, PAD, TEXT, Sampling

PROMPTS = [[3, 4, 5, 6, 1], [7, 1], [8, 9, 1], [3, 1]]    # four lengths: three need padding
SAMPLING = Sampling(end_id=END, top_k=3, noise_scale=0.7)


def draw(model, prompts=PROMPTS, sampling=SAMPLING, G=2, steps=8, **kwargs):
    return generate(model, prompts, sampling, (END,), EOS, G, steps, **kwargs)


def trim(r, P, T):
    """A rollout with P prompt columns and T steps; what is cut must be padding."""
    assert not r.prompt_mask[:, :-P].any() and (r.kind[:, T:] == PAD).all()
    return replace(r, prompt_ids=r.prompt_ids[:, -P:], prompt_mask=r.prompt_mask[:, -P:],
                   **{n: getattr(r, n)[:, :T] for n in ("ids", "scores", "kind", "logps")})


# --- batches ---

@pytest.mark.parametrize("thinking", [True, False], ids=["latent", "explicit"])
@pytest.mark.parametrize("name", MODELS)
def test_batch_of_one_equals_batch_of_many(name, thinking):
    model, G = MODELS[name](), 2
    many = draw(model, thinking=thinking)
    assert len(set(many.response_mask.sum(1).tolist())) > 1    # rows leave at different times
    states = replay_states(model, many, SAMPLING)
    for b, prompt in enumerate(PROMPTS):
        rows = torch.arange(G * b, G * b + G)
        one = draw(model, [prompt], thinking=thinking, rows=rows)
        part = trim(select_groups(many, torch.tensor([b])), len(prompt), one.kind.shape[1])
        same(one, part)
        alone, at = replay_states(model, one, SAMPLING), one.response_mask
        torch.testing.assert_close(alone[at], states[rows, :at.shape[1]][at], atol=1e-5, rtol=1e-4)


def test_order_of_prompts_changes_nothing():
    model, order = tiny(), [2, 0, 3, 1]
    rows = torch.tensor(order)[:, None] * 2 + torch.arange(2)
    shuffled = draw(model, [PROMPTS[b] for b in order], rows=rows.flatten())
    same(shuffled, select_groups(draw(model), torch.tensor(order)))


@pytest.mark.parametrize("name", MODELS)
def test_prompt_cache_of_a_group_equals_repeated_prompts(name):
    model = MODELS[name]()
    shared, repeated = draw(model, G=3), draw(model, [p for p in PROMPTS for _ in range(3)], G=1)
    assert (shared.group_size, repeated.group_size) == (3, 1)
    same(shared, repeated)


def test_noise_comes_from_seed_and_row_only():
    model, state = tiny(), torch.get_rng_state()
    first = draw(model)
    assert torch.equal(torch.get_rng_state(), state)    # nothing was drawn from it either
    with torch.random.fork_rng():
        torch.manual_seed(123)
        same(draw(model), first)
    assert not torch.equal(draw(model, seed=1).ids[:, 0], first.ids[:, 0])
    other = draw(model, rows=torch.arange(100, 108))
    assert not torch.equal(other.ids[:, 0], first.ids[:, 0])


def test_rows_of_a_group_differ():
    ids = draw(tiny(sharp=1.0), G=8, steps=1).ids
    assert len({tuple(x) for x in ids[:8, 0].tolist()}) > 2


# --- replay ---

@pytest.mark.parametrize("noise_free", [False, True], ids=["sampled", "noise-free"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_replay_equals_generation(method, name, noise_free):
    cfg, model = config(method), MODELS[name]()
    s = sampling_of(cfg, END, noise_free)
    r = draw(model, sampling=s, thinking=cfg.latent)
    A = rand(*r.kind.shape)
    replayed = replay_logps(model, r, s, A).detach()
    torch.testing.assert_close(replayed, r.logps, atol=1e-5, rtol=1e-5)
    assert (r.logps[~r.action_mask] == 0).all()
    other = replay_logps(MODELS[name](seed=1), r, s, A).detach()
    assert (other - r.logps).abs().max() > 0.1


def test_replay_with_settings_that_differ_by_row():
    model, N = tiny(), 2 * len(PROMPTS)
    s = replace(SAMPLING, noise_scale=torch.linspace(0.2, 1.5, N),
                gumbel_tau=torch.linspace(0.5, 2, N), temperature=torch.linspace(0.5, 1.5, N))
    r = draw(model, sampling=s)
    torch.testing.assert_close(replay_logps(model, r, s), r.logps, atol=1e-5, rtol=1e-5)
    for row in range(N):    # finished rows leave the batch, and take their settings with them
        one = replace(s, **{n: getattr(s, n)[row].item()
                            for n in ("noise_scale", "gumbel_tau", "temperature")})
        alone = draw(model, [PROMPTS[row // 2]], one, G=1, rows=torch.tensor([row]))
        T = alone.kind.shape[1]
        assert torch.equal(alone.ids[0], r.ids[row, :T])
        torch.testing.assert_close(alone.logps[0], r.logps[row, :T], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["released", "exact", "centred"])
def test_replay_in_chunks_is_the_same_with_its_gradient(method):
    cfg, model = config(method), tiny()
    s = sampling_of(cfg, END)
    r = draw(model, sampling=s)
    A = rand(*r.kind.shape)

    def value_and_gradients(chunk):
        model.zero_grad()
        value = replay_logps(model, r, s, A, chunk)
        (value * A).sum().backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    whole, pieces = value_and_gradients(1 << 24), value_and_gradients(5 * 12)
    assert len(whole) > 10
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_replay_does_not_teach_the_embeddings():
    model = tiny()
    r = draw(model)
    replay_logps(model, r, SAMPLING).sum().backward()
    assert model.embed.grad is None and model.unembed.weight.grad.abs().max() > 0


# --- latents ---

def test_one_hot_latent_is_the_word():
    embed, ids, scores = rand(9, 5), torch.tensor([[4, 2, 7], [1, 0, 3]]), torch.zeros(2, 3)
    scores[:, 1:] = -1e9    # the best word has all the weight
    word = step_inputs(embed, ids, scores, torch.full((2,), TEXT), SAMPLING)
    assert torch.equal(word, embed[ids[:, 0]])
    latent = step_inputs(embed, ids, scores, torch.full((2,), LATENT), SAMPLING)
    torch.testing.assert_close(latent, word)
    half = mix(embed, ids[:, :2], torch.full((2, 2), 0.5))
    torch.testing.assert_close(half, (embed[ids[:, 0]] + embed[ids[:, 1]]) / 2)


@pytest.mark.parametrize("name", MODELS)
def test_latents_of_one_component_decode_like_words(name):
    """K = 1 with plain Gumbel noise is sampling at temperature 1, word for word."""
    model = MODELS[name]()
    s = Sampling(end_id=END, top_k=1, top_p=1.0, clip=None)
    latent, text = draw(model, sampling=s), draw(model, sampling=s, thinking=False)
    assert torch.equal(latent.ids[:, 0], text.ids[:, 0])
    before_end = (latent.kind == LATENT) | (latent.kind == END_STEP)
    stopped = (text.ids[..., 0] == EOS).cumsum(1) - (text.ids[..., 0] == EOS).long() > 0
    T = min(latent.kind.shape[1], text.kind.shape[1])
    both = before_end[:, :T] & ~stopped[:, :T] & (text.kind[:, :T] == TEXT)
    assert both.sum() > 12
    assert torch.equal(latent.ids[:, :T, 0][both], text.ids[:, :T, 0][both])


# --- phases and ends ---

def chain(*words, vocab=12):
    """A bigram model that says these words in order, whatever comes before the first."""
    table = torch.full((vocab, vocab), -40.0)
    table[:, words[0]] = 0
    for a, b in zip(words, words[1:]): table[a], table[a, b] = -40, 40
    return TableLM(table)


def test_marker_of_several_ids():
    """The rest of the marker is forced: no action, no probability, fed word by word."""
    table = rand(12, 12, scale=2)
    table[:, 5] += 2    # first id of the marker
    model = TableLM(table)
    s = replace(SAMPLING, end_id=-1)    # `generate` takes the end id from the marker
    r = generate(model, PROMPTS, s, (5, 6, 7), EOS, 4, 12)
    for i in range(len(r.ids)):
        kind, words = r.kind[i].tolist(), r.ids[i, :, 0].tolist()
        if END_STEP not in kind: continue
        t = kind.index(END_STEP)
        assert kind[:t] == [LATENT] * t and words[t] == 5
        rest = slice(t + 1, t + 3)
        n = len(kind[rest])
        assert kind[rest] == [FORCED, FORCED][:n] and words[rest] == [6, 7][:n]
        assert r.logps[i, rest].tolist() == [0] * n
        assert set(kind[t + 3:]) <= {TEXT, PAD}
    assert (r.kind == TEXT).any() and r.ended.any()
    assert torch.equal(r.action_mask, (r.kind != PAD) & (r.kind != FORCED))
    torch.testing.assert_close(replay_logps(model, r, s), r.logps)


def test_text_after_the_marker_follows_the_model():
    """After a marker of two ids, text continues from the second: nothing of the mode is left."""
    r = generate(chain(5, 6, 8, EOS), PROMPTS, SAMPLING, (5, 6), EOS, 2, 9)
    assert r.kind.tolist() == [[END_STEP, FORCED, TEXT, TEXT]] * 8 and r.ended.all()
    assert [r.tokens(i) for i in range(8)] == [[5, 6, 8, EOS]] * 8


def test_all_end_at_once():
    r = draw(chain(END, 5, EOS), steps=30)
    assert r.kind.tolist() == [[END_STEP, TEXT, TEXT]] * 8 and r.ended.all()
    assert r.latent_lengths.tolist() == [0] * 8 and r.text_lengths.tolist() == [3] * 8
    torch.testing.assert_close(replay_logps(chain(END, 5, EOS), r, SAMPLING), r.logps)


def test_none_ever_ends():
    table = rand(12, 12)
    table[:, END] = -40
    r = draw(TableLM(table), steps=7)
    assert (r.kind == LATENT).all() and r.kind.shape == (8, 7) and not r.ended.any()
    assert r.tokens(0) == [] and r.latent_lengths.tolist() == [7] * 8


@pytest.mark.parametrize("steps,ended", [(3, True), (2, False)])
def test_an_end_on_the_last_step_counts(steps, ended):
    r = draw(chain(END, 5, EOS), steps=steps)
    assert r.ended.tolist() == [ended] * 8 and r.kind.shape[1] == steps


def test_explicit_rollouts_are_text_throughout():
    r = draw(tiny(), thinking=False)
    assert set(r.kind.unique().tolist()) <= {TEXT, PAD} and (r.ids[..., 0] == END).any()


def test_one_sided_noise_makes_the_same_rollouts():
    model = tiny()
    two, one = draw(model), draw(model, sampling=one_sided(SAMPLING))
    assert torch.equal(two.ids, one.ids) and torch.equal(two.kind, one.kind)


# --- batches of rollouts ---

def test_select_and_join_give_the_batch_back():
    r = draw(tiny())
    pieces = [select_groups(r, torch.tensor(g)) for g in ([0], [1, 2], [3])]
    assert [len(p.ids) for p in pieces] == [2, 4, 2]
    back = join(pieces)
    assert all(torch.equal(getattr(back, n), getattr(r, n)) for n in
               ("prompt_ids", "prompt_mask", "ids", "scores", "kind", "logps", "ended", "rows"))


def test_join_pads_and_replays():
    """Batches with other prompt and response lengths join without a change in their numbers."""
    model = tiny()
    parts = [draw(model, PROMPTS[:1], steps=4), draw(model, PROMPTS[1:2], steps=8, seed=0,
                                                     rows=torch.arange(9, 11))]
    both = join(parts)
    assert both.prompt_ids.shape[1] == 5 and both.kind.shape[1] == max(
        p.kind.shape[1] for p in parts)
    replayed = replay_logps(model, both, SAMPLING)
    torch.testing.assert_close(replayed, both.logps, atol=1e-5, rtol=1e-5)
    for b, part in enumerate(parts):
        same(trim(select_groups(both, torch.tensor([b])), part.prompt_ids.shape[1],
                  part.kind.shape[1]), part)


@pytest.mark.parametrize("prompts", [[], [[3], []]], ids=["no prompt", "empty prompt"])
def test_empty_prompts_are_an_error(prompts):
    with pytest.raises(ValueError, match="prompts: at least one, none of them empty"):
        draw(tiny(), prompts)
