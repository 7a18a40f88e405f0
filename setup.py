"""Packaging: every fact comes from settings.ini, the file that nbdev reads too."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

suffix = "_requirements"
extras = {key[:-len(suffix)]: cfg[key].split() for key in cfg if key.endswith(suffix)}
extras["all"] = sorted({req for name, reqs in extras.items() if name not in ("dev", "docs") for req in reqs})

lib, home = cfg["lib_name"], cfg["git_url"]
pages = f"{home}/blob/{cfg['branch']}"

# An index shows the README far from the repository: its links and pictures become absolute.
readme = (here / "README.md").read_text("utf-8")
readme = re.sub(r"\]\((?![a-z]+:|#)", f"]({pages}/", readme)
readme = re.sub(r'src="(?![a-z]+:)', f'src="{home}/raw/{cfg["branch"]}/', readme)

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    license=cfg["license"].upper(),
    project_urls={
        "Source": home,
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Changelog": f"{pages}/CHANGELOG.md",
        "Issues": f"{home}/issues",
    },
    packages=[cfg["lib_path"]],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={
        "console_scripts": [f"latent-grpo = {lib}.cli:main"],
        "nbdev": [f"{lib} = {lib}._modidx:d"],
    },
)
