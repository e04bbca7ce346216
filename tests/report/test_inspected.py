"""The page of `inspect --report`: what headers tell, what conversions would give, what is proven and what is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds4convert as ds4
from ds4convert.converted import inspection, rounding_losses
from ds4convert.converted.open import opened, read_checkpoint
from tests.html_pages import parse
from tests.local_hub import LocalHub
from tests.local_hub.fixtures import hub  # noqa: F401
from tests.support import ROOT, copy_folder, edit_json, run, run_process
from tools.pages import checker
from tools.pages.browser import Browser, program

DEMO = ROOT / "manifests" / "demo"
NAME = "deepseek-ai/DeepSeek-V4-Flash"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "demo-q4"
    assert run("quantize", DEMO, out, "--recipe", "q4", "-q").code == 0
    return out


def words_of(page: Path) -> str:
    return " ".join(parse(page.read_text()).texts)


def written(tmp_path: Path, *words: object) -> str:
    """Return the texts of the page that `inspect` writes."""
    page = tmp_path / "page.html"
    done = run("inspect", *words, "--report", page)
    assert done.code == 0 and f"Report: {page}" in done.err, done
    return words_of(page)


# --- what is told ----------------------------------------------------------------------------------------------------


def test_a_source_is_told_with_what_every_recipe_makes_of_it(tmp_path: Path) -> None:
    words = written(tmp_path, DEMO)
    facts = run("inspect", DEMO, "--json").json
    assert "deepseek_v4 · official checkpoint" in words and "Complete: nothing missing" in words
    assert "classic" in words and f"{facts['mtp']['tensors']} tensors" in words
    for recipe in ("native", "q8", "q6", "q4", "q3", "q2", "bf16"):
        plan = ds4.plan(DEMO, recipe=recipe)
        total = sum(g["bytes"] for g in plan.as_json()["groups"])
        assert f"{recipe} {total / 1e6:.1f} MB" in re.sub(r"\s+", " ", words), recipe
    assert "nobody has measured" in words and "0.00923" in words and "94.4%" in words
    assert f"ds4convert quantize {DEMO.name} {DEMO.name}-mlx" in words and "fp4" in words
    assert str(DEMO.parent) not in words, "the folder's name alone"


def test_a_config_is_told_with_the_macs_that_hold_it(tmp_path: Path) -> None:
    words = re.sub(r"\s+", " ", written(tmp_path, "--config", "flash"))
    assert "From the config alone" in words and "159.6 GB" in words
    assert re.search(r"up to 96 GB up to 77\.3 GB no recipe - 128 GB 103\.1 GB q2 [\d,]+ 192 GB 154\.6 GB q3", words)
    assert "ds4convert quantize hf://deepseek-ai/DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx" in words
    best = run("recommend", "--mac", "128GB", "--json").json["recipes"][0]
    assert f"q2 {best['context']:,}" in words, "the longest context is that of `recommend`"


def test_tables_that_stay_on_the_disk_need_no_memory(tmp_path: Path) -> None:
    words = written(tmp_path, "--config", "flash-v41")
    assert "they need no memory" in words
    named = {r["recipe"] for r in run("recommend", "--mac", "512GB", "--model", "flash-v41", "--json").json["recipes"]}
    assert "native" in named, "510 GB, of which 203 are never held"


def test_a_converted_folder_is_told_with_its_formats_its_origin_and_what_is_proven(
    folder: Path, tmp_path: Path
) -> None:
    words = written(tmp_path, folder)
    record = inspection.inspect(folder).manifest
    assert record is not None
    for told in (
        "recipe q4", "affine-4-g64", "What rounding cost", "What is proven", "not compared here; the manifest has the "
        "sha256 of every file", "not measured, or not kept", f"ds4convert verify {folder.name} --source SOURCE",
        record.digest, record.plan, f"{len(record.files)} files and their digests",
    ):  # fmt: skip
        assert told in words, told
    assert all(f.sha256 in words for f in record.files if f.sha256)


@pytest.mark.slow
def test_what_verify_kept_is_told_and_is_not_taken_for_more(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("In the beginning God created\n")
    done = run("verify", folder, "--mtp", "--source", DEMO, "--prompts", prompts, "--max-tokens", 8, "--json")
    words = written(tmp_path, folder)
    assert done.json["mtp"]["verdict"] in words and "Checked before" in words
    assert words.count("good when it was checked before") == (2 if done.json["ok"] else 0)
    assert "not compared here" in words


def test_a_repo_is_told_with_its_commit_its_files_and_their_digests(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    hub.add_repo(NAME, DEMO)
    page = tmp_path / "page.html"
    done = run_process("inspect", f"hf://{NAME}", "--report", page, "--json", variables=hub.environment())
    assert done.code == 0, done.err
    words = words_of(page)
    assert NAME in words and "As the repo lists them." in words and f"all {len(list_of(DEMO))} files" in words
    assert f"ds4convert plan hf://{NAME}" in words and re.search(r"\b[0-9a-f]{40}\b", words)
    assert "without storing the source" in words


def test_a_conversion_on_the_hub_is_told_from_its_manifest_and_by_the_digests_that_the_hub_lists(
    hub: LocalHub,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    hub.add_repo("me/demo-q4", folder)
    altered = copy_folder(folder, tmp_path / "altered")
    shard = next(altered.glob("model-0*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    hub.add_repo("me/altered", altered)
    told = {}
    for name in ("demo-q4", "altered"):
        page = tmp_path / f"{name}.html"
        done = run_process("inspect", f"hf://me/{name}", "--report", page, variables=hub.environment())
        assert done.code == 0, done.err
        told[name] = words_of(page)
        assert (
            "recipe q4" in told[name] and "What rounding cost" in told[name] and "ds4convert pull hf://me" in told[name]
        )
    assert "yes: the repo lists, for every file of tensors, the sha256 that the manifest has" in told["demo-q4"]
    assert "no: the repo lists another sha256 than the manifest has" in told["altered"]


def test_a_manifest_of_other_files_is_not_believed(hub: LocalHub, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    assert run("quantize", DEMO, tmp_path / "native", "-q").code == 0
    mixed = copy_folder(tmp_path / "native", tmp_path / "mixed")
    (mixed / "ds4convert_manifest.json").write_bytes((folder / "ds4convert_manifest.json").read_bytes())
    hub.add_repo("me/mixed", mixed)
    page = tmp_path / "mixed.html"
    assert run_process("inspect", "hf://me/mixed", "--report", page, variables=hub.environment()).code == 0
    words = words_of(page)
    assert "no manifest of ds4convert that fits these files was found" in words and "recipe q4" not in words


def test_a_head_alone_has_no_layers_to_draw(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    assert run("quantize", DEMO, tmp_path / "out", "--layout", "vlm", "-q").code == 0
    words = written(tmp_path, tmp_path / "out" / "mtp")
    assert "Complete, as far as it goes" in words and "A line per role" not in words and "Which Mac" not in words


def list_of(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_what_is_not_whole_is_told_with_what_is_missing(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", lambda config: config.update(vocab_size=config["vocab_size"] + 8))
    found = inspection.inspect(source)
    words = written(tmp_path, source)
    assert found.problems and f"Not as config.json says: {len(found.problems):,} differences" in words
    assert str(found.problems[0]) in words


def test_recipes_that_the_sizes_do_not_allow_are_named_and_not_told(mini_source: Path, tmp_path: Path) -> None:
    refused = run("plan", mini_source, "--recipe", "q4")
    assert refused.code == 3 and "no whole groups" in refused.err
    words = written(tmp_path, mini_source)
    told = re.search(r"no whole groups of these formats: ([a-z0-9, ]+)\.", words)
    assert told is not None and "q4" in told[1].split(", ") and "native" not in told[1]


def test_tensors_alone_are_told_to_be_no_more(tmp_path: Path) -> None:
    words = written(tmp_path, next(DEMO.glob("*.safetensors")))
    assert "nothing that says what they should be" in words and "Which Mac" not in words and "unknown family" in words


# --- how it is written -----------------------------------------------------------------------------------------------


def test_the_document_is_the_same_with_and_without_a_page(folder: Path, tmp_path: Path) -> None:
    for place in (DEMO, folder):
        with_page = run("inspect", place, "--report", tmp_path / "x.html", "--json")
        assert with_page.json == run("inspect", place, "--json").json
        assert with_page.err == f"Report: {tmp_path / 'x.html'}\n"
    assert ds4.inspect(folder, report=tmp_path / "y.html").as_json() == with_page.json
    assert (tmp_path / "y.html").read_text() == (tmp_path / "x.html").read_text()


def test_nothing_but_a_page_is_replaced_and_nothing_is_read_before_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "notes.html").write_text("my notes")
    refused = run("inspect", tmp_path / "gone", "--report", tmp_path / "notes.html")
    assert refused.code == 3 and "no HTML page; it is not replaced" in refused.err
    assert (tmp_path / "notes.html").read_text() == "my notes"
    assert run("inspect", DEMO, "--report", tmp_path / "page.html", "-q").code == 0
    assert run("inspect", "--config", "tiny", "--report", tmp_path / "page.html", "-q").code == 0
    assert "tiny" in words_of(tmp_path / "page.html")
    failed = run("inspect", DEMO, "--report", tmp_path / "nowhere" / "x.html")
    assert failed.code == 4 and "could not be written" in failed.err


def test_the_page_asks_nothing_from_outside(folder: Path, tmp_path: Path) -> None:
    for n, place in enumerate((DEMO, folder)):
        assert run("inspect", place, "--report", tmp_path / f"{n}.html", "-q").code == 0
        text = (tmp_path / f"{n}.html").read_text()
        assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img|<iframe", text)


# --- facts behind it -------------------------------------------------------------------------------------------------


def test_formats_told_without_a_manifest_are_those_that_the_manifest_tells(folder: Path) -> None:
    def key(rows: tuple[rounding_losses.LayerLoss, ...]) -> list[tuple[object, ...]]:
        return sorted(
            (r.group, -1 if r.layer is None else r.layer, r.formats, round(r.bits_per_weight, 2)) for r in rows
        )

    record = inspection.inspect(folder).manifest
    model = opened(read_checkpoint(folder))
    assert record is not None and model.inventory is not None
    found = rounding_losses.of_folder(model.tensors.values())
    assert key(found) == key(record.layers()) and len(found) > 10


def test_stored_bits_of_a_source_are_its_bytes() -> None:
    found = inspection.inspect(DEMO)
    sizes = {g["name"]: g["bytes"] for g in found.groups()}
    [experts] = {r.bits_per_weight for r in found.layers() if r.group == "experts"}
    config = found.inventory.config if found.inventory else None
    assert config is not None
    weights = 3 * config.layers * config.dims["E"] * config.dims["D"] * config.dims["I"]
    assert experts == 8 * sizes["experts"] / weights == 4.25


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path / "profile") as found:
        yield found


LEFT = "document.querySelector({!r}).getBoundingClientRect().left"


@pytest.mark.slow
def test_pages_are_good_at_every_width_and_print_whole(browser: Browser, folder: Path, tmp_path: Path) -> None:
    for n, words in enumerate(((DEMO,), (folder,), ("--config", "flash-v41"))):
        page = tmp_path / f"{n}.html"
        assert run("inspect", *words, "--report", page, "-q").code == 0
        browser.show(1280)
        browser.open(page.as_uri())
        browser.scheme("light", "print")
        assert browser.value("document.querySelector('nav').checkVisibility()") is False
        hidden = "[...document.querySelectorAll('details table')].filter(t => !t.getBoundingClientRect().height).length"
        assert browser.value(hidden) == 0, "what is folded on a screen is open on paper"
        assert browser.value(LEFT.format("h1")) == browser.value(LEFT.format("main section")), "one left edge"
        assert list(browser.value(checker.FAINT)) == []
        browser.scheme("light")
        assert list(checker.faults(browser)) == []
        assert {u for u in browser.requests if not u.startswith("data:")} <= {
            (tmp_path / f"{k}.html").as_uri() for k in range(3)
        }
