"""The whole trainer: reproducible, resumable, and the same whatever the split of the work."""
import copy
import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import METHODS, config, started, word_task
from latent_grpo import train, vanilla
from latent_grpo.presets import sampling_of
from latent_grpo.rollout import replay_logps, select_groups
from latent_grpo.runs import load_checkpoint
from latent_grpo.train import (draw_groups, load_policy, make_optimizer, run, step_advantages,
                               train_rl, train_step)
from latent_grpo.vanilla import rl_step, update

TASK = word_task()
STARTS = {latent: started(TASK, latent) for latent in (True, False)}


def fresh(cfg): return copy.deepcopy(STARTS[cfg.latent])


def batch(cfg):
    """A model and one batch of its rollouts, with groups that teach something."""
    model = fresh(cfg).eval()
    r, rewards, *_ = draw_groups(model, TASK, cfg, 0)
    assert len(rewards) >= 4 and not r.ended.all()
    return model, r, rewards


def curve(rows):
    """Logged metrics without the times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def updated(cfg, model, r, rewards, update=update, lr=0.1, **kwargs):
    """Weights after the gradient steps of one batch, and what `update` returns."""
    model = copy.deepcopy(model)    # SGD: Adam would blow up the rounding of tiny gradients
    opt = torch.optim.SGD(make_optimizer(model, cfg).param_groups[0]["params"], lr=lr)
    s = sampling_of(cfg, TASK.end_latent_ids[0])
    if update is vanilla.update: rewards = step_advantages(r, rewards, cfg)
    metrics = update(model, opt, r, rewards, cfg, s, **kwargs)
    return weights(model), metrics


def near(a, b): torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


# --- reproducible ---

@pytest.mark.parametrize("method", ["explicit", "released", "exact", "centred"])
def test_same_seed_same_curve(method):
    def go(seed):
        cfg = config(method, seed=seed, eval_every=2)
        model = fresh(cfg)
        return curve(train_rl(model, TASK, cfg, bar=False)), weights(model)

    (rows, w), (again, same), (other, _) = go(0), go(0), go(1)
    assert rows == again and torch.equal(w, same) and len(rows) == 4
    assert rows != other
    assert not torch.equal(w, weights(STARTS[method != "explicit"]))


@pytest.mark.parametrize("method,settings", [
    ("exact", {}), ("vanilla", dict(kl_coef=0.1)), ("centred", dict(epochs=2, weight_decay=0.1)),
    ("explicit", {})], ids=str)
def test_resumed_equals_uninterrupted(method, settings, tmp_path):
    cfg = config(method, steps=5, **settings)
    whole, half = fresh(cfg), fresh(cfg)
    rows = train_rl(whole, TASK, cfg, tmp_path / "whole", bar=False)
    first = config(method, steps=2, **settings)
    train_rl(half, TASK, first, tmp_path / "half", bar=False)
    again = fresh(cfg)
    resumed = train_rl(again, TASK, cfg, tmp_path / "half", resume=True, bar=False)
    assert torch.equal(weights(whole), weights(again)) and curve(rows) == curve(resumed)
    assert not torch.equal(weights(whole), weights(half))
    optimizers = [make_optimizer(whole, cfg) for _ in range(2)]
    for folder, opt in zip(("whole", "half"), optimizers):
        assert load_checkpoint(tmp_path / folder, copy.deepcopy(whole), opt)["step"] == 5
    for a, b in zip(*(o.state_dict()["state"].values() for o in optimizers), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_log_on_disk_is_the_curve(tmp_path):
    cfg = config(save_every=1)
    rows = train_rl(fresh(cfg), TASK, cfg, tmp_path, bar=False)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == rows and [x["step"] for x in lines] == [1, 2, 3, 4]
    for name in ("reward", "invalid", "latent_length", "text_length", "rollout_seconds",
                 "update_seconds", "groups", "grad_norm", "clipped"):
        assert all(math.isfinite(x[name]) for x in lines), name
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2    # the newest two are kept


def test_resume_drops_log_lines_after_the_checkpoint(tmp_path):
    cfg = config(steps=2)
    train_rl(fresh(cfg), TASK, cfg, tmp_path, bar=False)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "reward": 9}\n{"step": 4, "rew')    # it died here
    rows = train_rl(fresh(cfg), TASK, config(steps=3), tmp_path, resume=True, bar=False)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["reward"] <= 1


# --- plain GRPO ---

def plain_grpo(model, opt, r, rewards, cfg, sampling):
    """GRPO written down once more, without the library's advantages, loss and loop."""
    A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    for groups in torch.arange(len(rewards)).tensor_split(cfg.minibatches):
        part = select_groups(r, groups)
        adv = A[groups].flatten()[:, None].expand_as(part.kind)
        ratio = (replay_logps(model, part, sampling) - part.logps).exp()
        loss = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
        loss = torch.where(adv < 0, loss.clamp(max=-3 * adv.clamp(max=0)), loss)
        opt.zero_grad()
        loss[part.response_mask].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()


