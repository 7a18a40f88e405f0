"""Build the site: `make docs`. Runs the notebooks, arranges the pages in _proc, calls Sphinx.

`--committed` takes the outputs as they are in nbs/ instead of running the notebooks.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from importlib.util import find_spec
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import api
import sliders
from execnb.nbio import mk_cell, nb2str, read_nb
from execute import execute
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, rm_header_dash, strip_ansi
from PIL import Image

from latent_grpo import plots

ROOT = Path(__file__).parent.parent
PROC, RUN, NBS, DOCS = (ROOT / name for name in ("_proc", "_executed", "nbs", "docs"))
PAGES = sorted(NBS.glob("[0-9]*.ipynb"))
NUMBERED = {p.stem[3:]: p.stem for p in PAGES if p.stem[3:] in sum(plots.PARTS.values(), [])}
PARTS = {part: [name for name in names if name in NUMBERED] for part, names in plots.PARTS.items()}
GUIDES = [p.stem for p in PAGES if p.stem not in NUMBERED.values()]
SETTINGS = ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
COLAB = SETTINGS["DEFAULT"]["git_url"].replace("https://github.com", "https://colab.research.google.com/github")
PUBLIC = {name for _, name in api.OWNERS}
WRITTEN = set()


def put(path, data):
    """Write a file of _proc, but only when it differs: Sphinx reads again what is newer."""
    path, data = PROC / path, data.encode() if isinstance(data, str) else data
    WRITTEN.add(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data: path.write_bytes(data)


# --- run the notebooks ---

def digest(path):
    """Changes with the source of a notebook, with the package and with what is measured."""
    cells = [(c["cell_type"], c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"]]
    inputs = [*(ROOT / "latent_grpo").glob("*.py"), *(DOCS / "results").glob("*.json"), DOCS / "execute.py"]
    parts = [json.dumps(cells).encode(), *(p.read_bytes() for p in sorted(inputs))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run_all():
    """Run what has changed, two at a time, in _executed; the folder of the results."""
    RUN.mkdir(exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("MPLBACKEND", None)
    keys = {path: digest(path) for path in PAGES}
    known = lambda path: RUN / f"{path.stem}.key"
    old = [p for p in PAGES if not known(p).exists() or known(p).read_text() != keys[p]]
    for path in old: (RUN / path.name).write_bytes(path.read_bytes())
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = {path: pool.submit(execute, RUN / path.name) for path in old}
        for path, job in jobs.items():
            if job.exception(): raise SystemExit(f"{path.name} does not run:\n{job.exception()}")
            known(path).write_text(keys[path])
            print("ran", path.name, flush=True)
    return RUN


# --- from a notebook to a page ---

def default_exp_(cell, *args):
    """nbdev's directive names the module; the page says so in its head."""
    del cell["source"]


def linked(text):
    """Names of the package become links to the reference; code and headings stay as they are."""
    modules = {}
    for module, name in api.OWNERS: modules.setdefault(name, []).append(module)
    def link(found):
        name = found[1].removeprefix("latent_grpo.")
        if found[1].startswith("latent_grpo.") and name in api.MODULES:
            return f"{{py:mod}}`latent_grpo.{name}`"
        if len(modules.get(name, [])) != 1 or not ("_" in name or name[0].isupper()): return found[0]
        return f"{{py:obj}}`{name} <latent_grpo.{modules[name][0]}.{name}>`"
    parts = re.split(r"(^```.*?^```|^#.*?$|^<.*?>$)", text, flags=re.M | re.S)
    return "".join(re.sub(r"(?<![`\[{}])`([\w.]+)`(?![`\]])", link, p) if i % 2 == 0 else p
                   for i, p in enumerate(parts))


def minutes(nb):
    """Minutes to read (200 words or 30 lines of code a minute) and of the exercises."""
    text = lambda kind: "\n".join(c.source for c in nb.cells if c.cell_type == kind)
    read = len(text("markdown").split()) / 200 + len(text("code").splitlines()) / 30
    exercises = re.findall(r"^\*\*\d+\. \([a-z]+, (\d+) minutes\)", text("markdown"), re.M)
    return max(5, 5 * round(read / 5)), sum(map(int, exercises))


