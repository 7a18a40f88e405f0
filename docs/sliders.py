"""Pictures drawn beforehand for each value of a slider, and the HTML that shows them."""
import hashlib
import html
import json
import re
from functools import partial
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from execnb.nbio import mk_cell
from PIL import Image

from latent_grpo import explore

NOISE = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


def assumed_counts():
    """Right answers of 64 samples at each noise scale in the model of lesson 24 (Eq. 24.2)."""
    rng = np.random.default_rng(0)
    z = rng.normal(1, 2, 200)
    return {s: rng.binomial(64, 1 / (1 + np.exp(-z / s))) for s in NOISE}


# name of the picture: (what varies, its values, what is fixed, label, lessons besides 24, text)
SLIDERS = {
    "mixture_simplex": ("noise_scale", [0.2 * i for i in range(11)], {}, "noise scale σ", ("04", "05"),
        "300 drawn mixtures of three words, each in a corner: with more noise they spread over the triangle."),
    "gumbel_margin": ("scale", [0.25 + 0.175 * i for i in range(11)], {}, "noise scale σ", ("14",),
        "Margin of a component under two-sided noise, and the factor that moves it: shaded margins push the wrong way."),
    "group_of_eight": ("valid", ["1" * (8 - i) + "0" * i for i in range(7)], {"masking": "released"},
        "rollouts that ended", ("13",), "Advantages of a group of eight under the released masking, two of them right: the more "
        "rollouts are cut, the further the sum is from zero."),
    "two_paths": ("weight", [0.1 * i for i in range(11)], {}, "weight w of path a", ("12",),
        "Two right first latents: between them the chance to be right falls, since the second choice of both wins."),
    "pass_at_k_by_noise": ("noise_scale", NOISE, {}, "noise scale σ", ("17",),
        "pass@k at six noise scales, in the assumed model of lesson 24 and not measured: noise costs at k = 1 and pays at k = 64."),
}
PICTURES = {name: getattr(explore, name) for name in SLIDERS}
PICTURES["pass_at_k_by_noise"] = partial(explore.pass_at_k_by_noise, assumed_counts(), 64)


def said(value):
    """A value as the page prints it; a pattern of a group as the number of its ones."""
    return f"{value.count('1')} of 8" if isinstance(value, str) else f"{value:.3g}"


def draw(cache):
    """Name of each file -> its bytes; drawn again when the pictures or this file changed."""
    sources = [Path(__file__), Path(explore.__file__), Path(explore.__file__).with_name("sampling.py")]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = cache / f"frames-{key}"
    if not folder.exists():
        part = cache / f".frames-{key}"
        part.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"savefig.dpi": 120}):
            for name, (argument, values, fixed, *_) in SLIDERS.items():
                for i, (_, png) in enumerate(explore.frames(PICTURES[name], **{argument: values}, **fixed)):
                    Image.open(BytesIO(png)).convert("RGB").save(part / f"{name}-{i:02d}.webp", quality=80)
        part.rename(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def figure(name, cache):
    """The picture with its slider; without scripts it stands still."""
    argument, values, fixed, label, _, text = SLIDERS[name]
    middle = len(values) // 2
    wide, high = Image.open(next(cache.glob("frames-*")) / f"{name}-00.webp").size
    return (f'<figure class="slider" data-values="{html.escape(json.dumps(list(map(said, values))))}">\n'
            f'<img src="../_static/frames/{name}-{middle:02d}.webp" alt="{html.escape(text)}" '
            f'width="{wide // 2}" height="{high // 2}">\n<label><span>{label}</span> <input type="range" '
            f'name="{label}" min="0" max="{len(values) - 1}" value="{middle}"> '
            f'<output>{said(values[middle])}</output></label>\n<figcaption>{text}</figcaption>\n</figure>')


def insert(stem, cells, cache):
    """Put the sliders into a lesson: below the pictures of lesson 24, else before the exercises."""
    out, title = [], "## Exercises"
    for cell in cells:
        for name, (*_, lessons, _) in SLIDERS.items():
            live = stem == "24_explore" and re.search(rf"explore\((partial\()?{name}\b", cell.source)
            if cell.cell_type == "code" and live: out.append(mk_cell(figure(name, cache), "markdown"))
            if stem[:2] in lessons and cell.cell_type == "markdown" and title in cell.source:
                before, _, cell.source = cell.source.partition(title)
                cell.source = title + cell.source
                lead = f"{before}\n\n## Move it\n\nMore pictures with sliders: [lesson 24](24_explore.ipynb)."
                out += [mk_cell(lead, "markdown"), mk_cell(figure(name, cache), "markdown")]
        out.append(cell)
    return out
