"""Any causal model of transformers: loaded with its tokenizer, trained whole or thin, saved for others."""
import copy

import pytest
import torch

from helpers import EOS, config, word_task
from latent_grpo.cli import main
from latent_grpo.model import HFLM, layers, pretrained
from latent_grpo.presets import PROMPT, build_model, make_config, sampling_of, text_task
from latent_grpo.rollout import generate, replay_logps
from latent_grpo.train import load_policy, make_optimizer, save_policy, train_rl

FAMILIES = ["Llama", "Qwen2"]
TEXTS = ["How many apples are 2 and 3?", "She has 12 apples.", "think of it", "</ think >"]
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def family(kind, tied=False, vocab=12, **more):
    """A random causal LM of this family, as transformers makes it."""
    import transformers as tf
    size = dict(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        cfg = getattr(tf, f"{kind}Config")(**size, tie_word_embeddings=tied, bos_token_id=None,
                                           eos_token_id=EOS, **more)
        return tf.AutoModelForCausalLM.from_config(cfg)


def tokenizer(markers=("<think>", "</think>"), chat=None):
    """Byte-level BPE; without `markers` they are ordinary text, so several ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", *markers], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>")
    tok.chat_template = chat
    return tok


def problems(n=12): return [dict(problem=f"How many apples are {i} and 3?", answer=str(i + 3), cot="3 3",
                                 id=str(i)) for i in range(n)]


def saved(path, kind="Llama", tied=False, **tok):
    """Model and tokenizer in a folder, as they come from the hub; each family has its own class of tokenizer."""
    from transformers import AutoTokenizer
    family(kind).config.save_pretrained(path)
    tokenizer(**tok).save_pretrained(path)
    tok = AutoTokenizer.from_pretrained(path)
    family(kind, tied, vocab=1 + max(tok.get_vocab().values())).save_pretrained(path)
    tok.save_pretrained(path)
    return tok


def weights(model): return [p.detach().clone() for p in model.parameters()]


def step(model, cfg, steps=2):
    """What training with this configuration does to a model of twelve words."""
    rows = train_rl(model, word_task(), cfg, bar=False)
    assert len(rows) == steps and all(r["groups"] for r in rows)
    return rows


# --- loading ---

@pytest.mark.parametrize("style", ["plain", "low", "high"])
@pytest.mark.parametrize("markers", [("<think>", "</think>"), ()], ids=["one id", "several ids"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_model_and_its_tokenizer_make_a_task(kind, markers, style, tmp_path):
    from transformers import AutoTokenizer
    tok = saved(tmp_path, kind, markers=markers, chat=CHAT)
    cfg = make_config("paper-low", model=str(tmp_path), prompt_style=style, train="x.jsonl", top_k=4,
                      max_candidates=64)
    task = text_task(cfg, AutoTokenizer.from_pretrained(tmp_path), dict(train=problems()))
    model = build_model(cfg, task)
    assert (len(task.end_latent_ids) > 1) == (not markers) and task.eos_id == tok.eos_token_id
    prompt = task.decode(task.prompt(task.rows["train"][2]))
    assert prompt.endswith("<think>") and "2 and 3?" in prompt
    assert prompt == {
        "plain": "How many apples are 2 and 3?\n<think>",
        "low": f"<user>{PROMPT}\nHow many apples are 2 and 3?\n<assistant><think>",
        "high": f"<system>{PROMPT}\n<user>How many apples are 2 and 3?\n<assistant><think>"}[style]
    s = sampling_of(cfg, task.end_latent_ids[0])
    r = generate(model, [task.prompt(x) for x in task.rows["train"][:3]], s, task.end_latent_ids,
                 task.eos_id, 2, 6)
    torch.testing.assert_close(replay_logps(model, r, s), r.logps, atol=1e-5, rtol=1e-5)


def test_chat_prompts_need_a_template():
    cfg = make_config("paper-low", train="x.jsonl")
    with pytest.raises(ValueError, match="prompt_style='low': the tokenizer has no chat template"):
        text_task(cfg, tokenizer(), dict(train=problems()))


def test_a_start_marker_that_cannot_be_written_is_refused():
    from test_errors import ROWS, tokenizer as words
    with pytest.raises(ValueError, match="start token.*'<think>'.*<unk>"):
        text_task(make_config("gsm8k-tiny"), words("</think>"), ROWS)


def test_ids_beyond_the_embedding_table(tmp_path):
    """One added token is enough; its id can also lie beyond a gap that `len` does not see."""
    tok = saved(tmp_path)
    rows = 1 + max(tok.get_vocab().values())
    tok.add_special_tokens(dict(additional_special_tokens=["<|compress_token|>"]))
    cfg = make_config("paper-low", model=str(tmp_path), prompt_style="plain", train="x.jsonl")
    task = text_task(cfg, tok, dict(train=problems()))
    assert task.vocab_size == rows + 1
    with pytest.raises(ValueError, match=f"has {rows} rows, and its tokenizer ids up to {rows}.*resize=true"):
        build_model(cfg, task)
    cfg.resize = True
    larger, plain = build_model(cfg, task), pretrained(str(tmp_path))
    assert len(larger.embed) == larger.lm.lm_head.out_features == rows + 1
    assert torch.equal(larger.embed[:rows], plain.embed) and larger.embed[rows].abs().sum() > 0
    assert torch.equal(build_model(cfg, task).embed, larger.embed)    # the new row has a seed


def test_the_papers_starts_are_one_line():
    for preset, model in (("paper-low", "LLaMA3.2-1B"), ("paper-high", "Qwen2.5-Math-7B")):
        cfg = make_config(preset, "paper", train="x.jsonl")
        assert model in cfg.model and "Latent-SFT" in cfg.model and cfg.dtype == "float32"
        assert cfg.compute == "bfloat16" and not cfg.explicit_sft and not cfg.latent_sft


# --- what is trained ---

@pytest.mark.parametrize("kind", FAMILIES)
def test_embeddings_stay_and_a_tied_head_with_them(kind):
    cfg = config(steps=2, groups=3)
    tied, free = HFLM(family(kind, tied=True)), HFLM(family(kind))
    assert tied.lm.lm_head.weight is tied.embed and free.lm.lm_head.weight is not free.embed
    for model in (tied, free):
        before, head = weights(model), model.lm.lm_head.weight.clone()
        names = [n for n, _ in model.named_parameters()]
        step(model, cfg)
        moved = {n for n, a, b in zip(names, before, model.parameters()) if not torch.equal(a, b)}
        frozen = set(names) - moved
        assert frozen == {"lm.model.embed_tokens.weight"}
        assert torch.equal(head, model.lm.lm_head.weight) == (model is tied)


@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputed_layers_give_the_same_gradient_from_fewer_tensors(kind):
    gradients, kept = [], []
    for checkpointing in (False, True):
        model, sizes = HFLM(family(kind, attention_dropout=0.5), checkpointing=checkpointing), []
        model = copy.deepcopy(model)      # a copy recomputes its own layers, not those of the original
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            state = model.hidden(model.embed[torch.arange(12)[None]])[0]
        state.square().sum().backward()
        gradients.append([p.grad for p in layers(model).parameters()])
        kept.append(sum(sizes))
        with torch.no_grad():        # without a gradient nothing is recomputed, and the cache works
            _, cache = model.hidden(model.embed[torch.arange(11)[None]], use_cache=True)
            last, _ = model.hidden(model.embed[torch.arange(11, 12)[None]], cache=cache, use_cache=True)
        torch.testing.assert_close(last[:, 0], state[:, -1].detach(), atol=1e-5, rtol=1e-5)
    for a, b in zip(*gradients, strict=True): torch.testing.assert_close(a, b)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_train_alone_and_are_merged_when_saved(kind, tmp_path):
    from transformers import AutoModelForCausalLM
    pytest.importorskip("peft")
    lm = family(kind)
    original = copy.deepcopy(lm)
    model = HFLM(lm, lora_rank=2, seed=3)
    assert torch.equal(model.lm(torch.arange(5)[None]).logits, original(torch.arange(5)[None]).logits)
    before = dict(zip([n for n, _ in model.named_parameters()], weights(model)))
    step(model, config(steps=2))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".lora_" in n for n in moved)
    assert sum(".lora_B." in n for n in moved) == sum(".lora_B." in n for n in before) == 14
    save_policy(tmp_path / "p", model, config())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert plain.state_dict().keys() == original.state_dict().keys()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(plain(ids).logits, model.lm(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain(ids).logits, original(ids).logits, atol=1e-3)


def test_the_seed_of_adapters_is_theirs_alone():
    pytest.importorskip("peft")
    state, lm = torch.get_rng_state(), family("Llama")
    a, b, c = (make_optimizer(HFLM(copy.deepcopy(lm), lora_rank=2, seed=s), config()).param_groups[0]["params"]
               for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not all(torch.equal(x, y) for x, y in zip(a, c))


def test_a_tiny_model_refuses_what_it_has_not():
    for name, value in (("lora_rank", 4), ("checkpointing", True)):
        with pytest.raises(ValueError, match="model='tiny'.*lora_rank"): make_config("toy", **{name: value})


# --- what is saved ---

@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_policy_is_a_folder_that_transformers_loads(kind, tied, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = saved(tmp_path / "hub", kind, tied, chat=CHAT)
    rows = "\n".join(f'{{"problem": "How many apples are {i} and 3?", "answer": "{i + 3}"}}' for i in range(20))
    (tmp_path / "d.jsonl").write_text(rows)
    cfg = make_config("paper-low", model=str(tmp_path / "hub"), train=str(tmp_path / "d.jsonl"), top_k=4)
    model = pretrained(cfg.model)
    with torch.no_grad(): model.lm.model.norm.weight.mul_(1.5)      # it has learnt something
    save_policy(tmp_path / "p", model, cfg, tok)
    plain, words = AutoModelForCausalLM.from_pretrained(tmp_path / "p"), AutoTokenizer.from_pretrained(tmp_path / "p")
    again, task, same = load_policy(tmp_path / "p")
    ids = torch.tensor([task.prompt(task.rows["train"][0])])
    assert words.encode("How many apples") == tok.encode("How many apples") == task.encode("How many apples")
    assert torch.equal(plain(ids).logits, model.lm(ids).logits)
    assert torch.equal(again.lm(ids).logits, model.lm(ids).logits) and same == cfg
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert not torch.equal(plain(ids).logits, pretrained(cfg.model).lm(ids).logits)


# --- the whole way ---

@pytest.mark.slow
@pytest.mark.parametrize("preset,kind,more", [("paper-low", "Llama", {}), ("paper-high", "Qwen2", dict(lora_rank=2))],
                         ids=["low", "high with adapters"])
def test_the_papers_presets_from_a_start_in_a_folder(preset, kind, more, tmp_path, capsys):
    """One line, as from the hub: no supervised training, numbers in bfloat16, a policy that others can load."""
    from transformers import AutoModelForCausalLM
    if more: pytest.importorskip("peft")
    saved(tmp_path / "hub", kind, tied=kind == "Llama", chat=CHAT)
    rows = "\n".join(f'{{"problem": "How many apples are {i} and 3?", "answer": "{i + 3}"}}' for i in range(30))
    (tmp_path / "d.jsonl").write_text(rows)
    size = dict(model=tmp_path / "hub", steps=1, prompts=4, groups=4, group_size=2, max_extra=0, max_steps=5,
                eval_every=1, test_rows=4, top_k=4, save_every=1, lr=1e-3) | more
    argv = ["train", "--preset", preset, "--method", "paper", "--data", str(tmp_path / "d.jsonl"),
            "--out", str(tmp_path / "run"), *(f"--set={k}={v}" for k, v in size.items())]
    assert main(argv) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "computing in bfloat16" in text and "copy that draws" in text
    assert not (tmp_path / "run" / "init").exists()
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert f"base_model: {tmp_path / 'hub'}" in card and "| validation | noise_free |" in card
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    model, task, cfg = load_policy(tmp_path / "run" / "policy")
    assert cfg.lora_rank == 0 and not [n for n in lm.state_dict() if "lora" in n]
    ids = torch.tensor([task.prompt(task.rows["train"][0])])
    torch.testing.assert_close(lm.float()(ids).logits, model.lm(ids).logits)
    assert main([*argv, "--resume", "--set=steps=2"]) == 0, capsys.readouterr().err