@pytest.mark.parametrize("method", ["vanilla", "explicit"])
def test_the_loop_of_the_lessons_is_the_trainer(method):
    cfg = config(method, max_extra=0)
    model, other = fresh(cfg).eval(), fresh(cfg).eval()
    opt, other_opt = make_optimizer(model, cfg), make_optimizer(other, cfg)
    state = dict(step=0, position=0)
    s = sampling_of(cfg, TASK.end_latent_ids[0])
    for _ in range(2):
        train_step(model, opt, TASK, cfg, state)
        rl_step(other, other_opt, TASK, state["position"] - cfg.prompts, s, cfg,
                prompts=cfg.prompts, group_size=cfg.group_size, max_groups=cfg.groups,
                max_steps=cfg.max_steps, thinking=cfg.latent, seed=cfg.seed)
        assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(model), weights(fresh(cfg)))


@pytest.mark.parametrize("method", ["vanilla", "explicit"])
def test_all_fixes_off_is_plain_grpo(method):
    cfg = config(method, minibatches=3)
    model, r, rewards = batch(cfg)
    ours, metrics = updated(cfg, model, r, rewards, lr=1)
    near(ours, updated(cfg, model, r, rewards, plain_grpo, lr=1)[0])
    assert (ours - weights(model)).abs().max() > 1e-3 and metrics["clipped"] > 0


FIXES = list(itertools.product(("off", "paper"), ("two-sided", "one-sided"), ("off", "paper")))


def test_every_combination_of_fixes_trains_and_differs():
    """Masking, noise and selection are independent switches: 2^3 different updates."""
    cfg = config(minibatches=1)
    model, r, rewards = batch(cfg)
    seen = []
    for masking, noise, selection in FIXES:
        cfg = config(masking=masking, noise=noise, selection=selection, minibatches=1, steps=2)
        mine, mine_rewards, *_ = draw_groups(model, TASK, cfg, 0)
        seen.append(updated(cfg, model, mine, mine_rewards)[0])
        rows = train_rl(fresh(cfg), TASK, cfg, bar=False)
        assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    for a, b in itertools.combinations(seen, 2): assert (a - b).abs().max() > 1e-5


def test_masked_rollouts_and_unselected_first_steps_have_no_advantage():
    cfg = config("paper")
    _, r, rewards = batch(cfg)
    A = step_advantages(r, rewards, cfg)
    assert (A[~r.ended] == 0).all() and (A[~r.action_mask] == 0).all()
    right = (A > 0)[:, 1].view(rewards.shape)
    spoke = (A > 0)[:, 0].view(rewards.shape)
    assert (spoke.sum(1) == right.any(1).long()).all() and (right.sum(1) > 1).any()


# --- how the work is split ---

