"""What a run survives: kill -9, a full disk, damaged files; and what several processes must agree on."""
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers import config, started, word_task
from latent_grpo import runs
from latent_grpo.cli import main
from latent_grpo.runs import RunLog, load_checkpoint, save_checkpoint, write_folder
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
