"""Small models, sampled batches and statistics that several test files share."""
import torch

from latent_grpo.model import HFLM, TinyLM
from latent_grpo.presets import METHODS, make_config    # noqa: F401, METHODS is for the tests
from latent_grpo.rollout import Rollout
from latent_grpo.sft import train_sft
from latent_grpo.tasks import Task, WordVocab

EOS, THINK, END = 0, 1, 2     # of every tiny vocabulary here; ids from 3 on are ordinary words
WORDS = ["<eos>", "<think>", "</think>", *"abcdefghi"]


def rand(*shape, seed=0, scale=1.0):
    """Normal numbers that do not touch the global random state."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(vocab=12, seed=0, sharp=6.0):
    """A TinyLM whose next-word distributions are far from uniform."""
    model = TinyLM(vocab, width=16, layers=2, heads=2, ff=24, seed=seed).eval()
    with torch.no_grad(): model.unembed.weight.mul_(sharp)
    return model


def hf(kind, vocab=12, seed=0, sharp=20.0):
    """A random Llama, Qwen2 or GPT2 (the one with learned positions) behind our protocol."""
    import transformers as tf
    config = dict(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
                  eos_token_id=None)
    if kind != "GPT2": config |= dict(intermediate_size=24, num_key_value_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(tf, f"{kind}Config")(**config)
        lm = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(): lm.lm_head.weight.mul_(sharp)
    return HFLM(lm)


# Seeds with which some rollouts end early.
MODELS = {"tiny": tiny, "Llama": lambda seed=3: hf("Llama", seed=seed),
          "Qwen2": lambda seed=0: hf("Qwen2", seed=seed),
          "GPT2": lambda seed=0: hf("GPT2", seed=seed)}


def word_task(rows=64, answer=None):
    """A task of two-word prompts; the reward needs the end marker and the right last word."""
    vocab, letters = WordVocab(WORDS), "abcdefghi"
    make = lambda i: dict(problem=f"{letters[i % 9]} {letters[(i // 9) % 9]}", id=str(i),
                          answer=answer or letters[(i + i // 9) % 3], cot="a b c")
    data = {"train": [make(i) for i in range(rows)],
            "validation": [make(i) for i in range(8)], "test": [make(i) for i in range(8)]}
    return Task("words", data, vocab.encode, vocab.decode, len(vocab), (END,), EOS,
                lambda p: f"{p} <think>", grade=lambda text, gold, row: gold in text.split(),
                rate=2)


def started(task, latent=True, steps=25):
    """A TinyLM that has seen a little supervised training: it ends sometimes, right sometimes."""
    model = TinyLM(task.vocab_size, width=16, layers=2, heads=2, ff=24)
    train_sft(model, task, latent, steps, 16, 1e-2, bar=False)
    return model


def config(method="vanilla", **settings):
    """A configuration for the tasks and models above."""
    small = dict(top_k=3, max_steps=8, group_size=4, prompts=6, groups=6, max_extra=3,
                 minibatches=2, steps=4, lr=1e-2, eval_every=0, noise_scale=0.7)
    return make_config("toy", method, **small | settings)


def same(a: Rollout, b: Rollout, atol=1e-5):
    """Assert that two rollouts took the same steps, with equal scores and log-probabilities."""
    assert torch.equal(a.kind, b.kind) and torch.equal(a.ended, b.ended)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.scores, b.scores, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.logps, b.logps, atol=atol, rtol=1e-5)


def standard_error(samples):
    """Mean over the first axis and its standard error."""
    return samples.mean(0), samples.std(0) / len(samples) ** 0.5