def head(stem, source, read, exercises):
    """The first cell with its facts in a box: what to know before, time, notebook."""
    found = re.search(r"\*Prerequisites:\s+(.*?)\.\s+Runs\s+in\s+(?:about\s+)?(\d+)\s+seconds(.*?)\.\*", source, re.S)
    if not found: raise SystemExit(f"{stem}: its first cell has no line of prerequisites")
    rest = re.sub(r"^\s*on\s+a\s+CPU\W*", "", found[3])
    time = f"about {read} minutes to read" + f", {exercises} for the exercises" * bool(exercises)
    box = (f":::{{container}} page-head\n**What you need to know before:** {found[1]}.\n\n"
           f"**Time:** {time}; the notebook runs in {found[2]} seconds on a CPU. {rest}{'.' * bool(rest)}\n\n"
           f'<p class="buttons"><a href="{COLAB}/blob/main/nbs/{stem}.ipynb">Open in Colab</a> '
           f'<a href="../_static/notebooks/{stem}.ipynb" download>Download notebook</a></p>\n:::\n\n')
    return re.sub(r"^> ", "{.answer}\n> ", source.replace(found[0], box), count=1, flags=re.M)


def alt_text(cells, i):
    """The caption below a figure, as plain text."""
    after = next((c.source for c in cells[i + 1:] if c.cell_type == "markdown"), "")
    caption = re.match(r"\*(F[\d.]+ .*?)\*(?:\s|$)", after, re.S)
    plain = caption[1] if caption else "Figure; the text below describes it"
    return " ".join(re.sub(r"[`$*\\]|\]\(.*?\)|\[", "", plain).split())


def tagged(text):
    """A formula with a number and `\\\\` would be wrapped in `split`, which allows no number: write `\\cr`."""
    return re.sub(r"\$\$.*?\$\$", lambda m: m[0].replace("\\\\", r"\cr ") if r"\tag" in m[0] else m[0], text, flags=re.S)


