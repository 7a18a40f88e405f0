"""Sphinx's settings. The pages come from build.py, which copies this folder to _proc first."""
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here.parent / "docs"))
settings = ConfigParser()
settings.read(here.parent / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

project, author, release = cfg["title"], cfg["author"], cfg["version"]
copyright = cfg["copyright"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax",
              "sphinx_copybutton", "api"]
exclude_patterns = ["images"]
default_role = "py:obj"

# notebooks: build.py has run them, so the outputs are taken as they are
nb_execution_mode = "off"
nb_render_markdown_format = "myst"             # an output of Markdown may hold a table
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
mathjax_path = "mathjax/tex-chtml-full.js"     # copied from the package sphinx-mathjax-offline
mathjax3_config = {"options": {"enableMenu": False}}
copybutton_exclude = ".linenos, .gp, .go"

autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"

html_context = {"default_mode": "auto"}
html_theme = "sphinx_book_theme"
html_title = cfg["title"]
html_static_path = ["_static"]
html_favicon = "_static/mark.svg"
html_logo = "_static/mark.svg"
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_use_index = html_domain_indices = False
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = ""
html_theme_options = {
    "repository_url": cfg["git_url"], "use_repository_button": True,
    "use_download_button": False, "use_fullscreen_button": False,
    "navbar_persistent": [], "show_toc_level": 1, "home_page_in_toc": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "logo": {"text": cfg["title"], "alt_text": ""},
    "extra_footer": f"{cfg['license'].upper()} licence, version {release}. Nothing on this page "
                    "is loaded from elsewhere.",
}
