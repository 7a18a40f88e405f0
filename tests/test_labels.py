"""Latent-SFT, whole: who sees whom, what each step trains, labels on disk, the stages as a command."""
import copy
import json
from dataclasses import replace

import pytest
import torch

from helpers import EOS, END, MODELS, config, rand, tiny, word_task
from latent_grpo import labels as L
from latent_grpo.cli import main, parser
from latent_grpo.labels import (SLOT, PARTS, STAGES, LabelModel, induction_mask, label_batch, sft,
                                split_row, supervision_mask, train_labels, write_labels)
from latent_grpo.model import positions, predecessors
from latent_grpo.presets import build_model, make_config
from latent_grpo.sft import with_labels
from latent_grpo.train import SETTINGS, load_policy

KINDS = ["tiny", "Llama", "Qwen2", "GPT2"]
# A question of two words, a chain of three in segments of two, then end marker, answer, end of text.
ROW = ([3, 4], [[5, 6], [7]], [END, 8, EOS])
ENCODER = ["1.......",    # q
           "11......",    # q
           "111.....",    # segment 1
           "1111....",
           "11111...",    # its compress token
           "1111.1..",    # segment 2
           "1111.11.",    # its compress token
           "1111.1.1"]    # padding, which nobody sees
DECODER = ["1..........",    # q
           "11.........",    # q
           "111........",    # latent 1
           "..11.......",    # segment 1
           "..111......",
           "111..1.....",    # latent 2
           ".....11....",    # segment 2
           "111..1.1...",    # end marker
           "111..1.11..",    # answer
           "111..1.111.",    # end of text
           "..........."]    # padding


def drawn(lines): return torch.tensor([[[c == "1" for c in line] for line in lines]])


def masks(pad=1):
    """Batch of ROW with some padding behind it, and the masks of encoder and decoder."""
    batch = label_batch([ROW, (ROW[0], ROW[1] + [[5]] * 3, ROW[2])])
    batch = type(batch)(*(x[:1, :n + pad] for x, n in zip(batch, (7, 10, 10, 10))))
    at = batch.decoder == SLOT
    return (batch, induction_mask(batch.encoder == SLOT, batch.encoder != L.BLANK),
            supervision_mask(batch.segment, at.cumsum(1) * at))


def pair(kind="tiny", top_k=3, seed=0):
    start = MODELS[kind]() if kind != "tiny" else tiny(seed=seed, sharp=1.0)
    return LabelModel(start, copy.deepcopy(start), top_k, (END, EOS))


# --- who sees whom ---

def test_masks_position_by_position():
    batch, encoder, decoder = masks()
    assert torch.equal(encoder, drawn(ENCODER)) and torch.equal(decoder, drawn(DECODER))
    assert batch.encoder[0].tolist() == [3, 4, 5, 6, SLOT, 7, SLOT, L.BLANK]
    assert batch.decoder[0].tolist() == [3, 4, SLOT, 5, 6, SLOT, 7, END, 8, EOS, L.BLANK]
    asked = batch.decoder[batch.asked].tolist()
    assert asked == [5, 6, 7, 8, EOS]       # every word of the chain, the answer; not the end marker


def test_positions_are_those_of_the_texts_that_are_read():
    _, encoder, decoder = masks(0)
    assert positions(encoder, 7).tolist() == [[0, 1, 2, 3, 4, 4, 5]]   # compress: the next word's place
    assert positions(decoder, 10).tolist() == [[0, 1, 2, 3, 4, 3, 4, 4, 5, 6]]
    assert predecessors(decoder).tolist() == [[-1, 0, 1, 2, 3, 2, 5, 5, 7, 8]]


