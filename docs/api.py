"""The API reference: a page for each module, and what Sphinx's autodoc does not say by itself.

Each function gets its arguments' comments, its errors and a link to the lesson that derives it.
"""
import ast
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from zlib import crc32

from fastcore.docments import docments

ROOT = Path(__file__).parent.parent
CELL = re.compile(r"^# %% \.\./nbs/(\S+)\.ipynb #\w+$", re.M)


def title(path):
    """The question that a notebook asks, without its markup."""
    cells = json.loads(Path(path).read_text("utf-8"))["cells"]
    first = next(c for c in cells if c["cell_type"] == "markdown")
    return "".join(first["source"]).splitlines()[0].lstrip("# ").replace("`", "")


def owners():
    """(module, name) -> stem of the notebook that defines it, in the order of the package."""
    found = {}
    for path in (ROOT / "latent_grpo").glob("[!_]*.py"):
        public = importlib.import_module(f"latent_grpo.{path.stem}").__all__
        parts = CELL.split(path.read_text("utf-8"))
        for lesson, code in zip(parts[1::2], parts[2::2]):
            for node in ast.parse(code).body:
                bound = [node] if hasattr(node, "name") else ast.walk(node)
                names = [getattr(n, "name", getattr(n, "id", None)) for n in bound]
                found |= {(path.stem, n): lesson for n in names if n in public}
    return dict(sorted(found.items(), key=lambda item: item[1]))


OWNERS = owners()
MODULES = list(dict.fromkeys(module for module, _ in OWNERS))


def lesson_link(stem, anchor=""):
    """A link, in reStructuredText, from a page of the reference to a lesson."""
    return f"`lesson {int(stem[:2])}, {title(ROOT / f'nbs/{stem}.ipynb')} <../nbs/{stem}.html{anchor}>`__"


def page(module):
    """The reference page of one module."""
    names = {n: stem for (m, n), stem in OWNERS.items() if m == module}
    objects = {n: getattr(importlib.import_module(f"latent_grpo.{module}"), n) for n in names}
    kind = lambda o: "class" if inspect.isclass(o) else "function" if callable(o) else "data"
    lines = [f"latent_grpo.{module}", "=" * 40, "", f".. automodule:: latent_grpo.{module}", "",
             "Derived in " + "; ".join(map(lesson_link, dict.fromkeys(names.values()))) + ".", ""]
    for name, o in objects.items():
        lines += [f".. auto{kind(o)}:: latent_grpo.{module}.{name}"]
        long = kind(o) == "data" and len(repr(o)) > 80
        lines += ["   :members:"] * inspect.isclass(o) + ["   :no-value:"] * long + [""]
    return "\n".join(lines)


def index():
    """The list of all modules: what each is for, and how many names it has."""
    lines = ["Reference", "=========", "", "Generated from the package: every public name, its arguments with "
             "shapes and units, its errors, and the lesson that derives it.", ""]
    for module in MODULES:
        said = importlib.import_module(f"latent_grpo.{module}").__doc__.strip().splitlines()[0]
        lines += [f":doc:`latent_grpo.{module} <{module}>`", f"   {rst(said)}", ""]
    return "\n".join([*lines, ".. toctree::", "   :hidden:", "", *(f"   {m} <{m}>" for m in MODULES), ""])


def rst(text):
    """Plain text that reStructuredText prints as it stands; names in backquotes stay code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(f"`{p}`" if p[0] == "`" else re.sub(r"([*_|@\\])", r"\\\1", p) for p in parts if p)


def tree(obj): return ast.walk(ast.parse(textwrap.dedent(inspect.getsource(obj))))


def errors(obj):
    """(exception, message) of each `raise` in the source of an object."""
    for node in tree(obj):
        call = node.exc if isinstance(node, ast.Raise) else None
        if not isinstance(call, ast.Call) or not call.args: continue
        kind = ast.unparse(call.func)
        if kind[0] == "_":      # a helper makes the exception
            call = next(n.value for n in tree(obj.__globals__[kind]) if isinstance(n, ast.Return))
            kind = ast.unparse(call.func)
        text = ast.unparse(call.args[0])
        quoted = isinstance(call.args[0], (ast.JoinedStr, ast.Constant))
        yield kind, ast.literal_eval(re.sub("^f", "", text)) if quoted else text


def enrich(app, what, name, obj, options, lines):
    """Add arguments, errors and lesson to a docstring."""
    if what == "module": lines[:] = map(rst, lines)
    if what not in ("function", "class", "method", "data"): return
    obj = inspect.unwrap(obj) if callable(obj) else obj
    if what != "data" and not (inspect.isclass(obj) or inspect.isfunction(obj)): return
    _, module, *rest = name.split(".")
    if what == "data": lines[:] = []
    else:
        lines[:] = [rst(line) for line in lines] + [""]
        if what == "class" and issubclass(obj, tuple): said = {}
        else: said = docments(obj, full=True)
        lines += [f":param {k}: {rst(v.docment)}" for k, v in said.items() if k != "return" and v.docment
                  and not v.docment.startswith("---")]      # a heading among the settings
        if "return" in said and said["return"].docment: lines += [f":returns: {rst(said['return'].docment)}"]
        lines += [f":raises {kind}: ``{text}``" for kind, text in dict.fromkeys(errors(obj))]
    if len(rest) == 1:
        stem = OWNERS[module, rest[0]]
        lines += ["", ":lesson: " + lesson_link(stem, f"#def-{rest[0]}"), ""]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", enrich)
    return {"parallel_read_safe": True, "env_version": crc32(Path(__file__).read_bytes())}    # new when this file is
