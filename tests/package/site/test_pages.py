"""Every page is in the nav, every link and anchor leads somewhere, every snippet runs, every command line parses."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest

from ds4convert.cli import Session, cli
from tests.package.site import pages
from tests.support import ROOT, run

LINK = re.compile(r"\]\(([^)\s]+)\)")
ELSEWHERE = {
    *("--draft-model", "--draft-block-size"),  # mlx-vlm
    "--speculative-config",  # Rapid-MLX
    *("--trust-remote-code",),  # mlx-lm
    *("--mtp-model", "--q-bits"),  # ds4; mlx_vlm.convert
    *("--num-cpus",),  # ray start
    *("--install-completion",),  # hf
}
"""Options of other programs, which pages name."""


def test_every_page_is_in_the_nav_and_every_entry_of_the_nav_is_a_page() -> None:
    here = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    entries = pages.navigation()
    assert len(entries) == len(set(entries))
    assert set(entries) == here | set(pages.hooks().OUTSIDE.values())
    assert all(pages.source(page).is_file() for page in entries)


def test_the_nav_names_no_page_twice_and_every_page_has_one_title() -> None:
    for page in pages.navigation():
        assert len(re.findall(r"^# ", pages.FENCE.sub("", pages.text(page)), re.MULTILINE)) == 1, page


@pytest.mark.parametrize("page", pages.navigation())
def test_links_and_anchors_lead_to_files_and_headings(page: str) -> None:
    sources = {pages.source(p): p for p in pages.navigation()}
    for link in LINK.findall(pages.prose(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (pages.source(page).parent / path).resolve() if path else pages.source(page)
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in pages.anchors(sources[target]), f"{page}: {link}: no such heading"


@pytest.mark.parametrize("page", pages.navigation())
def test_links_of_the_site_stay_within_it(page: str) -> None:
    """As `make docs` writes them: what is no page lies under docs/, so that it is copied to the site."""
    prose = pages.FENCE.sub("", pages.hooks().rewritten(pages.text(page), page))
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose)):
        if link.startswith(("http://", "https://", "mailto:", "#")):
            continue
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.partition("#")[0]))
        assert wanted in pages.navigation() or (ROOT / "docs" / wanted).is_file(), f"{page}: {link}"


def test_a_link_out_of_docs_becomes_one_to_the_page_of_that_file() -> None:
    rewritten = pages.hooks().rewritten
    assert rewritten("[a](../../benchmarks/RESULTS.md#x) [b](../cli.md)", "how-to/a.md") == (
        "[a](../measured.md#x) [b](../cli.md)"
    )
    assert rewritten("[a](docs/how-to/a.md) [b](CHANGELOG.md)", "contributing.md") == (
        "[a](how-to/a.md) [b](changelog.md)"
    )


@pytest.mark.parametrize("page", pages.written())
def test_no_page_has_a_path_of_a_machine_or_an_address_that_is_not_decided(page: str) -> None:
    assert not re.search(r"(?<![\w.:/])/(work|home|Users|root)/", pages.text(page))
    assert not re.search(r"(github|gitlab)\.com/[^/\s]+/ds4convert|ds4convert\.(io|org|dev|com)", pages.text(page))


def test_the_site_has_no_address_before_the_project_has_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = {"site_url", "repo_url", "repo_name", "edit_uri"} & set(pages.config())
    assert not told or "urls" in project


# --- what is typed ---------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """Have the real program read a command line, as far as it goes without the folders that the line names."""
    command = cli.commands[words[0]]

    def as_it_is(self: click.Path, value: Any, param: Any, ctx: Any) -> Any:  # type: ignore[type-arg]
        return Path(value)

    with mock.patch.object(click.Path, "convert", as_it_is):
        command.make_context(words[0], list(words[1:]), obj=Session())


@pytest.mark.parametrize("page", [*pages.written(), "README"])
def test_every_command_line_parses(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "README":
        monkeypatch.setattr(pages, "source", lambda _: ROOT / "README.md")
    for words in [*pages.commands(page), *pages.mentioned(page)]:
        try:
            parse(words)
        except click.exceptions.Exit as done:
            assert done.exit_code == 0, words
        except click.ClickException as e:
            pytest.fail(f"{page}: ds4convert {' '.join(words)}: {e.format_message()}")


def test_the_parser_of_this_test_refuses_what_the_program_refuses() -> None:
    for words in (["plan", "x", "--mack", "1GB"], ["plan", "x", "--mac", "much"], ["quantize", "x"], ["diff", *"abc"]):
        with pytest.raises(click.UsageError):
            parse(words)


@pytest.mark.parametrize("page", sorted(set(pages.written()) - set(pages.hooks().OUTSIDE.values())))
def test_every_option_that_a_page_names_is_one_of_the_program(page: str) -> None:
    known = {o for c in cli.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    spans = re.findall(r"`([^`\n]+)`", pages.FENCE.sub("", pages.text(page)))
    used = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert used <= known | {"--help", "--version"} | ELSEWHERE, page


def test_the_how_to_pages_show_commands() -> None:
    for page in pages.navigation():
        if page.startswith("how-to/") or page == "index.md":
            assert pages.commands(page), page


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in pages.written() if pages.blocks(p, "python")])
def test_the_python_of_a_page_runs_from_its_first_block_to_its_last(page: str, tmp_path: Path) -> None:
    (tmp_path / "DeepSeek-V4-Flash").symlink_to(ROOT / "manifests" / "demo")
    program = "\n".join(pages.blocks(page, "python"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def keys_told(command: str) -> set[str]:
    """Return the keys of a command's document that its table in docs/json.md names."""
    section = pages.text("json.md").partition(f"## `{command}`")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def test_the_documents_have_the_keys_that_the_page_on_json_tells(mini_source: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    assert run("quantize", mini_source, plain, "--drop-mtp").code == 0
    typed = {
        "inspect": ["inspect", mini_source],
        "plan": ["plan", mini_source],
        "quantize": ["quantize", mini_source, out],
        "verify": ["verify", out],
        "diff": ["diff", mini_source, out],
        "graft": ["graft", plain, "--from", mini_source, "--out", tmp_path / "grafted"],
        "relayout": ["relayout", out, tmp_path / "vlm", "--layout", "vlm"],
    }
    for command, words in typed.items():
        told = keys_told("graft` and `relayout" if command in {"graft", "relayout"} else command)
        assert len(told) > 1 and told <= set(run(*words, "--json").json), command


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("mac", [128, 192, 256])
def test_the_table_of_macs_is_what_plan_answers(mac: int) -> None:
    row = re.search(rf"^\| {mac} GB \| .*$", pages.text("how-to/choose-for-a-mac.md"), re.MULTILINE)
    fit = run("plan", "--config", "flash", "--mac", f"{mac}GB", "--context", 32768, "--json").json["fit"]
    assert row is not None
    _, _, metal, _, weights, error, _ = (cell.strip() for cell in row[0].split("|"))
    assert metal == f"{fit['target_bytes'] / 1e9:.1f} GB" and weights == f"{fit['weights_bytes'] / 1e9:.1f} GB"
    assert float(error.rstrip(" %")) == pytest.approx(100 * fit["total_error"], abs=0.001)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_table_of_recipes_is_what_plan_answers() -> None:
    text = pages.text("how-to/choose-for-a-mac.md")
    for recipe, told in re.findall(r"^\| `(\w+)` \| ([\d.]+) GB \| \d+ GB \|$", text, re.MULTILINE):
        facts = run("plan", "--config", "flash", "--recipe", recipe, "--json").json
        assert f"{facts['output_bytes'] / 1e9:.1f}" == told, recipe


def test_the_figures_of_the_demo_are_those_that_were_measured() -> None:
    """Each row of the table of quality stands in benchmarks/RESULTS.md, with the rounding that is the default."""
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) % \|$",
                      pages.text("how-to/choose-for-a-mac.md"), re.MULTILINE)  # fmt: skip
    assert len(rows) == 6
    for recipe, kl, same, accepted in rows:
        name = recipe if recipe == "native" else f"recipe {recipe}"
        assert re.search(
            rf"^\| {name} \| optimal \| [\d.]+ \| {kl} \| {same}% \| {accepted}% \|", measured, re.MULTILINE
        )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "measured.html").is_file()