def flow(model, inputs, mask):
    """[T, T]: does a change of the input in a column change the state in a row?"""
    T = inputs.shape[1]
    with torch.no_grad():
        before = model.hidden(inputs, mask)[0]
        changed = inputs.expand(T, -1, -1).clone()
        changed[range(T), range(T)] += rand(T, inputs.shape[-1], seed=5)
        after = model.hidden(changed, mask.expand(T, -1, -1))[0]
    return ((after - before).abs().amax(-1) > 1e-6).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_information_flows_where_the_mask_lets_it_and_nowhere_else(kind, which):
    """All pairs of positions: what is seen matters; what cannot be reached in any number of looks does not."""
    model, mask = MODELS[kind](), drawn(ENCODER if which == "encoder" else DECODER)
    seen = mask[0] | torch.eye(mask.shape[1], dtype=torch.bool)
    reached = torch.linalg.matrix_power(seen.double(), len(seen)) > 0
    moved = flow(model, rand(1, len(seen), model.embed.shape[1]), mask)
    assert (moved | ~seen).all() and not (moved & ~reached).any()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_hears_of_a_compress_token_or_of_another_segment(kind):
    model = MODELS[kind]()
    moved = flow(model, rand(1, 8, model.embed.shape[1]), drawn(ENCODER))
    assert moved[:, [4, 6, 7]].sum(0).tolist() == [1, 1, 1]               # only themselves
    moved = flow(model, rand(1, 11, model.embed.shape[1]), drawn(DECODER))
    assert moved[:, 3].nonzero().flatten().tolist() == [3, 4] and moved[:, 6].sum() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_and_decoder_read_ordinary_texts(kind):
    """Without its guests each row is what the model would read anyway, number for number."""
    model, (_, encoder, decoder) = MODELS[kind](), masks()
    for mask, guests in ((encoder, [4, 6, 7]), (decoder, [3, 4, 6, 10])):
        inputs = rand(1, mask.shape[1], model.embed.shape[1])
        own = [i for i in range(mask.shape[1]) if i not in guests]
        with torch.no_grad():
            full, plain = model.hidden(inputs, mask)[0], model.hidden(inputs[:, own])[0]
        torch.testing.assert_close(full[:, own], plain, atol=1e-5, rtol=1e-5)


def test_attention_that_takes_no_mask_is_refused():
    model = MODELS["Llama"]()
    model.lm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model.hidden(rand(1, 8, 16), drawn(ENCODER))


# --- stage 1 ---

@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_mixtures_of_ordinary_words(kind):
    model, task = pair(kind), word_task()
    batch = label_batch([split_row(task, r) for r in task.rows["train"][:5]])
    ids, weights = model.latents(batch.encoder)
    assert ids.shape == weights.shape == (10, 3)                  # two segments a row
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))
    assert (weights[:, :-1] >= weights[:, 1:]).all() and not torch.isin(ids, torch.tensor([END, EOS])).any()
    alone = [model.latents(label_batch([split_row(task, r)]).encoder) for r in task.rows["train"][:5]]
    assert torch.equal(ids, torch.cat([i for i, _ in alone]))     # neighbours and padding change nothing
    torch.testing.assert_close(weights, torch.cat([w for _, w in alone]), atol=1e-5, rtol=1e-4)


def test_the_loss_of_the_answer_is_that_of_stage_2():
    """Question, latents and answer as one ordinary text give the same cross-entropy."""
    model, task = pair(), word_task()
    row = split_row(task, task.rows["train"][3])
    batch = label_batch([row])
    _, parts = model(batch)
    ids, weights = model.latents(batch.encoder)
    from latent_grpo.latent import mix
    embed, (prompt, segments, tail) = model.decoder.embed, row
    inputs = torch.cat([embed[prompt], mix(embed, ids, weights), embed[tail]])[None]
    logits = model.decoder.head(model.decoder.hidden(inputs)[0])[0, -len(tail):-1]
    right = torch.nn.functional.cross_entropy(logits, torch.tensor(tail[1:])).item()
    assert parts["answer"] == pytest.approx(right, abs=1e-4)
    count = sum(map(len, segments))
    loss = (parts["chain"] * count + right * (len(tail) - 1)) / (count + len(tail) - 1)
    assert model(batch)[0].item() == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("step", PARTS)
def test_each_step_trains_its_part_and_no_embedding(step):
    model, task = pair(), word_task()
    before = {n: p.clone() for n, p in model.named_parameters()}
    train_labels(model, task, step, 3, 8, 1e-2, bar=False)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.split(".")[0] for n in changed} == set(PARTS[step])
    assert not any("embedding" in n for n in changed)
    # every weight of its part but the unused head of the encoder
    assert changed >= {n for n in model.free if n.split(".")[0] in PARTS[step]} - {"encoder.unembed.weight"}