def arrange(cells):
    """Cells of the page: anchors before definitions, texts for pictures, names linked."""
    out = []
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown": cell.source = linked(tagged(cell.source.replace("](../docs/", "](../")))
        else:
            echo = not re.search(r"^#\| echo: false", cell.source, re.M)
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            if not echo and cell.source.startswith("roadmap("): continue      # the site has its own
            if not echo: cell.metadata["tags"] = ["remove-input"]
            pngs = [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            if pngs:
                wide, high = Image.open(BytesIO(b64decode(pngs[0]))).size
                cell.metadata["mystnb"] = {"image": {"alt": alt_text(cells, i), "classes": "wide" if wide > 2 * high else ""}}
            names = re.findall(r"^(?:def |class )?([\w, ]+?)(?:\(| = |:)", cell.source, re.M)
            anchors = [f'<div id="def-{n}"></div>' for n in ", ".join(names).split(", ") if n in PUBLIC]
            if "export" in cell.directives_ and anchors: out.append(mk_cell("".join(anchors), "markdown"))
        out.append(cell)
    return out


def lesson(path, stem):
    """The page of a notebook, and the notebook itself for download."""
    put(f"_static/notebooks/{stem}.ipynb", path.read_bytes())
    nb = read_nb(path)
    time = minutes(nb)
    NBProcessor(nb=nb, procs=[strip_ansi, hide_line, rm_header_dash, hide_, default_exp_, clean_magics], process=True)
    nb.cells[0].source = head(stem, nb.cells[0].source, *time)
    nb.cells = sliders.insert(stem, arrange(nb.cells), RUN)
    nb.cells.insert(1, mk_cell(f'<details class="where"><summary>Where are we?</summary>\n{series_map("", stem)}\n'
                               '</details>', "markdown"))
    nb.cells.append(mk_cell(f'<p class="tick"><label><input type="checkbox" data-lesson="{stem}"> I have worked '
                            'through this page (kept in this browser only)</label></p>', "markdown"))
    put(f"nbs/{stem}.ipynb", nb2str(nb))


# --- the other pages ---

def parts():
    """(name of the part, its pages), guides last if there are any."""
    named = [(p.split()[0], " ".join(p.split()[1:])) for p in PARTS]
    shown = [(f"{roman} · {name.capitalize()}", [f"nbs/{NUMBERED[n]}" for n in PARTS[p]])
             for p, (roman, name) in zip(PARTS, named)]
    guides = [f"nbs/{g}" for g in GUIDES] + [f"guides/{p.stem}" for p in sorted(DOCS.glob("guides/*.md"))]
    return shown + [("Guides", guides)] * bool(guides)


def series_map(folder="nbs/", here=None):
    """All lessons as links, in their parts; a script ticks those that the reader has done."""
    rows = []
    for part, names in PARTS.items():
        links = [f'<a href="{folder}{NUMBERED[n]}.html" data-lesson="{NUMBERED[n]}"'
                 f'{" aria-current=page" * (NUMBERED[n] == here)}>{NUMBERED[n].replace("_", " ")}</a>' for n in names]
        rows.append(f"<div><b>{' '.join(part.split()[1:]).capitalize()}</b><p>{''.join(links)}</p></div>")
    return f'<nav class="map" aria-label="Map of the series">{"".join(rows)}</nav>'


def contents():
    """Every lesson with its question and its answer, by part."""
    lines = [f'<p class="map-count" data-of="{len(NUMBERED)}"></p>', ""]
    for part, names in parts():
        lines += [f"## {part}", ""]
        for name in names:
            if not name.startswith("nbs/"): lines.append(f"- [](/{name}.md)"); continue
            first = next(c for c in read_nb(ROOT / f"{name}.ipynb").cells if c.cell_type == "markdown").source
            read, exercises = minutes(read_nb(ROOT / f"{name}.ipynb"))
            answer = re.search(r"^> (.*)$", first, re.M)[1]
            lines.append(f"- [**{name[4:6]}** {api.title(ROOT / f'{name}.ipynb')}]({name}.ipynb)\\\n  {answer} "
                         f"*({read}{f' + {exercises}' * bool(exercises)} minutes)*")
        lines.append("")
    return "\n".join(lines)


def toctrees():
    """The order of all pages."""
    question = lambda name: f"{name[4:6]} {api.title(ROOT / f'{name}.ipynb')} <{name}>" if name[:3] == "nbs" else name
    start, look_up = ["lessons", "results"], ["api/index", "notation", "glossary", "faq", "changelog", "cite"]
    others = [p.stem for p in sorted(DOCS.glob("*.md")) if p.stem not in ("index", *start, *look_up)]
    trees = [("Start", start + others), *((p, map(question, names)) for p, names in parts()), ("Look up", look_up)]
    return "\n".join(f"```{{toctree}}\n:hidden:\n:caption: {name}\n\n" + "\n".join(pages) + "\n```\n" for name, pages in trees)


def records():
    """The files in docs/results: what each holds, and how it was made."""
    lines = []
    for path in sorted((DOCS / "results").glob("*.json")):
        put(f"_static/results/{path.name}", path.read_bytes())
        r = json.loads(path.read_text("utf-8"))
        seeds = f'{n} seed{"s" * (n > 1)}, ' if (n := len(r["seeds"])) else ""      # counts of files have none
        lines.append(f'- <a href="_static/results/{path.name}" download>{path.name}</a>, {seeds}'
                     f'commit {r["commit"]}, {r["date"]}:<br>`{r["command"]}`')
    for path in sorted((DOCS / "results").glob("*.gz")):
        put(f"_static/results/{path.name}", path.read_bytes())
        lines.append(f'- <a href="_static/results/{path.name}" download>{path.name}</a>, a line of JSON per run')
    return "\n".join(lines)


def mixture():
    """The piece that moves on the front page, with the numbers that it looks up."""
    data = json.loads((DOCS / "results/mixture.json").read_text("utf-8"))
    kept = {k: data[k] for k in ("words", "steps", "probabilities", "grid", "noise", "next_percent")}
    html = (DOCS / "mixture.html").read_text("utf-8").replace("@data@", json.dumps(kept, separators=(",", ":")))
    return f"```{{raw}} html\n{html}```"


def written():
    """Configuration, static files and hand-written pages; five marks are filled in."""
    fill = {"map": series_map, "contents": contents, "records": records, "toctrees": toctrees, "mixture": mixture}
    for path in sorted(DOCS.rglob("*")):
        name = path.relative_to(DOCS)
        if path.is_dir() or name.parts[0] in ("results", "__pycache__") or path.suffix in (".py", ".html") and name.name != "conf.py": continue
        if path.suffix != ".md": put(name, path.read_bytes()); continue
        text = re.sub(r"\]\(\.\./(nbs/|docs/)", lambda m: "](" + m[1].removeprefix("docs/"), path.read_text("utf-8"))
        for mark, make in fill.items():
            if f"<!-- {mark} -->" in text: text = text.replace(f"<!-- {mark} -->", make())
        put(name, linked(text))


def mathjax():
    """MathJax and its fonts: 2 of the 24 MB of the package that holds them."""
    folder = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    for path in [folder / "tex-chtml-full.js", *folder.rglob("chtml/fonts/woff-v2/*")]:
        put(f"_static/mathjax/{path.relative_to(folder)}", path.read_bytes())


def main():
    """Everything, warnings as errors."""
    folder = NBS if "--committed" in sys.argv else run_all()
    written()
    mathjax()
    for module in api.MODULES: put(f"api/{module}.rst", api.page(module))
    put("api/index.rst", api.index())
    for name, data in sliders.draw(RUN).items(): put(f"_static/frames/{name}", data)
    for path in PAGES: lesson(folder / path.name, path.stem)
    for path in PROC.rglob("*"):
        if path.is_file() and path not in WRITTEN: path.unlink()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(RUN / "doctrees"), str(PROC), str(ROOT / "_docs")]
    raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__": main()
