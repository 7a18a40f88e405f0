"""The built site in a real browser: `make docs`, then `make site-test`; screenshots in _screens.

Without a site or without Chromium these tests are skipped; SITE_TEST=1 (as in `make site-test`) makes
them fail instead.
"""
import json
import os
import re
import shutil
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from latent_grpo.sampling import Sampling, gradient_factor, mixture_weights, perturb

ROOT = Path(__file__).parent.parent
SITE, SCREENS = ROOT / "_docs", ROOT / "_screens"
CHROMIUM = shutil.which("chromium")
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html") if "_static" not in p.parts)
LESSONS = [p for p in PAGES if p.startswith("nbs/")]
SHOWN = [p for p in PAGES if not p.startswith("_modules/") or p == "_modules/latent_grpo/noise.html"]
WITH_CODE = ("nbs/14_noise.html", "own-work.html", "_modules/latent_grpo/noise.html")
VIEWS = {"laptop": (1280, 800, "light"), "phone": (390, 844, "dark")}
missing = [what for what, there in (("the site (make docs)", PAGES), ("Chromium", CHROMIUM)) if not there]
if missing and os.environ.get("SITE_TEST"): pytest.fail(f"missing: {missing}", pytrace=False)
pytestmark = [pytest.mark.site, pytest.mark.slow,
              pytest.mark.skipif(bool(missing), reason=f"missing: {', '.join(missing)}")]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def home():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=VIEWS)
def view(request): return request.param