@pytest.mark.parametrize("kind", ["tiny", pytest.param("Llama", marks=pytest.mark.slow)])
def test_the_pair_learns_to_pass_the_chain_on(kind):
    """Chains of random words: only the latents can tell the decoder what was in them."""
    task = word_task(rows=81)
    rows = [dict(r, cot=" ".join("abcdefghi"[(5 * i + j * j * i) % 9] for j in range(4)))
            for i, r in enumerate(task.rows["train"])]
    model, task = pair(kind), replace(task, rows=task.rows | dict(train=rows))
    first = train_labels(model, task, "encoder", 1, 32, 1e-2, bar=False)
    for step, n in (("encoder", 15), ("decoder", 20), ("joint", 40)):
        last = train_labels(model, task, step, n, 32, 1e-2, bar=False)
    assert last["chain"] < 0.6 * first["chain"]
    batch = label_batch([split_row(task, r) for r in rows[:40]])
    whole = model(batch)[1]["chain"]
    model.latents = lambda ids, f=model.latents: (f(ids)[0].roll(7, 0), f(ids)[1].roll(7, 0))
    assert model(batch)[1]["chain"] > whole + 0.2                 # with other rows' latents it cannot


# --- labels on disk ---

def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_labels_survive_a_kill(tmp_path, monkeypatch):
    model, task = pair(), word_task()
    write_labels(model, task, tmp_path / "whole", shard=20, batch_size=7, bar=False)
    assert len(files(tmp_path / "whole")) == 5                    # 64 rows: 4 shards and the manifest
    saved, save = [], L.save_file

    def dies(tensors, path, metadata):
        if len(saved) == 2:
            open(path, "wb").write(b"half a shard")
            raise KeyboardInterrupt
        saved.append(path)
        save(tensors, path, metadata)
    monkeypatch.setattr(L, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        write_labels(model, task, tmp_path / "cut", shard=20, batch_size=7, bar=False)
    with pytest.raises(FileNotFoundError, match="no finished labels"): with_labels(task, tmp_path / "cut")
    monkeypatch.setattr(L, "save_file", lambda *a: saved.append(a) or save(*a))
    write_labels(model, task, tmp_path / "cut", shard=20, batch_size=7, bar=False)
    assert len(saved) == 4 and files(tmp_path / "cut") == files(tmp_path / "whole")


def test_labels_of_another_model_are_not_mixed_in(tmp_path):
    task = word_task()
    write_labels(pair(seed=1), task, tmp_path, shard=40, bar=False)
    with pytest.raises(ValueError, match="labels of another model"):
        write_labels(pair(seed=2), task, tmp_path, shard=40, bar=False)


def test_labels_come_back_row_by_row(tmp_path):
    model, task = pair(), word_task()
    facts = write_labels(model, task, tmp_path, shard=20, bar=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert facts.items() < manifest.items() and manifest["rows"] == 64 and manifest["top_k"] == 3
    assert manifest["rate"] == 2 and len(manifest["data"]) == len(manifest["model"]) == 64
    labelled = with_labels(task, tmp_path)
    for i in (0, 19, 20, 63):
        row = labelled.rows["train"][i]
        ids, weights = model.latents(label_batch([split_row(task, row)]).encoder)
        labels, tail = labelled.latent_target(row)
        assert [list(x) for x, _ in labels] == ids.tolist() and tail == task.latent_target(row)[1]
        torch.testing.assert_close(torch.tensor([w for _, w in labels]), weights, atol=1e-5, rtol=1e-4)
    assert task.latent_target(task.rows["train"][0]) != labelled.latent_target(labelled.rows["train"][0])
    other = replace(task, rows=task.rows | dict(train=task.rows["train"][:-1]))
    with pytest.raises(ValueError, match="labels of 64 other training rows"): with_labels(other, tmp_path)


def test_rows_without_a_chain_are_passed_over(tmp_path):
    task = word_task()
    task.rows["train"][2]["cot"] = None
    write_labels(pair(), task, tmp_path, bar=False)
    assert len(with_labels(task, tmp_path).rows["train"]) == 63
    for r in task.rows["train"]: r["cot"] = None
    with pytest.raises(ValueError, match="no training row has a chain"):
        write_labels(pair(), task, tmp_path / "none", bar=False)


# --- the stages ---

SMALL = dict(width=16, layers=1, heads=2, ff=16, train_rows=40, test_rows=8, explicit_sft=3, latent_sft=4,
             label_steps=(2, 2, 2), sft_batch=8, top_k=4)


def test_stages_one_by_one_are_all_of_them(tmp_path, monkeypatch):
    cfg = config(**SMALL)
    for s in STAGES: assert sft(cfg, tmp_path / "a", s, bar=False) == [s]
    assert sft(cfg, tmp_path / "b", bar=False) == list(STAGES)
    assert sft(cfg, tmp_path / "b", bar=False) == []              # all is there
    for s in STAGES:
        one, all_ = files(tmp_path / "a" / s), files(tmp_path / "b" / s)
        one.pop(SETTINGS, None), all_.pop(SETTINGS, None)    # they name the folder of the labels
        assert one == all_
    (tmp_path / "b/label/manifest.json").unlink()
    assert sft(cfg, tmp_path / "b", bar=False) == ["label"]
    logs = {p.stem for p in tmp_path.glob("a/*.jsonl")}
    assert logs == {"sft-explicit", "sft-encoder", "sft-decoder", "sft-joint", "sft-latent"}


def test_adapters_are_all_that_stage_1_trains_where_the_settings_ask_for_them(tmp_path):
    """LoRA: the folders of the steps hold adapters and the compress token, nothing else."""
    from safetensors.torch import load_file
    rows = [dict(problem=f"What is {i} + {i}?", answer=str(2 * i), cot=f"{i} + {i} = {2 * i}") for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {k: v for k, v in SMALL.items() if k != "train_rows"}
    cfg = make_config("gsm8k-tiny", train=str(tmp_path / "sums.jsonl"), drop="", vocab_size=300, max_steps=12,
                      lora_rank=2, **small)
    sft(cfg, tmp_path / "run", bar=False)
    for step in PARTS:
        saved = load_file(tmp_path / "run" / step / "model.safetensors")
        assert saved and all("lora_" in n or n == "compress" for n in saved)
        assert {n.split(".")[0] for n in saved} == set(PARTS[step])


def test_stage_2_learns_the_labels_of_the_encoder(tmp_path):
    from latent_grpo.train import supervised_start
    cfg = config(**SMALL)
    sft(cfg, tmp_path, bar=False)
    policy, task, saved = load_policy(tmp_path / "train")
    assert saved.labels == str(tmp_path / "label")
    learned, direct = build_model(cfg, task), build_model(cfg, task)
    supervised_start(learned, task, saved, bar=False)
    supervised_start(direct, task, replace(saved, labels=""), bar=False)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert same(policy, learned) and not same(policy, direct)


@pytest.mark.parametrize("stage, settings, said", [
    ("joint", {}, "encoder comes before joint"),
    ("encoder", dict(label_steps=(0, 1, 1)), "nothing to train in encoder"),
    ("all", dict(latent_sft=0), "latent_sft=0"),
    ("label", dict(label_steps=(1, 1, 1)), "encoder comes before label")])
def test_what_cannot_run_is_said(stage, settings, said, tmp_path):
    with pytest.raises(ValueError, match=said): sft(config(**SMALL | settings), tmp_path, stage, bar=False)
    assert not (tmp_path / "start").exists()      # before anything was trained


def test_three_steps_are_three_numbers():
    assert config(label_steps="5,6,7").label_steps == (5, 6, 7)
    with pytest.raises(ValueError, match="three numbers"): config(label_steps=(5, 6))
    with pytest.raises(ValueError, match="label_lr=0.0: must be positive"): config(label_lr=0)


def test_other_settings_need_another_folder(tmp_path):
    sft(config(**SMALL), tmp_path, "encoder", bar=False)
    with pytest.raises(ValueError, match="holds a run with rate=4"):
        sft(config(**SMALL, rate=2), tmp_path, "decoder", bar=False)


def test_a_transformers_model_from_the_command_line(tmp_path, capsys):
    """Problems in a file, a Llama with fresh weights, all stages, then a score of the policy."""
    rows = [dict(problem=f"What is {i} + {j}?", answer=str(i + j), cot=f"{i} + {j} = {i + j}")
            for i in range(8) for j in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = [f"{k}={v}" for k, v in (SMALL | dict(vocab_size=300, max_steps=12)).items() if k != "train_rows"]
    out = tmp_path / "run"
    words = ["sft", "--preset", "gsm8k-tiny", "--data", tmp_path / "sums.jsonl", "--out", out, "--quiet",
             *(x for s in small for x in ("--set", s))]
    assert main(list(map(str, words))) == 0
    assert "ran: encoder, decoder, joint, label, train" in capsys.readouterr().out
    assert main(list(map(str, words))) == 0 and "nothing" in capsys.readouterr().out
    assert main(["eval", "--policy", str(out / "train"), "--data", str(tmp_path / "sums.jsonl")]) == 0
    assert "Pass@1" in capsys.readouterr().out


def test_the_command_line_knows_the_stages():
    for s in (*STAGES, "all"): assert parser().parse_args(["sft", "--stage", s]).stage == s
