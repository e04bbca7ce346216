"""The documents of `pull` and `publish` are as their schema files say."""

from __future__ import annotations

from pathlib import Path

from tests.hub.publish.conftest import Call
from tests.schemas import validate

REPO = "me/documents"


def test_publish_and_pull_tell_what_their_schemas_say(call: Call, folder: Path, tmp_path: Path) -> None:
    planned = call("publish", folder, REPO, "--dry-run", "--json").json
    validate("publish", planned)
    assert planned["dry_run"] is True and planned["card"]
    validate("publish", call("publish", folder, REPO, "--json").json)
    validate("pull", call("pull", REPO, tmp_path / "all", "--json").json)
    validate("pull", call("pull", REPO, tmp_path / "meta", "--only", "meta", "--json").json)
    validate("pull", call("pull", REPO, tmp_path / "none", "--dry-run", "--json").json)
