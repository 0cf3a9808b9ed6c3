"""Workflows run make targets; workflows, hooks and releases have the versions of the project."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import ddf_mm

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# Commands that only GitHub needs: packages of the container, and the release.
NOT_MADE = ("apt-get ", "gh release ")


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> dict[str, dict]:
    return load(path)["jobs"]


def commands(job: dict) -> list[str]:
    """The commands of a job, with each value of its matrix."""
    lines = "\n".join(step.get("run", "") for step in job["steps"]).splitlines()
    for name, values in job.get("strategy", {}).get("matrix", {}).items():
        lines = [line.replace(f"${{{{ matrix.{name} }}}}", v) for line in lines for v in values]
    return sorted(set(filter(None, lines)))


COMMANDS = [
    pytest.param(command, id=f"{path.stem}-{name}-{i}")
    for path in WORKFLOWS
    for name, job in jobs(path).items()
    for i, command in enumerate(commands(job))
    if not command.startswith(NOT_MADE)
]


def test_workflows_cover_what_they_should():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "release", "test"]
    made = {word for c in COMMANDS for word in shlex.split(c.values[0])[1:] if "=" not in word}
    torches = {f"test-{torch}-torch" for torch in ("floor", "oldest", "newest")}
    made_here = {
        "demo",
        "test",
        "test-fast",
        "compare-nvrtc",
        "lint",
        "docs",
        "check-tag",
        "sdist",
        "wheel",
    }
    assert made == torches | made_here


@pytest.mark.parametrize("command", COMMANDS)
def test_workflows_run_make_targets(command, tmp_path):
    program, *arguments = shlex.split(command)
    assert program == "make"
    dry_run = ["make", "-n", f"VENV={tmp_path}", *arguments]
    subprocess.run(dry_run, cwd=ROOT, check=True, capture_output=True)


def test_python_versions_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    supported = re.findall(r"Python :: (3\.\d+)", text)
    matrix = jobs(ROOT / ".github" / "workflows" / "test.yml")["python"]["strategy"]["matrix"]
    assert matrix["python"] == supported == ["3.10", "3.11", "3.12", "3.13"]


def test_the_wheel_is_built_by_the_python_of_the_full_suite():
    """With an older one, the tools that check the wheel do not install."""
    workflows = ROOT / ".github" / "workflows"
    full = jobs(workflows / "test.yml")["all"]["steps"][1]["with"]["python-version"]
    tag = f"cp{full.replace('.', '')}"
    build = commands(jobs(workflows / "release.yml")["build"])
    assert f"make sdist wheel PYTHON=/opt/python/{tag}-{tag}/bin/python" in build


def test_hooks_are_those_of_make_lint():
    hooks = [h for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for h in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)[1]
    in_make = re.findall(r'"\$\(VENV\)/bin/([\w-]+)"(?: (check|format) )?', recipe)
    entries = [hook["entry"].split() for hook in hooks]
    in_hooks = [(e[0], e[1] if e[1:] and e[0] == "ruff" else "") for e in entries]
    assert in_hooks == in_make
    pins = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8").splitlines()
    for hook in hooks:
        (pin,) = hook["additional_dependencies"]
        assert pin in pins


def test_version_is_the_same_everywhere():
    version = ddf_mm.__version__
    assert load(ROOT / "CITATION.cff")["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changelog, re.M)
    assert releases[0] == version
    for tag, succeeds in ((f"v{version}", True), (version, False), ("", False)):
        check = subprocess.run(["make", "check-tag", f"TAG={tag}"], cwd=ROOT, capture_output=True)
        assert (check.returncode == 0) == succeeds


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_needs(form):
    content = load(form)
    assert content["name"] and content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids) > 1
    for field in content["body"]:
        assert field["type"] in ("textarea", "input") and field["attributes"]["label"]


def test_bug_reports_ask_for_the_machine():
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8")
    assert "backend_info()" in text and "torch.utils.collect_env" in text