@pytest.fixture
def tab(browser, view, home):
    """A page that notes what goes wrong on it."""
    width, height, scheme = VIEWS[view]
    context = browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme)
    page, page.wrong = context.new_page(), []
    page.on("console", lambda m: page.wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    page.on("request", lambda r: page.wrong.append(r.url) if not r.url.startswith((home, "file:", "data:")) else None)
    left = "net::ERR_ABORTED"        # the reader went on before it came
    page.on("requestfailed", lambda r: page.wrong.append(f"failed: {r.url}") if r.failure != left else None)
    page.on("response", lambda r: page.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    yield page
    context.close()


desktop = pytest.mark.parametrize("view", ["laptop"], indirect=True)


def drawn(page):
    """Wait until the formulas are drawn."""
    page.wait_for_function("!window.MathJax || (MathJax.startup && MathJax.startup.promise && "
                           "MathJax.startup.promise.then(() => true))")


def faults(page, code=True):
    """What axe-core calls serious or critical; without the spans of code and formulas it takes a fifth of the time."""
    from axe_playwright_python.sync_playwright import Axe
    context = None if code else {"exclude": [[".highlight pre"], ["mjx-container"]]}
    options = {"resultTypes": ["violations"], "preload": False}
    found = Axe().run(page, context, options).response["violations"]
    return [(v["id"], [n["html"][:150] for n in v["nodes"]][:5]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("name", SHOWN)
def test_page(tab, home, view, name):
    tab.goto(home + name)
    drawn(tab)
    undrawn = tab.evaluate("[...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container')).length")
    assert not undrawn and not tab.query_selector("mjx-merror")
    wide = """() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('article *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80)).slice(0, 3)"""
    assert tab.evaluate(wide) == [] and tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    bad = "[...document.querySelectorAll('article img')].filter(i => !i.alt || (i.complete && !i.naturalWidth)).map(i => i.src)"
    assert tab.evaluate(bad) == []
    assert faults(tab, code=name in WITH_CODE) == []
    SCREENS.mkdir(exist_ok=True)
    tab.screenshot(path=SCREENS / f"{name.removesuffix('.html').replace('/', '-')}-{view}.png", full_page=True)
    assert tab.wrong == []


# --- links ---

class Links(HTMLParser):
    """Links and ids of a page."""
    def __init__(self, name):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed((SITE / name).read_text("utf-8"))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def test_every_link_and_anchor_leads_somewhere():
    found, dead = {name: Links(name) for name in PAGES}, []
    for name, page in found.items():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", path): continue
            path = path.partition("?")[0]
            target = os.path.normpath(Path(name).parent / path) if path else name
            if not (SITE / target).is_file(): dead.append((name, link))
            elif anchor and target in found and anchor not in found[target].ids: dead.append((name, link))
    assert len(found) > 50 and not dead


@pytest.mark.parametrize("name", LESSONS)
def test_colab_and_download(name):
    stem, links = Path(name).stem, Links(name).links
    assert f"https://colab.research.google.com/github/latent-grpo/latent_grpo/blob/main/nbs/{stem}.ipynb" in links
    assert (ROOT / f"nbs/{stem}.ipynb").exists()
    notebook = json.loads((SITE / f"_static/notebooks/{stem}.ipynb").read_text("utf-8"))
    assert f"../_static/notebooks/{stem}.ipynb" in links and notebook["nbformat"] == 4


@pytest.mark.parametrize("name", LESSONS)
def test_what_nbdev_hides_is_hidden_and_what_is_learnt_is_shown(name):
    text = (SITE / name).read_text("utf-8")
    assert "fastcore.test" not in text and "#| " not in text and "pip install -U" not in text
    assert "What you need to know before" in text and re.search(r"about \d+ minutes to read", text)


# --- use ---

@desktop
@pytest.mark.parametrize("term, page", [("Gumbel", "nbs/05_sampling.html"), ("non-closure", "nbs/12_closure.html"),
    ("mean_factor", "api/noise.html"), ("effective support", "glossary.html"), ("resume", "faq.html")])
def test_search(tab, home, term, page):
    tab.goto(home + "index.html")
    tab.keyboard.press("Control+k")
    tab.keyboard.type(term)
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results .search li a")
    tab.wait_for_timeout(1500)
    links = tab.eval_on_selector_all("#search-results .search li a", "all => all.map(a => a.href)")
    assert any(page in link for link in links), links[:10]
    assert tab.wrong == []


@desktop
@pytest.mark.parametrize("lesson", ["04_latent", "12_closure", "13_masking", "14_noise", "17_evaluate"])
def test_sliders_follow_the_keyboard(tab, home, lesson):
    tab.goto(f"{home}nbs/{lesson}.html")
    box = tab.locator(".slider").first
    image, slider = box.locator("img"), box.locator("input")
    slider.focus()
    before, said = image.get_attribute("src"), box.locator("output").inner_text()
    tab.keyboard.press("ArrowRight")
    assert image.get_attribute("src") != before and box.locator("output").inner_text() != said
    assert slider.get_attribute("aria-valuetext") == box.locator("output").inner_text()
    tab.keyboard.press("Home")
    assert image.get_attribute("src").endswith("-00.webp")
    tab.wait_for_function("document.querySelector('.slider img').naturalWidth > 300")
    tab.goto(f"{home}nbs/24_explore.html")
    assert tab.locator(".slider").count() == 5 and tab.wrong == []


def corners(grid): return [(i, j) for i in range(grid + 1) for j in range(grid + 1 - i)]


def told(weights, margins, p):
    """The rows of the table on the front page, by the library."""
    for k, (w, d, x) in enumerate(zip(weights.tolist(), margins.tolist(), p.tolist())):
        factor = gradient_factor(margins[k]).item()
        way = "stays" if abs(factor) < 0.005 else "↑ rises" if factor > 0 else "↓ falls"
        yield [x, d, w, factor, way]


def test_the_latent_that_moves_is_the_library_s(tab, home):
    """Sliders, box and buttons by keyboard; weights, margins and factors against the package."""
    record = json.loads((ROOT / "docs/results/mixture.json").read_text("utf-8"))
    tab.goto(home + "index.html")
    knob, press, draw = tab.locator(".mixture").locator, tab.keyboard.press, 0
    for target, keys in [("[name=p] >> nth=0", ["ArrowLeft"] * 3), ("[name=sigma]", ["End"]), ("[name=shift]", ["Space"]),
                         ("[name=draw]", ["Enter"]), ("[name=p] >> nth=2", ["Home"]), ("[name=shift]", ["Space"]),
                         ("[name=sigma]", ["Home"]), ("[name=reset]", ["Enter"])]:
        knob(target).focus()
        for key in keys: press(key)
        draw += len(keys) * ("draw" in target)
        p = torch.tensor([float(knob(f"[name=p] >> nth={k}").input_value()) for k in range(3)])
        p, scale, shift = p / p.sum(), float(knob("[name=sigma]").input_value()), 1.5 * knob("[name=shift]").is_checked()
        sampling = Sampling(top_k=3, top_p=1., noise_scale=scale, shift=shift)
        ids, scores = perturb(torch.arange(3)[None], p.log()[None], torch.tensor(record["noise"][draw:draw + 1]), sampling)
        back = ids[0].argsort()
        weights, margins = mixture_weights(scores, sampling)[0, back], scores[0, back] - p.log()
        for k, (*numbers, way) in enumerate(told(weights, margins, p)):
            shown = knob(f".draw tbody tr >> nth={k} >> td").all_inner_texts()
            assert [float(x.replace("−", "-")) for x in shown[:4]] == pytest.approx(numbers, abs=0.0051)
            assert shown[4] == way
        i, j = (weights[:2] * record["grid"]).round().int().tolist()
        percent = record["next_percent"][corners(record["grid"]).index((i, j))]
        assert [t.rstrip(" %") for t in knob(".bars td:nth-child(2)").all_inner_texts()] == list(map(str, percent))
    assert knob("[role=status]").inner_text().startswith("The model ") and tab.wrong == []


@desktop
def test_progress_and_theme_are_kept(tab, home):
    tab.goto(home + "nbs/04_latent.html")
    tab.locator(".tick input").check()
    tab.locator("button.theme-switch-button").first.click()
    tab.locator("button.theme-change-button[data-mode=dark]").first.click()
    mode = tab.evaluate("document.documentElement.dataset.mode")
    tab.goto(home + "lessons.html")
    assert tab.locator(".map a.done").get_attribute("data-lesson") == "04_latent"
    assert tab.evaluate("document.documentElement.dataset.mode") == mode == "dark"
    assert re.match(r"1 of \d+ lessons", tab.inner_text(".map-count"))


@desktop
def test_read_from_a_folder_without_a_server(tab):
    for name in ("index.html", "nbs/05_sampling.html", "api/sampling.html"):
        tab.goto((SITE / name).as_uri())
        drawn(tab)
        assert tab.wrong == []
    tab.goto((SITE / "search.html").as_uri() + "?q=misaligned")
    tab.wait_for_selector("#search-results .search li a")
    assert not [w for w in tab.wrong if w.startswith("http")]    # a browser shows no previews here


@desktop
def test_keyboard_reaches_the_text_first(tab, home):
    tab.goto(home + "nbs/14_noise.html")
    tab.keyboard.press("Tab")
    assert "main-content" in tab.evaluate("document.activeElement.href || ''")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('main') !== null")
