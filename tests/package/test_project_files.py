"""The files around the code agree with it: workflows run targets that exist, versions are one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).parents[2]
WORKFLOWS = sorted((TOP / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((TOP / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (TOP / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_every_make_line_of_a_workflow_is_a_target(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = {word for line in lines for word in re.findall(r"^make (\w+)$", line, re.MULTILINE)}
    assert made and made <= targets()


def test_the_makefile_tests_as_the_readme_does() -> None:
    readme = (TOP / "README.md").read_text()
    assert "\t$(BIN)/pytest -n 2\n" in (TOP / "Makefile").read_text()
    assert ".venv/bin/pytest -n 2\n" in readme and ".venv/bin/pip install -q -e '.[test]'" in readme


def test_every_phony_target_is_there_and_told() -> None:
    text = (TOP / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert phony <= targets()
    assert phony <= set(re.findall(r"^([a-z]+):.*## ", text, re.MULTILINE))


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.name)
def test_an_issue_form_has_what_a_form_needs(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in form["body"])


def test_the_citation_names_the_version_of_the_project() -> None:
    version = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((TOP / "CITATION.cff").read_text())["version"] == version


def test_the_hooks_run_what_ci_runs() -> None:
    hooks = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (TOP / ".ci" / "run").read_text()
    for hook in hooks:
        assert hook["entry"].removesuffix(" --fix") in ci.replace("ruff format --check", "ruff format")