@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("method", ["explicit", "released", "exact", "centred"])
def test_micro_batches_change_nothing(method, how):
    cfg = config(method, aggregation=how, kl_coef=0.1)
    model, r, rewards = batch(cfg)
    reference = fresh(cfg)
    whole, metrics = updated(cfg, model, r, rewards, reference=reference)
    for micro in (1, 2):
        cfg.micro_groups = micro
        parts, split = updated(cfg, model, r, rewards, reference=reference)
        near(whole, parts)
        assert split["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    assert (whole - weights(model)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["loss", "kl_penalty", "clipped", "first_ratio_gap"])
def test_micro_batches_change_no_logged_metric(name):
    cfg = config("vanilla", kl_coef=0.1, minibatches=1, epochs=2)
    model, r, rewards = batch(cfg)
    keep = r.response_mask.sum(1).view(rewards.shape).sum(1).argsort()[[0, 1, -2, -1]]
    r, rewards = select_groups(r, keep), rewards[keep]    # groups of unlike size
    values = []
    for cfg.micro_groups in (0, 1, 3):
        values.append(updated(cfg, model, r, rewards, lr=1, reference=fresh(cfg))[1][name])
    assert values == pytest.approx([values[0]] * 3, rel=1e-4, abs=1e-6)


def test_order_of_groups_changes_nothing():
    cfg = config("paper", minibatches=1, epochs=2)
    model, r, rewards = batch(cfg)
    order = torch.arange(len(rewards)).flip(0)
    whole = updated(cfg, model, r, rewards)[0]
    near(whole, updated(cfg, model, select_groups(r, order), rewards[order])[0])
    assert (whole - updated(cfg, model, r, rewards[order])[0]).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_ratio_is_one_before_the_first_update(method):
    cfg = config(method)
    model, r, rewards = batch(cfg)
    metrics = updated(cfg, model, r, rewards)[1]
    assert metrics["first_ratio_gap"] < 1e-5 < metrics["ratio_gap"]


def test_a_trainer_that_disagrees_with_the_sampler_is_stopped(monkeypatch):
    cfg = config()
    model = fresh(cfg)
    monkeypatch.setattr(vanilla, "replay_logps", lambda *a: replay_logps(*a) + 0.1)
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        train_rl(model, TASK, cfg, bar=False)


# --- trouble ---

def broken(monkeypatch, *bad):
    """Make the loss of some calls, counted from 0, not a number."""
    calls, honest = itertools.count(), vanilla.policy_loss

    def policy_loss(*args):
        loss, metrics = honest(*args)
        return (loss * math.nan if next(calls) in bad or not bad else loss), metrics

    monkeypatch.setattr(vanilla, "policy_loss", policy_loss)


def test_a_bad_gradient_is_skipped_and_counted(monkeypatch):
    cfg = config(minibatches=2)
    model, r, rewards = batch(cfg)
    half = select_groups(r, torch.arange(len(rewards)).tensor_split(2)[1])
    second = updated(config(minibatches=1), model, half, rewards[-len(half.prompt_ids):])[0]
    broken(monkeypatch, 0)
    after, metrics = updated(cfg, model, r, rewards)
    assert metrics["skipped"] == 1
    near(after, second)    # as if the first minibatch had not been there


def test_bad_gradients_one_after_the_other_stop_the_run(monkeypatch, tmp_path):
    broken(monkeypatch)
    cfg = config(steps=20)
    model = fresh(cfg)
    with pytest.raises(RuntimeError, match="not finite in 6 steps running.*lower lr"):
        train_rl(model, TASK, cfg, tmp_path, bar=False)
    assert torch.equal(weights(model), weights(STARTS[True]))
    kept = fresh(cfg)
    assert load_checkpoint(tmp_path, kept)["step"] == 6
    assert torch.equal(weights(kept), weights(model))
    rows = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [2] * 6


def test_a_good_step_forgives_bad_ones(monkeypatch):
    broken(monkeypatch, *(i for i in range(40) if i % 10 < 8))    # 4 bad steps, then a good one
    rows = train_rl(fresh(config()), TASK, config(steps=15), bar=False)
    assert sum(row["skipped"] for row in rows) == 24


def test_every_group_filtered(tmp_path):
    """Nobody is right: a step without an update, bounded and reported, and the run goes on."""
    task, cfg, longer = word_task(answer="z"), *(config(steps=n, max_extra=2) for n in (2, 3))
    model = fresh(cfg)
    rows = train_rl(model, task, cfg, tmp_path, bar=False)
    assert [(row["groups"], row["draws"], row["equal_groups"]) for row in rows] == [(0, 3, 1.0)] * 2
    assert torch.equal(weights(model), weights(STARTS[True]))
    more = train_rl(fresh(cfg), task, longer, tmp_path, resume=True, bar=False)
    assert [row["step"] for row in more] == [1, 2, 3]


def test_filtering_draws_until_there_are_enough_groups():
    cfg = config(groups=5, prompts=3, max_extra=20)
    r, rewards, position, metrics = draw_groups(fresh(cfg).eval(), TASK, cfg, 0)
    assert len(rewards) == len(r.prompt_ids) == 5 and metrics["draws"] >= 2
    assert position == 3 * metrics["draws"]
    assert ((rewards.mean(1) > 0) & (rewards.mean(1) < 1)).all()
    assert len(set(r.rows.tolist())) == len(r.rows)    # no two rollouts share their noise


def test_embeddings_are_frozen():
    cfg = config()
    model = fresh(cfg)
    trained = make_optimizer(model, cfg).param_groups[0]["params"]
    assert not any(p is model.embed for p in trained)
    assert len(trained) == len(list(model.parameters())) - 1
    train_rl(model, TASK, cfg, bar=False)
    assert torch.equal(model.embed, STARTS[True].embed)


def test_group_counts_of_a_step_are_those_of_the_update():
    cfg = config()
    model, state = fresh(cfg), dict(step=0, position=0)
    row = train_step(model, make_optimizer(model, cfg), TASK, cfg, state)
    assert row["step"] == state["step"] == 1 and state["position"] == cfg.prompts * row["draws"]
    assert 1 <= row["groups"] <= cfg.groups


# --- runs in folders ---

SMALL = dict(width=16, layers=1, heads=2, ff=16, train_rows=40, test_rows=6, latent_sft=3,
             sft_batch=8, explicit_sft=0, steps=1, prompts=4, groups=4, max_steps=20, eval_every=0)


def test_a_run_leaves_a_policy_that_loads(tmp_path):
    scores = run(config(**SMALL), tmp_path, bar=False)
    model, task, cfg = load_policy(tmp_path / "policy")
    again = train.score_policy(model, task, cfg)
    for mode in ("noise_free", "sampled"):
        assert again["test"][mode]["pass1"] == scores["test"][mode]["pass1"]
        assert again["test"][mode]["latent_length"] == scores["test"][mode]["latent_length"]


def test_a_run_from_another_size_of_model_leaves_a_policy_that_loads(tmp_path):
    """The weights decide the size: what is saved beside them has to say so."""
    run(config(**SMALL), tmp_path / "a", bar=False)
    run(config(**SMALL | dict(width=32)), tmp_path / "b", tmp_path / "a" / "init", bar=False)
    model, *_ = load_policy(tmp_path / "b" / "policy")
    assert model.embed.shape[1] == 16


@pytest.mark.slow
def test_interrupted_run_leaves_a_checkpoint_and_resumes(tmp_path):
    settings = [f"--set={k}={v}" for k, v in (SMALL | dict(steps=400)).items()]
    command = [sys.executable, "-m", "latent_grpo.cli", "train", "--method", "exact", "--quiet",
               "--out", str(tmp_path), *settings]
    log, output = tmp_path / "log.jsonl", dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, text=True, **output)
    try:
        for _ in range(600):
            if log.exists() and len(log.read_text().splitlines()) >= 3: break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally: process.kill()
    done = len(log.read_text().splitlines())
    assert process.returncode == 130 and "--resume" in said, said
    assert "Traceback" not in said
    assert 3 <= done < 400 and (tmp_path / f"checkpoint-{done:06d}" / "state.json").exists()
    more = subprocess.run([*command, "--resume", f"--set=steps={done + 2}"], text=True, **output)
    assert more.returncode == 0, more.stdout
    steps = [json.loads(x)["step"] for x in log.read_text().splitlines()]
    assert steps == list(range(1, done + 3))
    assert load_policy(tmp_path / "policy")[2].steps == done + 2
