"""What a run survives: kill -9, a full disk, damaged files; and what several processes must agree on."""
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import two
from helpers import config, started, word_task
from latent_grpo import distributed, runs
from latent_grpo.cli import main
from latent_grpo.runs import RunLog, load_checkpoint, save_checkpoint, write_folder
from latent_grpo.distributed import memory, shape_of
from latent_grpo.model import fresh_llama, pretrained
from latent_grpo.presets import make_config
from latent_grpo.train import load_policy, make_optimizer, run, train_rl

SMALL = dict(width=16, layers=1, heads=2, ff=16, train_rows=60, test_rows=6, latent_sft=20, sft_batch=16,
             explicit_sft=0, prompts=6, groups=6, max_steps=20, save_every=2)
TIMES = ("rollout_seconds", "update_seconds")


def command(out, *more, **settings):
    """`latent-grpo train` on the toy, small."""
    return [sys.executable, "-m", "latent_grpo.cli", "train", "--method", "paper", "--quiet", "--out", str(out),
            *(f"--set={k}={v}" for k, v in (SMALL | settings).items()), *more]


def said(argv, **kwargs):
    """Exit status and everything printed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, **kwargs)
    return done.returncode, done.stdout + done.stderr


def curve(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def small():
    """A model and its optimiser after two updates."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        opt.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        opt.step()
    return model, opt


# --- kill -9 ---

@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    settings = dict(steps=9, eval_every=3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, text = said(command(whole, **settings))
    assert status == 0, text
    process = subprocess.Popen(command(broken, **settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(2400):      # until step 5 is logged: after a checkpoint, before the next one
            if (broken / "log.jsonl").exists() and len((broken / "log.jsonl").read_text().splitlines()) >= 5: break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.025)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally: process.kill()
    assert len(curve(broken)) < 9 and not (broken / "scores.json").exists()
    (broken / ".checkpoint-000099.part").mkdir()
    status, text = said(command(broken, "--resume", **settings))
    assert status == 0 and "half-written checkpoint, ignored" in text, text
    assert curve(whole) == curve(broken) and len(curve(whole)) == 9
    for name in ("policy/model.safetensors", "checkpoint-000009/model.safetensors",
                 "checkpoint-000009/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    a, b = (json.loads((x / "scores.json").read_text())["test"] for x in (whole, broken))
    assert a == b


# --- damage ---

@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(how, name, tmp_path):
    model, opt = small()
    save_checkpoint(tmp_path, model, opt, dict(step=1))
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad(): model.weight.zero_()
    save_checkpoint(tmp_path, model, opt, dict(step=2))
    file = tmp_path / "checkpoint-000002" / name
    if how == "cut": file.write_bytes(file.read_bytes()[:-3])
    else: file.unlink()
    other, its = small()
    with pytest.warns(UserWarning, match="checkpoint-000002: a damaged checkpoint, ignored"):
        assert load_checkpoint(tmp_path, other, its) == dict(step=1)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path, *small(), dict(step=1))
    with pytest.raises(ValueError, match="which this model has not"):
        load_checkpoint(tmp_path, torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_only_what_is_trained_is_in_a_checkpoint(tmp_path):
    model = started(word_task(), steps=1)
    opt = make_optimizer(model, config())
    save_checkpoint(tmp_path, model, opt, dict(step=1))
    names = load_file(tmp_path / "checkpoint-000001" / "model.safetensors").keys()
    assert names == {n for n, _ in model.named_parameters()} - {"embedding.weight"}


# --- a full disk ---

def disk_of(size):
    """From now on no file of this process may grow beyond `size` bytes: the disk is full."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path):
    model, opt = small()
    save_checkpoint(tmp_path, model, opt, dict(step=1))
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-000001").iterdir()}
    for step in (1, 2):            # the same folder again, and the next one
        free = disk_of(100)        # safetensors itself runs out of room, in the middle of a file
        try:
            with pytest.raises(OSError, match=f"checkpoint-00000{step}: could not be written.*is intact.*--resume"):
                save_checkpoint(tmp_path, model, opt, dict(step=step, more=1))
        finally: free()
        assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-000001").iterdir()} == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000001"]
    assert load_checkpoint(tmp_path, model, opt) == dict(step=1)


def test_no_space_is_an_error_and_a_crash_between_two_renames_is_repaired(tmp_path, monkeypatch):
    path = tmp_path / "policy"
    write_folder(path, lambda f: (f / "a").write_text("old"))

    def full(folder):
        (folder / "a").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left.*intact"): write_folder(path, full)
    assert (path / "a").read_text() == "old"
    calls, replace = [], os.replace

    def dies(a, b):
        calls.append(a)
        if len(calls) == 2: raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(runs.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt): write_folder(path, lambda f: (f / "a").write_text("new"))
    monkeypatch.undo()
    assert not path.exists()
    with pytest.raises(OSError): write_folder(path, full)    # the old one is put back before anything else
    assert (path / "a").read_text() == "old"
    write_folder(path, lambda f: (f / "a").write_text("new"))
    assert (path / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["policy"]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_later(tmp_path):
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); " \
            "from latent_grpo.cli import main; sys.exit(main(sys.argv[1:]))"
    assert main(command(tmp_path, steps=2)[3:]) == 0
    argv = command(tmp_path, "--resume", steps=4)
    status, text = said([sys.executable, "-c", limit, *argv[3:]])
    assert status == 2 and text.count("latent-grpo: ") == 1 and "checkpoint-000004: could not be written" in text, text
    assert "Traceback" not in text and (tmp_path / "checkpoint-000002" / "state.json").exists()
    assert main(argv[3:]) == 0 and [row["step"] for row in curve(tmp_path)] == [1, 2, 3, 4]


# --- the best ---

def test_the_best_in_validation_is_kept_and_saved(tmp_path, monkeypatch):
    scores = iter([0.2, 0.7, 0.4, 0.7, 0.1, 0.1])
    monkeypatch.setattr("latent_grpo.train.validation", lambda *a: dict(validation=next(scores), kl=0.0))
    run(config(**SMALL | dict(steps=6, eval_every=1, save_every=1, latent_sft=3)), tmp_path, bar=False)
    kept = sorted(int(p.name[-6:]) for p in tmp_path.glob("checkpoint-*"))
    assert kept == [2, 5, 6]
    best, last = (load_policy(tmp_path / name)[0].state_dict() for name in ("best", "policy"))
    at = load_file(tmp_path / "checkpoint-000002" / "model.safetensors")
    assert all(torch.equal(best[k], v) for k, v in at.items())
    assert not all(torch.equal(last[k], v) for k, v in at.items())


# --- numbers that are none ---

def test_a_gradient_that_is_not_finite_touches_no_weight():
    """The loss may be finite all the same; weight decay and moments must not act either."""
    cfg, task = config(steps=1, minibatches=2, weight_decay=0.5), word_task()
    model = started(task)
    before = [p.detach().clone() for p in model.parameters()]
    model.norm.weight.register_hook(lambda g: g * math.inf)
    rows = train_rl(model, task, cfg, bar=False)
    assert rows[0]["skipped"] == 2 and math.isfinite(rows[0]["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --- the log ---

def test_tensorboard_shows_the_log(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train_rl(started(word_task()), word_task(), config(steps=2, tracker="tensorboard"), tmp_path, bar=False)
    (file,) = (tmp_path / "tensorboard").glob("events*")
    found = events.EventAccumulator(str(file)).Reload()
    assert set(found.Tags()["scalars"]) == set(rows[0])
    assert [e.value for e in found.Scalars("reward")] == pytest.approx([r["reward"] for r in rows])
    assert [r["step"] for r in RunLog(tmp_path / "log.jsonl", 9).rows] == [1, 2]


# --- several processes ---

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([ROOT, os.path.join(ROOT, "tests")]))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process and two make of the same cases: name -> (log, weights); for each of the two."""
    folder = tmp_path_factory.mktemp("two")
    torch.save(started(word_task()).state_dict(), folder / "start.pt")
    one = {name: two.go(name, folder) for name in two.CASES}
    shutil.copytree(folder / "paper-1", folder / "one")
    one["resumed"] = two.go("paper", folder, resume=folder / "paper-1", steps=3)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", two.__file__, str(folder)]
    status, text = said(launch, env=ENV)
    assert status == 0, text[-3000:]
    return one, *(torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)), folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*two.CASES, "resumed"])
