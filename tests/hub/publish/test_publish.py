"""`publish` against a local Hub: what is sent, what is refused, what is gone on with, and what the card says."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from pathlib import Path

import pytest

from ds4convert.converted import verify_record
from ds4convert.converted.verify_record import HeadFigures
from tests.hub.publish.conftest import Call
from tests.hub.stopped import killed
from tests.local_hub import LocalHub
from tests.support import INDEX, ROOT, Result, assert_refused, run, tree

REPO = "me/model-mlx"


def on_hub(hub: LocalHub) -> dict[str, str]:
    """Return name -> sha256 of what the Hub has, without the file that it adds itself."""
    files = hub.files(REPO)
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items() if n != ".gitattributes"}


def here(folder: Path) -> dict[str, str]:
    return {n: digest for n, digest in tree(folder).items() if digest}


def published(result: Result) -> dict[str, object]:
    assert result.code == 0, result
    facts = dict(result.json)
    assert facts["verified"] is True and facts["repo"] == REPO and len(str(facts["revision"])) == 40
    return facts


def front_matter(text: str) -> dict[str, object]:
    """Return the fields of a card's front matter that are plain text."""
    rows = text.split("---\n")[1].splitlines()
    return {k: v.strip() for k, _, v in (r.partition(":") for r in rows if not r.startswith("-"))}


def test_a_published_folder_is_on_the_hub_byte_for_byte_and_comes_back_verified(
    hub: LocalHub, call: Call, folder: Path, tmp_path: Path
) -> None:
    facts = published(call("publish", folder, REPO, "--json"))
    assert on_hub(hub) == here(folder) and "README.md" in here(folder)
    size = sum((folder / n).stat().st_size for n in here(folder))
    assert facts["files"] == len(here(folder)) and facts["bytes"] == facts["bytes_sent"] == size
    hub.reset_counters()
    again = published(call("publish", folder, REPO, "--json"))
    assert again["bytes_sent"] == 0 and again["revision"] == facts["revision"]
    assert hub.counters()["bytes_received"] < 1000
    assert call("pull", f"hf://{REPO}", tmp_path / "back").code == 0
    assert run("verify", tmp_path / "back").code == 0
    text = call("generate", tmp_path / "back", "--prompt-ids", "1,2,3", "--mtp", "--max-tokens", "3", "--json")
    assert text.code == 0 and text.json["mtp_active"] is True


def test_the_card_tells_formats_sizes_and_how_to_load_it(call: Call, folder: Path) -> None:
    result = call("publish", folder, REPO, "--dry-run", "--json")
    assert result.code == 0 and not (folder / "README.md").exists()
    card = result.json["card"]
    fields = front_matter(card)
    assert (fields["library_name"], fields["pipeline_tag"], fields["license"]) == ("mlx", "text-generation", "mit")
    assert "\n- mtp\n" in card and "`native`" in card
    record = json.loads((folder / "ds4convert_manifest.json").read_text())
    row = next(line for line in card.splitlines() if line.startswith("| mtp.experts |"))
    count = sum(t["part"] == "mtp" and t["role"].startswith("expert") for t in record["tensors"])
    assert f"| {count} |" in row and "exact" in row and "mxfp4" in row
    layout = tomllib.loads((ROOT / "manifests" / "layouts" / "inline.toml").read_text())
    for host in layout["hosts"]:
        assert host["name"] in card and host["versions"] in card
        assert host.get("command", "").replace("DIR", "model-mlx") in card
    assert "was not measured" in card and str(folder) not in card and os.uname().nodename not in card


def test_what_verify_measured_is_in_the_card_until_the_folder_changes(call: Call, trained: Path) -> None:
    measured = call("verify", trained, "--mtp", "--max-tokens", "6", "--json")
    assert measured.code == 0, measured
    facts = measured.json["mtp"]
    card = call("publish", trained, REPO, "--dry-run", "--json").json["card"]
    assert f"{facts['acceptance']:.1%} of {facts['drafted']}" in card and facts["verdict"] in card
    assert run("quantize", ROOT / "manifests" / "demo", trained, "--drop-mtp", "--overwrite").code == 0
    card = call("publish", trained, REPO, "--dry-run", "--json").json["card"]
    assert "No head" in card and facts["verdict"] not in card and not (trained / "ds4convert_verify.json").exists()


