"""The pictures with sliders: what is drawn, without a front end; sliders that move; frames."""
import builtins
import inspect
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from latent_grpo.evaluate import bootstrap_interval, pass_at_k
from latent_grpo.explore import (CORNERS, explore, frames, group_of_eight, gumbel_margin,
                                 mixture_simplex, pass_at_k_by_noise, path_probs, simplex_weights,
                                 two_paths)
from latent_grpo.noise import mean_factor

pyplot = pytest.importorskip("matplotlib.pyplot")
COUNTS = {0.25: [0, 0, 8, 8], 1.0: [1, 2, 4, 7]}
PICTURES = {"simplex": mixture_simplex, "margin": gumbel_margin, "group": group_of_eight,
            "paths": two_paths, "pass": partial(pass_at_k_by_noise, COUNTS, 8, k_max=8)}
each_picture = pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)


def test_importing_needs_no_front_end():
    probe = ("import sys, latent_grpo.explore; "
             "print({'matplotlib', 'ipywidgets', 'IPython'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@each_picture
def test_pictures_are_released_and_leave_no_trace(picture):
    settings, figures = dict(pyplot.rcParams), pyplot.get_fignums()
    random = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    fig = picture()
    assert fig.axes and pyplot.get_fignums() == figures and dict(pyplot.rcParams) == settings
    assert torch.equal(torch.get_rng_state(), random[0])
    assert (np.random.get_state()[1] == random[1]).all()


@each_picture
def test_axes_say_what_they_show(picture):
    for ax in picture().axes:
        if not ax.axison: continue     # the triangle
        assert ax.get_ylabel()
        shared = ax.get_shared_x_axes().get_siblings(ax)
        assert any(other.get_xlabel() for other in shared) or ax.get_xticklabels()


# --- the triangle

def dots(fig):
    """Corner coordinates [draws, 2] of each group of dots."""
    return [np.asarray(c.get_offsets()) for c in fig.axes[0].collections]


def test_triangle_without_noise_is_one_point_for_every_tau():
    for tau in (0.25, 1.0, 4.0):
        fig = mixture_simplex(3, 2, 5, noise_scale=0.0, tau=tau, draws=7)
        point = (torch.tensor([.3, .2, .5]) @ CORNERS).numpy()
        found = np.concatenate(dots(fig))
        assert len(found) == 7 and np.allclose(found, point, atol=1e-6)
        assert fig.axes[0].get_title(loc="left") == "largest weight 0.50 on average"


def test_triangle_counts_its_leaders():
    fig = mixture_simplex(.5, .3, .2, draws=2000)
    sizes = [len(d) for d in dots(fig)]
    assert sum(sizes) == 2000
    assert np.allclose(np.array(sizes) / 2000, [.5, .3, .2], atol=.035)   # a draw from p
    labels = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert labels[0] == f"token 1 leads: {sizes[0] / 2000:.0%}"
    names = [t.get_text() for t in fig.axes[0].texts]
    assert names == ["token 1, p = 0.50", "token 2, p = 0.30", "token 3, p = 0.20"]


def test_tau_mixes_and_does_not_choose():
    p = torch.tensor([.5, .3, .2])
    cold, warm, hot = (simplex_weights(p, 1., tau, 500, 3) for tau in (.05, 1., 50.))
    assert torch.equal(cold.argmax(1), hot.argmax(1))
    assert cold.max(1).values.mean() > .95 and (hot - 1 / 3).abs().max() < .05
    assert torch.equal(warm, simplex_weights(p, 1., 1., 500, 3))            # same seed
    assert not torch.equal(warm, simplex_weights(p, 1., 1., 500, 4))
    with pytest.raises(ValueError, match="must be positive"): mixture_simplex(p2=0)


# --- margins

def test_margin_bars_have_the_area_of_their_mass():
    top = gumbel_margin("two-sided", 0.5, -1.0, 2.0).axes[0]
    low, high = top.patches
    area = lambda bar: abs(bar.get_width()) * bar.get_height()
    assert area(low) == pytest.approx(math.exp(-math.exp(1.0)), rel=1e-6)
    assert area(high) == pytest.approx(1 - math.exp(-math.exp(-2.0)), rel=1e-6)
    x, y = top.lines[0].get_data()
    assert x[0] == pytest.approx(-0.5) and x[-1] == pytest.approx(1.0)       # scale times clip
    assert np.trapezoid(y, x) + area(low) + area(high) == pytest.approx(1, abs=1e-4)
    assert [t.get_text() for t in top.texts] == ["6.6%", "12.7%"]


@pytest.mark.parametrize("side, shift, wrong", [("two-sided", 0, "37%"), ("one-sided", 1.5, "0%")])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_margin_says_mean_and_misaligned_share(side, shift, wrong, scale):
    fig = gumbel_margin(side, scale)
    mean = mean_factor(scale, (-1.5, 3.0), shift)
    title = fig.axes[0].get_title(loc="left")
    assert title == f"{side}, scale {scale:g}\nmean factor {mean:+.3f}, misaligned {wrong}"
    curve, level = fig.axes[1].lines[:2]
    x, y = curve.get_data()
    assert np.interp(0, x, y) == pytest.approx(0, abs=1e-3)
    assert y[-1] == pytest.approx(1 - math.exp(-x[-1]), abs=1e-5)
    assert level.get_ydata()[0] == pytest.approx(mean)


def test_margin_refuses_what_has_no_margin():
    with pytest.raises(ValueError, match="positive noise scale"): gumbel_margin(scale=0)
    with pytest.raises(ValueError, match="below clip_high"): gumbel_margin(clip_low=3.0)
    with pytest.raises(ValueError, match="'one-sided'"): gumbel_margin("left")


# --- the group

def heights(fig): return [bar.get_height() for bar in fig.axes[0].patches]


@pytest.mark.parametrize("masking, expected, total", [
    ("off", [1.6202, 1.6202] + [-.5401] * 6, "+0.00"),
    ("paper", [1.2910, 1.2910] + [-.6455] * 4 + [0, 0], "+0.00"),
    ("released", [1.6202, 1.6202] + [-.5401] * 4 + [0, 0], "+1.08")])
def test_group_bars(masking, expected, total):
    fig = group_of_eight("11000000", "11111100", masking)
    assert np.allclose(heights(fig), expected, atol=1e-3)
    ax = fig.axes[0]
    assert ax.get_title(loc="left") == f"masking {masking}: the advantages sum to {total}"
    ticks = [t.get_text().split("\n")[1] for t in ax.get_xticklabels()]
    assert ticks == ["right"] * 2 + ["wrong"] * 4 + ["cut"] * 2


def test_group_rollout_that_was_cut_earns_nothing():
    assert heights(group_of_eight("11000011", "11111100")) == heights(group_of_eight())
    assert heights(group_of_eight("11111111", "00000000", "off")) == [0] * 8
    assert heights(group_of_eight("11111111", "10000000", "paper")) == [0] * 8


def test_group_refuses_other_patterns():
    for bad in ("1100", "110000002", "1100000x"):
        with pytest.raises(ValueError, match="rewards=.*eight digits"): group_of_eight(bad)
    with pytest.raises(ValueError, match="valid=.*eight digits"): group_of_eight(valid="")
    with pytest.raises(ValueError, match="choose 'off'"): group_of_eight(masking="none")


# --- two paths

def test_paths_ends_and_middle():
    fig = two_paths(.25, own=8., shared=6.)
    bars, (left, right) = [b.get_height() for b in fig.axes[0].patches], fig.axes
    a, b, x = math.exp(2), math.exp(6), math.exp(6)
    assert np.allclose(bars, np.array([a, b, x]) / (a + b + x)) and sum(bars) == pytest.approx(1)
    curve, dashed, dot = (line.get_data() for line in right.lines)
    alone = (math.exp(8) + 1) / (math.exp(8) + 1 + math.exp(6))
    assert curve[0][0] == 0 and curve[0][-1] == 1
    assert curve[1][0] == pytest.approx(alone) and curve[1][-1] == pytest.approx(alone)
    assert np.allclose(dashed[1], alone)                      # mixing continuations loses nothing
    assert curve[1].min() == pytest.approx(2 * math.exp(4) / (2 * math.exp(4) + math.exp(6)))
    assert dot[0][0] == .25 and dot[1][0] == pytest.approx(bars[0] + bars[1])
    assert right.get_title(loc="left") == f"right with probability {bars[0] + bars[1]:.2f}"
    assert left.get_title(loc="left") == "at w = 0.25"


def test_paths_without_a_shared_second_choice_may_be_averaged():
    assert path_probs(.5, 8., 0.)[:2].sum() > .99
    assert path_probs(.5, 8., 4 + math.log(2))[2] == pytest.approx(.5)
    assert path_probs(np.linspace(0, 1, 5)).shape == (5, 3)


# --- pass@k

def test_pass_at_k_lines_are_the_unbiased_estimates():
    fig = pass_at_k_by_noise(COUNTS, 8, k_max=6, noise_scale=1.0)
    ax = fig.axes[0]
    lines = {line.get_label(): line.get_data() for line in ax.lines}
    assert list(lines) == ["noise 0.25", "noise 1"]
    for scale, c in COUNTS.items():
        k, y = lines[f"noise {scale:g}"]
        assert list(k) == [1, 2, 4, 6]
        assert y[0] == pytest.approx(np.mean(c) / 8)
        assert y[2] == pytest.approx(pass_at_k(8, c, 4).mean())
    first, last = (bootstrap_interval(pass_at_k(8, COUNTS[1.0], k), draws=500) for k in (1, 6))
    title = ax.get_title(loc="left")
    assert title == (f"noise 1: pass@1 {first.mean:.2f}, pass@6 {last.mean:.2f} "
                     f"[{last.low:.2f}, {last.high:.2f}]")
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(first.low)
    assert band[:, 1].max() == pytest.approx(max(last.high, first.high))


def test_pass_at_k_reads_keys_of_a_results_file():
    text = {str(s): c for s, c in COUNTS.items()}
    fig = pass_at_k_by_noise(text, 8, k_max=8)
    assert fig.axes[0].get_title(loc="left").startswith("noise 0.25: pass@1 0.50, pass@8 0.50")
    with pytest.raises(ValueError, match="measured are"): pass_at_k_by_noise(text, 8, 8, .5)
    with pytest.raises(ValueError, match="k <= n"): pass_at_k_by_noise(text, 8, 16)


# --- sliders and frames

@pytest.fixture
def no_display(monkeypatch):
    """What would be shown in the cell, in a list; without IPython it would be printed."""
    pytest.importorskip("ipywidgets")
    from ipywidgets.widgets import interaction
    shown = []
    monkeypatch.setattr(interaction, "display", shown.append)
    return shown


def test_sliders_redraw(no_display):
    view = explore(gumbel_margin, side=["two-sided", "one-sided"], scale=(.25, 2., .25))
    named = {w.description: w for w in view.children if getattr(w, "description", "")}
    assert set(named) == {"side", "scale"} and named["scale"].value == 1.0     # its own default
    assert (named["scale"].min, named["scale"].max, named["scale"].step) == (.25, 2., .25)
    title = lambda: view.result.axes[0].get_title(loc="left")
    assert title().startswith("two-sided, scale 1\n")
    named["scale"].value = .5
    assert title().startswith("two-sided, scale 0.5\n")
    named["side"].value = "one-sided"
    assert title().startswith("one-sided, scale 0.5\n")
    assert len(no_display) == 3 and no_display[-1] is view.result


def test_other_values_stay_fixed(no_display):
    view = explore(pass_at_k_by_noise, counts=COUNTS, n=8, k_max=[2, 4, 8], noise_scale=[.25, 1.])
    assert [w.description for w in view.children[:-1]] == ["k_max", "noise_scale"]
    view = explore(PICTURES["pass"], noise_scale=[.25, 1.])        # arguments bound beforehand
    assert [w.description for w in view.children[:-1]] == ["noise_scale"]
    assert view.result.axes[0].get_title(loc="left").startswith("noise 0.25: pass@1 0.50")


def test_unknown_sliders_are_refused():
    with pytest.raises(TypeError, match="weigth"): explore(two_paths, weigth=(0., 1.))
    with pytest.raises(TypeError, match="counts"): explore(pass_at_k_by_noise, n=8)


def test_without_ipywidgets_the_error_says_what_to_do(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("ipywidgets"): raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install ipywidgets"): explore(two_paths, weight=(0., 1.))
    assert frames(two_paths, weight=[.5])                          # pictures need no widgets


def test_frames_are_pictures_of_one_slider():
    made = frames(two_paths, weight=[0., .5, 1.], shared=5.)
    assert [setting for setting, _ in made] == [dict(weight=w, shared=5.) for w in (0., .5, 1.)]
    assert all(png.startswith(b"\x89PNG\r\n") for _, png in made)
    assert len({png for _, png in made}) == 3
    assert frames(two_paths, weight=[.5], shared=5.)[0][1] == made[1][1]
    read = pyplot.imread(__import__("io").BytesIO(made[0][1]))
    assert read.shape[0] > 150 and read.shape[1] > 300 and read[..., :3].min() < .2
    for bad in (dict(weight=.5), dict(weight=[.5], shared=[4., 6.])):
        with pytest.raises(ValueError, match="exactly one"): frames(two_paths, **bad)


@each_picture
def test_every_argument_has_a_default_for_a_slider(picture):
    parameters = inspect.signature(picture).parameters.values()
    assert all(p.default is not p.empty for p in parameters)