def test_two_processes_are_one_to_rounding(name, both):
    """The whole trainer: draws, filter, advantages, token means, cut of the norm, penalty, optimiser."""
    one, first, second, folder = both
    (log, weights), (log2, weights2) = one[name], first[name]
    assert len(log) == len(log2) == (3 if name == "resumed" else 2) and log[0]["groups"] > 2
    for a, b in zip(log, log2, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    for n, w in weights.items():
        torch.testing.assert_close(w, weights2[n], atol=2e-5, rtol=1e-4)
        assert torch.equal(weights2[n], second[name][1][n])     # the processes agree to the last bit
    start = dict(two.model_of(name, folder / "start.pt").named_parameters())
    moved = [n for n, w in weights2.items() if (w - start[n]).abs().max() > 1e-3]
    assert len(moved) == len(start) - 1                          # all but the embeddings


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(both):
    one, *_, folder = both
    log, weights = two.go("paper", folder, resume=folder / "paper-2", steps=3)
    assert log[-1] == pytest.approx(one["resumed"][0][-1], rel=1e-3, abs=1e-5)
    for n, w in weights.items(): torch.testing.assert_close(w, one["resumed"][1][n], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_accelerate_launches_the_command(tmp_path):
    pytest.importorskip("accelerate")
    settings = dict(steps=2, device="cpu", latent_sft=5)
    status, text = said([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1",
                         "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no", "-m",
                         *command(tmp_path / "two", **settings)[2:]], env=ENV)
    assert status == 0, text[-3000:]
    assert text.count("policy, log and scores are in") == 1      # one of them speaks
    assert main(command(tmp_path / "one", **settings)[3:]) == 0
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    scores = [json.loads((tmp_path / n / "scores.json").read_text()) for n in ("one", "two")]
    for k, v in scores[0]["test"]["sampled"].items():
        assert scores[1]["test"]["sampled"][k] == pytest.approx(v, rel=1e-3, abs=1e-6), k
    assert "2 processes" in scores[1]["made"]["hardware"]


def test_more_processes_than_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 9)
    with pytest.raises(ValueError, match="prompts=6: fewer than the 9 processes"):
        distributed.Ranks(config(device="cpu"))


def test_weights_stay_in_float32_when_numbers_are_bfloat16(tmp_path):
    """Steps far below the rounding of bfloat16 add up; the checkpoint holds them, the drawing copy does not."""
    cfg = config(compute="bfloat16", device="cpu", lr=1e-6, steps=3, groups=6)
    start, task = started(word_task()), word_task()
    model, ranks = started(task), distributed.Ranks(cfg)
    rows = train_rl(model, task, cfg, tmp_path, bar=False, ranks=ranks)
    assert all(r["first_ratio_gap"] < 0.5 and math.isfinite(r["grad_norm"]) and not r["skipped"] for r in rows)
    at = load_file(tmp_path / "checkpoint-000003" / "model.safetensors")
    before = dict(start.named_parameters())
    assert {w.dtype for w in at.values()} == {torch.float32}
    moved = [(w - before[n]).abs().max().item() for n, w in at.items()]
    assert all(0 < m < 1e-5 for m in moved)
    copy = dict(ranks.whole(model).named_parameters())
    assert all(torch.equal(copy[n], w.bfloat16()) for n, w in at.items())
    again = started(task)
    more = train_rl(again, task, config(compute="bfloat16", device="cpu", lr=1e-6, steps=4, groups=6), tmp_path,
                    resume=True, bar=False, ranks=distributed.Ranks(cfg))
    assert [r["step"] for r in more] == [1, 2, 3, 4]


# --- the plan ---

def test_the_plan_counts_what_is_there(tmp_path):
    tiny = shape_of(config(**SMALL), 24)
    assert tiny["parameters"] - tiny["trained"] == 24 * 16
    model = two.model_of("tied", None)
    model.lm.save_pretrained(tmp_path)
    shape = shape_of(make_config("paper-low", model=str(tmp_path), lora_rank=2), 12)
    assert shape["parameters"] == sum(p.numel() for p in model.parameters())
    assert (shape["width"], shape["layers"], shape["ff"], shape["keys"]) == (16, 2, 24, 8)
    thin = pretrained(str(tmp_path), lora_rank=2)
    assert shape["trained"] == sum(p.numel() for p in thin.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_within_a_quarter(checkpointing):
    cfg = make_config("gsm8k-tiny", width=48, layers=4, ff=96, heads=4, max_prompt=20, max_steps=12, prompts=2,
                      group_size=4, groups=2, minibatches=1, checkpointing=checkpointing)
    model = fresh_llama(50, 48, 4, 4, 96, 64, checkpointing=checkpointing)
    model.embed.requires_grad_(False)
    weights, kept, hold = {p.data_ptr() for p in model.parameters()}, {}, []

    def keep(t):
        if t.data_ptr() not in weights: kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        hold.append(t)      # else its place is used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.hidden(model.embed[torch.zeros(8, 32, dtype=torch.long)])
    one = (12 * 48 + 4 * 96) * 8 * 32 * 4 if checkpointing else 0      # of the layer that is computed again
    estimate = memory(cfg, shape_of(cfg, 50))[1]["update: activations"]
    assert estimate == pytest.approx(sum(kept.values()) + one, rel=0.25)


def test_the_plan_is_printed_alone_and_refuses(tmp_path, capsys, monkeypatch):
    argv = command(tmp_path / "r", "--plan")[3:]
    assert main(argv) == 0 and not (tmp_path / "r").exists()
    text = capsys.readouterr().out
    for part in ("parameters", "sha256", "AdamW", "cache", "checkpoint-*", "processes 1"): assert part in text
    monkeypatch.setattr(distributed, "_device_bytes", lambda device: 100)
    assert main(argv) == 2 and "memory: weights and optimiser need" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(distributed.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10))
    assert main(argv) == 2 and "name a larger disk" in capsys.readouterr().err
    monkeypatch.undo()
    rows = [dict(problem=f"What is {i} and {i}?", answer=str(2 * i), cot="1") for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", "--plan", "--preset=gsm8k-tiny", f"--data={tmp_path / 'd.jsonl'}", "--set=drop=", "--set=width=16"]
    assert main(words) == 0 and main([*words, "--set=max_prompt=3"]) == 2
    assert "max_prompt is 3" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*argv, "--set=device=cuda"]) == 2
        assert "there is no CUDA device; use device=cpu" in capsys.readouterr().err


def test_a_policy_has_a_card(tmp_path):
    scores = run(config(**SMALL | dict(steps=1, latent_sft=3)), tmp_path, bar=False)
    card = (tmp_path / "policy" / "README.md").read_text()
    assert f"| {100 * scores['test']['noise_free']['pass1']:.1f} |" in card
    assert scores["made"]["commit"] in card and "| test | sampled |" in card and "base_model" not in card