def test_the_card_of_a_dspark_head_says_what_drafts_blocks_and_which_hosts_do_not(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "dspark-mlx"
    assert run("quantize", ROOT / "tests/golden/dspark-a/checkpoint", folder).code == 0
    card = call("publish", folder, REPO, "--dry-run", "--json").json["card"]
    assert "Kind: dspark" in card and "`--draft-depth K`" in card and "block size plus one" in card
    branch = next(line for line in card.splitlines() if line.startswith("| mlx-lm deepseek_v4 branches"))
    assert "does not run dspark heads" in branch and "settings: mtp_enabled" in card
    figures = HeadFigures("dspark", "mxfp4", 0.5, 10, 5, 2.0, 1.0, 1.0, 1.0, True, 5, verdict="The head works.",
                          block_size=5, acceptance_by_position=(0.75, 0.25))  # fmt: skip
    verify_record.write(folder, True, (), figures)
    card = call("publish", folder, REPO, "--dry-run", "--json").json["card"]
    assert "| accepted by position, of a block of 5 | 75%, 25% |" in card


def test_the_record_and_card_of_a_classic_head_have_nothing_of_blocks(call: Call, trained: Path) -> None:
    figures = HeadFigures("classic", "mxfp4", 0.5, 10, 5, 1.5, 1.0, 1.0, 1.0, True, 1, verdict="The head works.")
    verify_record.write(trained, True, (), figures)
    kept = json.loads((trained / "ds4convert_verify.json").read_text())["mtp"]
    assert not {"block_size", "acceptance_by_position"} & set(kept)
    card = call("publish", trained, REPO, "--dry-run", "--json").json["card"]
    assert "accepted by position" not in card and "DSpark" not in card and "drafts accepted" in card


@pytest.mark.nightly
def test_a_head_that_is_no_use_is_refused_and_published_by_force_saying_so(
    hub: LocalHub, call: Call, folder: Path
) -> None:
    measured = call("verify", folder, "--mtp", "--max-tokens", "8")
    assert measured.code == 1, "random weights: their head predicts nothing"
    assert_refused(call("publish", folder, REPO), "did not pass", "verify --mtp", "--force", code=3)
    assert not hub.has_repo(REPO)
    result = call("publish", folder, REPO, "--force", "--json")
    assert result.code == 0 and result.json["verified"] is False and result.json["problems"]
    assert "--force" in hub.files(REPO)["README.md"].read_text()


def test_altered_and_unfinished_folders_are_refused(hub: LocalHub, call: Call, folder: Path, tmp_path: Path) -> None:
    shard = next(folder.glob("model-0*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert_refused(call("publish", folder, REPO), shard.name, "altered", "Nothing was sent", code=3)
    (folder / "ds4convert_manifest.json").unlink()
    (folder / ".ds4convert").mkdir()
    assert_refused(call("publish", folder, REPO), "unfinished", code=3)
    assert_refused(call("publish", tmp_path / "none", REPO), "no such folder", code=3)
    assert not hub.has_repo(REPO)


def test_own_words_and_own_cards_are_kept(call: Call, hub: LocalHub, folder: Path) -> None:
    published(call("publish", folder, REPO, "--json"))
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nTalk to me about it.\n")
    published(call("publish", folder, REPO, "--json"))
    assert hub.files(REPO)["README.md"].read_text().rstrip().endswith("Talk to me about it.")
    card.write_text("# Mine\n")
    result = call("publish", folder, REPO, "--json")
    assert published(result) and "your own" in result.err
    assert hub.files(REPO)["README.md"].read_text() == "# Mine\n"


def test_strays_stay_here_and_shards_that_this_folder_replaces_go(hub: LocalHub, call: Call, folder: Path) -> None:
    (folder / "notes.txt").write_text("private")
    (folder / ".secret").write_text("private")
    (folder / ".ds4convert_undo").mkdir()
    (folder / ".ds4convert_undo" / "x.json").write_text("{}")
    published(call("publish", folder, REPO, "--json"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["old.weight"] = "model-00009-of-00009.safetensors"
    old = {"model-00009-of-00009.safetensors": b"old", INDEX: json.dumps(index).encode()}
    hub.put(REPO, old | {"notes-of-mine.md": b"stay"})
    result = call("publish", folder, REPO, "--json")
    assert published(result)["removed"] == ["model-00009-of-00009.safetensors"] and "notes.txt" in result.err
    names = set(hub.files(REPO))
    assert "notes-of-mine.md" in names and not names & {"notes.txt", ".secret", ".ds4convert_undo/x.json"}
    assert "model-00009-of-00009.safetensors" not in names


def test_a_branch_and_a_private_repo(hub: LocalHub, call: Call, folder: Path) -> None:
    published(call("publish", folder, REPO, "--private", "--json"))
    assert_refused(call("inspect", f"hf://{REPO}", HF_TOKEN=""), "token", code=4)
    (folder / "README.md").unlink()
    assert_refused(call("publish", folder, f"{REPO}@try", "--revision", "main"), "--revision another", code=2)
    hub.add_repo("me/open", folder)
    before = hub.files("me/open")
    assert_refused(call("publish", folder, "me/open", "--private"), "public", "Nothing was sent", code=3)
    assert hub.files("me/open") == before
    on_branch = published(call("publish", folder, f"{REPO}@try", "--json"))
    assert hub.files(REPO, "try") and on_branch["revision"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "faults",
    [
        [("status", "*", {"code": 503, "times": 2}), ("status", "lfs/*", {"code": 500}), ("cut_upload", "lfs/*", {"after": 1000})],
        [("expired", "lfs/*", {}), ("status", "*", {"code": 429, "on": "commit", "retry_after": 0})],
        [("status", "*", {"code": 500, "on": "tree", "skip": 1}), ("status", "*", {"code": 504, "on": "commit"})],
    ],
    ids=["busy and cut", "expired", "late"],
)  # fmt: skip
def test_faults_end_in_the_right_files_or_say_how_to_go_on(
    hub: LocalHub, call: Call, folder: Path, faults: list[tuple[str, str, dict[str, int]]]
) -> None:
    for kind, glob, more in faults:
        hub.faults.add(kind, glob, **more)  # type: ignore[arg-type]
    for _ in range(3):
        result = call("publish", folder, REPO, "--json", "-q")
        if result.code == 0:
            break
        assert_refused(result, "again", code=4)
    published(result)
    assert on_hub(hub) == here(folder)


def test_a_hub_that_never_recovers_is_an_error_of_the_environment(hub: LocalHub, call: Call, folder: Path) -> None:
    hub.faults.add("status", "*", times=-1, code=403, on="commit")
    assert_refused(call("publish", folder, REPO, "-q"), "token", code=4)
    assert_refused(call("publish", folder, REPO, HF_HUB_OFFLINE="1"), "offline mode", code=4)
    refused = call("publish", folder, REPO, HF_TOKEN="hf_wrongwrongwrong")
    assert_refused(refused, "token", code=4)
    assert "hf_wrong" not in refused.err + refused.out
    assert_refused(call("publish", folder, REPO, HF_TOKEN=""), "token", code=4)


def test_what_the_hub_has_otherwise_is_found_out(hub: LocalHub, call: Call, folder: Path) -> None:
    """A commit between ours and the comparison: the answer has to be `not verified`, by name."""
    from ds4convert.publishing import package as publication
    from ds4convert.publishing.upload import Target, compare

    published(call("publish", folder, REPO, "--json"))
    package = publication.prepare(folder, REPO, force=False, write=False)
    target = Target(REPO, endpoint=hub.url, token=hub.token)
    name = next(p.name for p in folder.glob("model-mtp*.safetensors"))
    other = hub.put(REPO, {name: b"x" * (folder / name).stat().st_size, "config.json": b"{}", "more.safetensors": b""})
    told = compare(package, target, other)
    assert [t.partition(":")[0] for t in told] == ["config.json", name, "more.safetensors"]


def test_a_killed_publish_goes_on_and_sends_nothing_twice(
    hub: LocalHub, call: Call, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert call("publish", folder, REPO, "--dry-run").code == 0
    places = [{"on": "upload", "skip": 1, "after": 100_000}, {"on": "commit"}]
    if request.config.getoption("--nightly"):
        places = [{"on": "upload", "skip": n, "after": 300_000 * n} for n in (0, 1, 1, 0)] + [{"on": "commit"}] * 3
    for place in places:
        hub.faults.add("hold", "*", **place)
        assert killed(hub, tmp_path, "publish", folder, REPO, "--jobs", "1"), place
    result = call("publish", folder, REPO, "--json", "-q")
    published(result)
    assert on_hub(hub) == here(folder)
    uploads = [r["path"] for r in hub.counters()["log"] if r["kind"] == "upload" and r["status"] == 200]
    assert len(uploads) == len(set(uploads)), "no large file that had come whole was sent again"
