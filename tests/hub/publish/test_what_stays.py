"""What `publish` leaves on the Hub: weights that nobody named as its own, words that people wrote, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ds4convert.checkpoint.types import LeftOut
from ds4convert.converted.records import HeadRecord
from ds4convert.converted.verify_record import HeadFigures, VerifyRecord
from ds4convert.errors import OutputError
from ds4convert.planning.layouts import layout_of, layouts
from ds4convert.planning.types import Place, Tool
from ds4convert.publishing import model_card
from ds4convert.publishing.published_card import MARK, check_own, joined, split, text_of
from ds4convert.storage import strict_json
from tests.converted.manifests import manifest
from tests.hub.publish.conftest import Call
from tests.local_hub import LocalHub
from tests.support import assert_refused

REPO = "me/model-mlx"
OTHERS = {"8bit/model.safetensors": b"8", "adapters/adapter.safetensors": b"a", "model-of-mine.safetensors": b"m"}


def test_weights_that_the_hub_does_not_name_as_ours_stay_unless_they_are_to_go(
    hub: LocalHub, call: Call, folder: Path
) -> None:
    assert call("publish", folder, REPO, "-q").code == 0
    hub.put(REPO, OTHERS | {"notes.md": b"mine"})
    told = call("publish", folder, REPO, "--dry-run").out
    for name in OTHERS:
        assert f"would be kept       {name} (not of this folder; --delete-others removes it)" in told
    assert set(OTHERS) <= set(hub.files(REPO))
    result = call("publish", folder, REPO, "--json")
    assert result.code == 0 and result.json["verified"] and result.json["removed"] == []
    assert result.json["others"] == sorted(OTHERS) and "model-of-mine.safetensors" in result.err
    assert set(OTHERS) <= set(hub.files(REPO))
    planned = call("publish", folder, REPO, "--dry-run", "--delete-others", "--json").json
    assert planned["removed"] == sorted(OTHERS) and planned["others"] == []
    gone = call("publish", folder, REPO, "--delete-others", "--json")
    assert gone.code == 0 and gone.json["removed"] == sorted(OTHERS)
    assert not set(OTHERS) & set(hub.files(REPO)) and "notes.md" in hub.files(REPO)


def test_a_dry_run_lists_every_file_and_changes_nothing(hub: LocalHub, call: Call, folder: Path) -> None:
    first = call("publish", folder, REPO, "--dry-run", "--json").json
    assert not hub.has_repo(REPO) and first["replaced"] == first["removed"] == first["kept"] == []
    assert len(first["added"]) == first["files"] and "README.md" in first["added"]
    published = call("publish", folder, REPO, "--json").json
    assert published["added"] == first["added"]
    table = json.loads((folder / "ds4convert_manifest.json").read_text())
    gone = next(f["name"] for f in table["files"] if f["name"].startswith("model-0"))
    table["files"].append({"name": "model-old.safetensors"})
    hub.put(REPO, {"ds4convert_manifest.json": json.dumps(table).encode(), "model-old.safetensors": b"o", gone: b"x"})
    before = hub.files(REPO)
    found = call("publish", folder, REPO, "--dry-run", "--json").json
    assert found["replaced"] == ["ds4convert_manifest.json", gone] and found["added"] == []
    assert found["removed"] == ["model-old.safetensors"]
    names = set(found["replaced"]) | set(found["removed"]) | set(found["kept"])
    assert names == set(before) and hub.files(REPO) == before


def test_what_stands_below_the_card_on_the_hub_is_kept_and_an_edited_card_stops(
    hub: LocalHub, call: Call, folder: Path
) -> None:
    assert call("publish", folder, REPO, "-q").code == 0
    text = hub.files(REPO)["README.md"].read_text()
    hub.put(REPO, {"README.md": f"{text}\nThanks to all who tried it.\n".encode()})
    assert call("publish", folder, REPO, "-q").code == 0
    kept = hub.files(REPO)["README.md"].read_text()
    assert kept.rstrip().endswith("Thanks to all who tried it.") and (folder / "README.md").read_text() == kept
    edited = kept.replace("An MLX conversion", "A fine MLX conversion")
    hub.put(REPO, {"README.md": edited.encode()})
    before = (folder / "README.md").read_text()
    for words in ((), ("--dry-run",)):
        assert_refused(call("publish", folder, REPO, *words), "README.md", "edited", "--replace-card", code=3)
    assert hub.files(REPO)["README.md"].read_text() == edited and (folder / "README.md").read_text() == before
    assert call("publish", folder, REPO, "--replace-card", "-q").code == 0
    assert hub.files(REPO)["README.md"].read_text() == kept


def test_a_card_of_somebody_else_is_not_replaced_unseen(hub: LocalHub, call: Call, folder: Path) -> None:
    assert call("publish", folder, REPO, "-q").code == 0
    hub.put(REPO, {"README.md": b"# Written on the Hub\n"})
    assert_refused(call("publish", folder, REPO), "--replace-card", code=3)
    (folder / "README.md").write_text("# Mine\n")
    assert_refused(call("publish", folder, REPO), "--replace-card", code=3)
    assert call("publish", folder, REPO, "--replace-card", "-q").code == 0
    (folder / "README.md").write_text("# Mine, second\n")
    assert call("publish", folder, REPO, "-q").code == 0, "the one there was sent from here"


def test_cards_are_joined_so_that_no_words_are_lost() -> None:
    first = text_of("Above", "Ours")
    assert joined("New", first, first) == text_of("New", "Ours")
    theirs = first.replace("Ours", "Ours, and more")
    assert split(joined("New", first, theirs)).below == "Ours, and more"  # type: ignore[union-attr]
    mine = first.replace("Ours", "Mine now")
    assert split(joined("New", mine, first)).below == "Mine now"  # type: ignore[union-attr]
    both = split(joined("New", mine, theirs)).below  # type: ignore[union-attr]
    assert "Mine now" in both and "Ours, and more" in both
    assert split(joined("New", "", theirs.replace("\n", "\r\n"))).below == "Ours, and more"  # type: ignore[union-attr]
    with pytest.raises(OutputError, match="below its last line"):
        check_own("# Own", theirs)
    old = f"Above\n\n{MARK}\n\nwords\n"  # as published before cards were signed
    assert split(joined("Above", "", old)).below == "words"  # type: ignore[union-attr]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 7847602\n"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("tokenizer.json", POINTER, "LFS pointer"),
        ("tokenizer_config.json", b"", "empty"),
        ("generation_config.json", b"<!DOCTYPE html><html>", "web page"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"vocab": {"a"', "not whole JSON"),
    ],
)
def test_a_small_file_that_is_not_what_it_should_be_is_refused_by_name(
    hub: LocalHub, call: Call, folder: Path, name: str, raw: bytes, words: str
) -> None:
    """The manifest knows these bytes: they were carried over so, and the digest is no help."""
    import hashlib

    (folder / name).write_bytes(raw)
    path = folder / "ds4convert_manifest.json"
    table = json.loads(path.read_text())
    table["files"] = [f for f in table["files"] if f["name"] != name]
    table["files"].append({"name": name, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)})
    table["files"].sort(key=lambda f: f["name"])
    del table["digest"]
    path.write_bytes(strict_json.pretty(table | {"digest": strict_json.digest(table)}))
    assert_refused(call("publish", folder, REPO), name, words, "Nothing was sent", code=3)
    assert not hub.has_repo(REPO)


EVIL = 'x\n---\nlicense: evil\n# Title\n<script>alert(1)</script> [a](http://b) \x1b[2J`code` "q": \u202e'


def hostile(with_head: bool) -> model_card.Facts:
    row = {"part": "mtp" if with_head else "backbone", "role": EVIL, "format": EVIL}
    record = manifest(
        row, family=EVIL, recipe=EVIL, tool=Tool(EVIL, EVIL), head=HeadRecord(EVIL, 1), formats={EVIL: EVIL},
        left_out=(LeftOut(f"mtp.{EVIL}", EVIL),), source=Place((), EVIL, EVIL),
    )  # fmt: skip
    figures = HeadFigures("classic", EVIL, 0.5, 2, 1, 1.5, 3.0, 4.0, 1.3, True, 1, verdict=EVIL)
    measured = VerifyRecord(Tool(EVIL, EVIL), "", EVIL, True, (EVIL,), figures)
    return model_card.Facts("me/x", record, layout_of("inline"), ("files",), (EVIL,), measured, {"license": "mit"}, 9)


@pytest.mark.parametrize("with_head", [True, False])
def test_no_field_of_a_manifest_becomes_markup_or_front_matter(with_head: bool) -> None:
    text = model_card.write(hostile(with_head))
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["license"] == "mit" and set(matter["tags"]) <= {"mlx", "mtp", "speculative-decoding", "ds4convert"}
    assert "base_model" not in matter
    body = text.split("---\n", 2)[2].partition(MARK)[0]
    assert "\x1b" not in text and "\u202e" not in text and "\n# Title" not in text and "\nlicense" not in body
    assert "<script" not in body and "&lt;script&gt;" in body
    outside = "".join(part for at, part in enumerate(body.split("`")) if at % 2 == 0)
    assert "](http://b" not in outside.replace("\\](", "")


@pytest.mark.parametrize("name", sorted(n for n, y in layouts().items() if not y.named_only))
def test_a_folder_without_a_head_gets_no_command_for_one_and_stock_mlx_lm_no_option(name: str) -> None:
    facts = model_card.Facts("me/x", manifest({}, layout=name), layout_of(name), (), (), None, {}, 9)
    shell = model_card.write(facts).split("```sh\n")[1].split("```")[0]
    assert "--mtp" not in shell and "--draft-model" not in shell and "mtp/" not in shell
    record = manifest({}, {"part": "mtp"}, layout=name)
    with_head = model_card.write(replace(facts, record=record)).split("```sh\n")[1].split("```")[0]
    assert not [line for line in with_head.splitlines() if line.startswith("mlx_lm.") and "--mtp" in line]
    assert "ds4convert generate x --prompt Hello --mtp" in with_head
