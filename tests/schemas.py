"""Holds a --json document to its schema file, in `manifests/schemas` by the name of the command."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from tests.support import ROOT

FOLDER = ROOT / "manifests" / "schemas"


def closed(schema: Any) -> Any:
    """Return a schema that refuses the keys that it does not name: in the files they are allowed, for later versions."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: {n: closed(s) for n, s in v.items()} if k == "properties" else closed(v) for k, v in schema.items()}
    return {"additionalProperties": False, **made} if made.get("properties") else made


def schema_of(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def validate(name: str, document: Any) -> None:
    """Raise where a document is not as its schema says, or has a key that the schema does not tell of."""
    jsonschema.validate(document, closed(schema_of(name)), cls=jsonschema.Draft202012Validator)
