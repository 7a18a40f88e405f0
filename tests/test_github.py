"""What the repository says to GitHub: pinned actions, few rights, commands and forms that exist."""
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PIN = re.compile(r"uses: (\S+)@([0-9a-f]{40}) # v(\d+\.\d+\.\d+)$")


def test_every_action_has_one_pin_and_says_its_version():
    lines = [line.strip(" -") for path in WORKFLOWS for line in path.read_text("utf-8").splitlines()]
    used = [line for line in lines if line.startswith("uses:") and "./" not in line]
    pins = {PIN.fullmatch(line).groups() for line in used}
    assert len(used) > 8 and len({action for action, *_ in pins}) == len(pins)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_has_few_rights_and_a_limit(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        rights = {(k, v) for k, v in job["permissions"].items() if v == "write"}
        assert rights == {("docs", "deploy"): {("pages", "write"), ("id-token", "write")},
                          ("release", "publish"): {("id-token", "write")}}.get((path.stem, name), set())
        assert "uses" in job or job["timeout-minutes"] <= 120
        for step in job.get("steps", []):
            checkout = step.get("uses", "").startswith("actions/checkout@")
            assert not checkout or step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", "")       # nothing from outside becomes a command


def test_what_is_run_exists():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    texts = [path.read_text("utf-8") for path in (*WORKFLOWS, ROOT / "CONTRIBUTING.md")]
    targets = {t for text in texts for t in re.findall(r"(?:run: |^|`)make ([a-z-]+)", text, re.M)}
    assert targets >= {"docs", "test-fast", "check"}
    assert not [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]      # fetches nothing
    for hook in hooks[0]["hooks"]: assert hook["entry"].split()[0] in makefile.replace(
        "$(BIN)", ".venv/bin")


@pytest.mark.parametrize("name", ["bug", "page", "result"])
def test_a_form_asks_for_something(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text("utf-8"))
    assert form["name"] and form["description"]
    required = [x for x in form["body"] if x.get("validations", {}).get("required")]
    assert required and len({x["id"] for x in form["body"]}) == len(form["body"])
