"""Manifests as values, made for tests: small ones by hand, and any at all by hypothesis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from ds4convert.checkpoint.types import LeftOut
from ds4convert.converted.records import FileRecord, HeadRecord, Manifest, TensorRecord
from ds4convert.planning.types import Link, Place, RoundingError, SourceRecord, Tool

TENSOR = TensorRecord(
    name="n", file="model.safetensors", offset=80, size=5, dtype="BF16", shape=(2, 3), format="native",
    part="backbone", role="norm", layer=None, sources=("layers.0.n",), source_dtype="BF16", transform="copy",
    params={}, xxh3_128=None,
)  # fmt: skip
MANIFEST = Manifest(
    tool=Tool("ds4convert", "1"), family="deepseek_v4", head=HeadRecord("none", 0), recipe="native", formats={},
    layout="inline", plan="p", source=Place(()), tensors=(TENSOR,), files=(),
)  # fmt: skip


def manifest(*tensors: dict[str, Any], **changes: Any) -> Manifest:
    """Return a manifest with a record for each of `tensors` (the fields that are not usual)."""
    return replace(MANIFEST, tensors=tuple(replace(TENSOR, **t) for t in tensors), **changes)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = text.filter(bool)
count = st.integers(0, 2**60)
figure = st.floats(0, 1e9, allow_nan=False)
formats = st.dictionaries(text, text, max_size=3)
errors = st.builds(RoundingError, figure, figure, figure)
tools = st.builds(Tool, text, text)
sources = st.builds(SourceRecord, text, count, text, st.none() | text)
places = st.builds(Place, st.lists(sources, max_size=2).map(tuple), st.none() | text, st.none() | text)
unknown_links = st.builds(Link, text, formats)
links = st.builds(Link, text, formats, tools, text, text, places, st.dictionaries(text, errors, max_size=2))
left_out = st.lists(st.builds(LeftOut, text, text), max_size=2).map(tuple)
made = st.tuples(words, st.dictionaries(text, st.integers() | text, max_size=3)) | st.just(("", {}))


@st.composite
def tensors(draw: st.DrawFn) -> TensorRecord:
    """Return any record of a tensor; those of the first versions tell neither transform nor params."""
    transform, params = draw(made)
    return TensorRecord(
        draw(text), draw(text), draw(count), draw(count), draw(text), tuple(draw(st.lists(count, max_size=4))),
        draw(text), draw(text), draw(text), draw(st.none() | count), tuple(draw(st.lists(text, max_size=3))),
        draw(text), transform, params, draw(st.none() | text), draw(st.none() | errors),
    )  # fmt: skip


files = (
    st.builds(FileRecord, text, count, st.none() | text, text)
    | st.builds(FileRecord, text, st.none() | count, text, st.none())
)  # fmt: skip
manifests = st.builds(
    Manifest,
    tool=tools,
    family=text,
    head=st.builds(HeadRecord, text, count),
    recipe=text,
    formats=formats,
    layout=text,
    plan=text,
    source=places,
    tensors=st.lists(tensors(), max_size=2).map(tuple),
    files=st.lists(files, max_size=2).map(tuple),
    left_out=left_out,
    files_left_out=left_out,
    config_sha256=text,
    chain=st.lists(unknown_links | links, max_size=2).map(tuple),
)
