"""safetensors headers and index files: round trips, agreement with the safetensors library, and every refusal."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from ds4convert.checkpoint import headers
from ds4convert.checkpoint.folder import header_at, read_header
from ds4convert.errors import HeaderError, InputError
from ds4convert.planning.shards import Draft, place, split
from ds4convert.storage import strict_json
from ds4convert.storage.local_files import LocalFiles
from ds4convert.words.terminal import show
from tests.support import frame

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=30).filter(
    lambda n: n != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
DTYPES = st.sampled_from(sorted(headers.DTYPE_BYTES))
ENTRIES = st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=8)
METADATA = st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3)


def sized(entries: dict[str, tuple[str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(n, d, s, math.prod(s) * headers.DTYPE_BYTES[d]) for n, (d, s) in entries.items()]


@given(ENTRIES, METADATA)
def test_a_built_header_parses_to_the_same_tensors(
    entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    listed = sized(entries)
    built = headers.build_header(listed, metadata)
    size = len(built) + sum(e[3] for e in listed)
    length = headers.header_length(built[:8], size, "f")
    parsed = headers.parse_header(built[8:], size, "f", 3)
    assert len(built) == 8 + length == parsed.data_start and len(built) % 8 == 0
    assert dict(parsed.metadata) == metadata
    assert {(t.name, t.dtype, t.shape, t.size) for t in parsed.tensors} == set(listed)
    assert all(t.file == 3 for t in parsed.tensors)
    at = parsed.data_start
    for t in parsed.tensors:
        assert t.start == at
        at += t.size
    assert at == size


NUMPY = {
    "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2",
    "I32": "i4", "U32": "u4", "F32": "f4", "I64": "i8", "F64": "f8",
}  # fmt: skip
ARRAYS = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=9),
    st.tuples(st.sampled_from(sorted(NUMPY)), SHAPES, st.integers(0, 2**31)),
    min_size=1,
    max_size=6,
)


def arrays(table: dict[str, tuple[str, tuple[int, ...], int]]) -> dict[str, np.ndarray]:
    out = {}
    for name, (dtype, shape, seed) in table.items():
        kind = np.dtype(NUMPY[dtype])
        raw = np.random.default_rng(seed).bytes(math.prod(shape) * kind.itemsize)
        out[name] = np.frombuffer(raw, kind).reshape(shape)
    return out


@given(ARRAYS)
@settings(max_examples=60)
def test_the_safetensors_library_reads_what_we_write(table: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    values = arrays(table)
    kinds = {np.dtype(v).str: k for k, v in NUMPY.items()}
    drafts = [Draft(n, kinds[a.dtype.str], a.shape, a.nbytes) for n, a in values.items()]
    placed = place(drafts)
    file = bytearray(placed.size)
    file[: len(placed.header)] = placed.header
    for number, offset in placed.offsets:
        draft = drafts[number]
        assert offset % headers.DTYPE_BYTES[draft.dtype] == 0, "a tensor is not aligned to its dtype"
        file[offset : offset + draft.size] = values[draft.name].tobytes()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(file)
        with safe_open(path, framework="np") as f:
            assert set(f.keys()) == set(values) and f.metadata() == {"format": "mlx"}
            for name, array in values.items():
                assert f.get_tensor(name).tobytes() == array.tobytes()
                assert f.get_tensor(name).shape == array.shape


@given(ARRAYS)
@settings(max_examples=60)
def test_we_read_what_the_safetensors_library_writes(table: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    values = arrays(table)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(values, path, metadata={"format": "pt"})
        _, header = header_at(path)
        raw = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert {t.name: t.shape for t in header.tensors} == {n: a.shape for n, a in values.items()}
    for t in header.tensors:
        assert raw[t.start : t.start + t.size] == values[t.name].tobytes()


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 150))
def test_splitting_loses_nothing_keeps_order_and_makes_no_empty_shard(sizes: list[int], limit: int) -> None:
    groups = split(sizes, limit)
    assert [i for g in groups for i in g] == list(range(len(sizes)))
    assert all(groups)
    assert all(sum(sizes[i] for i in g) <= limit or len(g) == 1 for g in groups)


# --- refusals: each message names file and tensor ---


def entry(dtype: Any = "I8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets}


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        header_at(path)
    text = str(caught.value)
    assert text.startswith("m.safetensors") and "\n" not in text and len(text) < 600, text
    return text


DATA = bytes(4)
BAD_FILES = {
    "empty": (b"", "0 bytes is too short"),
    "seven bytes": (bytes(7), "7 bytes is too short"),
    "length zero": (bytes(8) + b"{}", "header length is 0"),
    "length larger than the file": ((1000).to_bytes(8, "little") + b"{}", "reaches past the end of the file"),
    "length larger than 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "over the limit of 100000000"),
    "length of all ones": (b"\xff" * 8 + b"{}", "over the limit"),
    "truncated header": (frame({"a": entry()}, DATA)[:40], "truncated, download it again"),
    "invalid UTF-8": (frame(b'{"\xff\xfe":1}'), "not valid UTF-8 at byte 2"),
    "overlong UTF-8": (frame(b'{"\xc0\xaf":1}'), "not valid UTF-8"),
    "UTF-8 surrogate": (frame(b'{"\xed\xa0\x80":1}'), "not valid UTF-8"),
    "byte order mark": (frame(b'\xef\xbb\xbf{"a":1}'), "not JSON text"),
    "leading space": (frame(b' {"a":1}'), "not JSON text"),
    "a list": (frame(b"[]"), "not JSON text"),
    "no JSON": (frame(b"{hello}"), "not valid JSON"),
    "JSON cut off": (frame(b'{"a":{"dtype":"I8"'), "not valid JSON"),
    "JSON with a tail": (frame(b"{}x"), "not valid JSON"),
    "NUL bytes": (frame(b"{" + bytes(50)), "not JSON text"),
    "NaN": (frame(b'{"a":NaN}'), "NaN is not JSON"),
    "infinite number": (frame(b'{"a":1e999}'), "the number 1e999 is too large"),
    "nested deeply": (frame(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "number of 5000 digits": (frame(b'{"a":' + b"9" * 5000 + b"}"), "not acceptable JSON"),
    "half a surrogate pair": (frame(b'{"__metadata__":{"a":"\\ud800"}}'), "half of a surrogate pair"),
    "metadata no table": (frame({"__metadata__": [1]}), "__metadata__ must map text to text"),
    "metadata of numbers": (frame({"__metadata__": {"a": 1}}), "__metadata__ must map text to text"),
    "metadata empty list": (frame({"__metadata__": []}), "__metadata__ must map text to text"),
    "bytes at the end": (frame({"a": entry()}, DATA + b"x"), "1 bytes at the end belong to no tensor"),
    "nothing but data": (frame({}, DATA), "4 bytes at the end belong to no tensor"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    assert message in refusal(tmp_path, content)


BAD_ENTRIES = {
    "unknown dtype": (entry("F7"), "unknown dtype 'F7'"),
    "dtype in lower case": (entry("i8"), "unknown dtype 'i8'"),
    "dtype a number": (entry(8), "unknown dtype '8'"),
    "dtype a list": (entry(["I8"]), "unknown dtype"),
    "dtype missing": ({"shape": [4], "data_offsets": [0, 4]}, "an entry has exactly dtype, shape and data_offsets"),
    "a key too many": (entry() | {"x": 1}, "an entry has exactly"),
    "not a table": (3, "an entry has exactly"),
    "null": (None, "an entry has exactly"),
    "negative dimension": (entry(shape=[-4]), "must be whole numbers from 0"),
    "two negative dimensions": (entry(shape=[-2, -2]), "must be whole numbers from 0"),
    "huge dimension": (entry(shape=[2**49]), "must be whole numbers from 0"),
    "dimensions whose product overflows 64 bits": (entry(shape=[2**32, 2**32]), "takes 18446744073709551616 bytes"),
    "many dimensions": (entry(shape=[2**48] * 300_000), "300000 dimensions, expected at most 16"),
    "float dimension": (entry(shape=[4.0]), "must be whole numbers from 0"),
    "bool dimension": (entry(shape=[True, 4]), "must be whole numbers from 0"),
    "text dimension": (entry(shape=["4"]), "must be whole numbers from 0"),
    "nested dimension": (entry(shape=[[4]]), "must be whole numbers from 0"),
    "shape a number": (entry(shape=4), "must be whole numbers from 0"),
    "shape null": (entry(shape=None), "must be whole numbers from 0"),
    "one offset": (entry(offsets=[0]), "must be two whole numbers"),
    "three offsets": (entry(offsets=[0, 2, 4]), "must be two whole numbers"),
    "float offsets": (entry(offsets=[0, 4.0]), "must be two whole numbers"),
    "bool offsets": (entry(offsets=[False, 4]), "must be two whole numbers"),
    "negative offset": (entry(offsets=[-4, 0]), "must be two whole numbers from 0"),
    "offset beyond 64 bits": (entry(offsets=[10**4000, 10**4000 + 4]), "must be two whole numbers from 0"),
    "offsets backwards": (entry(offsets=[4, 0]), "span -4"),
    "too few bytes": (entry(shape=[5]), "takes 5 bytes, but data_offsets 0..4 span 4"),
    "too many bytes": (entry(shape=[3]), "takes 3 bytes, but data_offsets 0..4 span 4"),
    "size of the wrong dtype": (entry("F32"), "takes 16 bytes, but data_offsets 0..4 span 4"),
    "past the end": (entry(shape=[9], offsets=[0, 9]), "ends at data byte 9, but the file holds only 4"),
    "a gap in front": (entry(shape=[2], offsets=[2, 4]), "starts at data byte 2, expected 0; it leaves a gap"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_refused_by_file_and_tensor(case: str, tmp_path: Path) -> None:
    value, message = BAD_ENTRIES[case]
    text = refusal(tmp_path, frame({"layers.0.w": value}, DATA))
    assert message in text and "layers.0.w" in text, text


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, frame({"a": entry(), "b": entry(shape=[2], offsets=[2, 4])}, DATA))
    assert text == "m.safetensors: b: starts at data byte 2, expected 4; it overlaps the tensor before it"


def test_two_tensors_over_the_same_bytes_are_refused(tmp_path: Path) -> None:
    assert "overlaps the tensor before it" in refusal(tmp_path, frame({"a": entry(), "b": entry()}, DATA))


def test_a_gap_between_tensors_is_refused(tmp_path: Path) -> None:
    text = refusal(
        tmp_path, frame({"a": entry(shape=[1], offsets=[0, 1]), "b": entry(shape=[2], offsets=[2, 4])}, DATA)
    )
    assert text == "m.safetensors: b: starts at data byte 2, expected 1; it leaves a gap before it"


def test_a_truncated_shard_names_the_tensor_that_is_cut(tmp_path: Path) -> None:
    whole = frame({"a": entry(), "b": entry(offsets=[4, 8])}, bytes(8))
    assert "b: ends at data byte 8, but the file holds only 7; the file is truncated" in refusal(tmp_path, whole[:-1])


def test_an_empty_name_and_a_name_of_control_characters_are_refused(tmp_path: Path) -> None:
    for name in ("", "a\nb", "a\x1b[31m", "a\u202eb", "\ud83d"):
        text = refusal(tmp_path, frame({name: entry()}, DATA))
        assert text.isprintable()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"I8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"x":"1","x":"2"},"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        b'{"a":1,"\\u0061":2}',
    ],
)
def test_duplicate_keys_on_any_level_are_refused(raw: bytes, tmp_path: Path) -> None:
    assert "occurs twice; a reader could take either" in refusal(tmp_path, frame(raw, DATA))


def test_a_long_tensor_name_is_shortened_in_the_message(tmp_path: Path) -> None:
    text = refusal(tmp_path, frame({"x" * 100_000: 1}, DATA))
    assert "xxx...xxx" in text


def test_a_file_that_shrinks_while_its_header_is_read_is_refused(tmp_path: Path) -> None:
    class Shrinking(LocalFiles):
        def size(self, name: str) -> int:
            found = super().size(name)
            os.truncate(tmp_path / name, found - 1)
            return found

    (tmp_path / "m.safetensors").write_bytes((10).to_bytes(8, "little") + b'{"a": 123}')
    with pytest.raises(HeaderError, match=r"m\.safetensors: ends before byte 18; the file is being changed"):
        read_header(Shrinking.of(tmp_path, ["m.safetensors"]), "m.safetensors")


# --- the bound on memory ---


@pytest.mark.slow
def test_the_header_of_pro_in_a_single_file_is_within_the_bounds() -> None:
    from ds4convert.checkpoint.config import named_config, parse_config
    from ds4convert.checkpoint.inventory import expected

    specs = list(expected(parse_config(named_config("pro") or b"")).tensors())
    entries = [(s.name, s.dtypes[0], s.shape, math.prod(s.shape) * headers.DTYPE_BYTES[s.dtypes[0]]) for s in specs]
    built = headers.build_header(entries, {"format": "pt"})
    parsed = headers.parse_header(built[8:], len(built) + sum(e[3] for e in entries), "f")
    assert len(parsed.tensors) == len(specs) > 140_000


@pytest.mark.parametrize(
    "raw",
    [
        b'{"' + b"a" * 85_000_000 + b'":1}',
        b"{" + b",".join(b'"%d":0' % i for i in range(1_100_000)) + b"}",
        b'{"a":' + b"[" * 2_000_000 + b",,,,," * 1_000_000,
    ],
    ids=["one string", "a million keys", "commas"],
)
def test_json_that_would_take_more_memory_than_any_known_model_is_refused_unparsed(raw: bytes) -> None:
    with pytest.raises(InputError, match="is more than any known model needs"):
        strict_json.loads(raw, "x")


def test_a_large_document_with_wide_characters_is_refused_unparsed() -> None:
    raw = b'{"a":"' + b"x" * 16_000_000 + "\U0001f600".encode() + b'"}'
    with pytest.raises(InputError, match="only ASCII is accepted"):
        strict_json.loads(raw, "x")


# --- index ---


def index(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty; download it again"),
        (b"[]", "has no weight_map"),
        (b"3", "has no weight_map"),
        (index({}), "has no weight_map"),
        (index({"weight_map": {}}), "has no weight_map"),
        (index({"weight_map": ["a"]}), "has no weight_map"),
        (index({"weight_map": {"a": 3}}), "a: weight_map gives 3, expected a file name"),
        (
            index({"weight_map": {"a": ["m.safetensors"]}}),
            "a: weight_map gives ['m.safetensors'], expected a file name",
        ),
        (index({"weight_map": {"a": {}}}), "a: weight_map gives {}, expected a file name"),
        (index({"weight_map": {"a": None}}), "a: weight_map gives None, expected a file name"),
        (b'{"weight_map":{"a":"m.safetensors","a":"n.safetensors"}}', "occurs twice"),
        (b'{"weight_map":{},"weight_map":{"a":"m.safetensors"}}', "occurs twice"),
    ],
)
def test_a_bad_index_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(HeaderError) as caught:
        headers.parse_index(raw, "index.json")
    assert message in str(caught.value) and str(caught.value).startswith("index.json: ")


BAD_NAMES = [
    "../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "a/../x.safetensors", "./x.safetensors", "", ".", "..",
    "x.safetensors/", "x.safetensors/.", "//x.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "x.bin",
    "config.json", "x\0.safetensors", "x\n.safetensors", "\ud800.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_index_may_not_name_anything_but_a_safetensors_file_of_its_folder(name: str) -> None:
    with pytest.raises(HeaderError) as caught:
        headers.parse_index(index({"weight_map": {"a": name}}), "index.json")
    assert "index.json" in str(caught.value) and str(caught.value).isprintable()


def test_a_good_index_gives_its_weight_map() -> None:
    weight_map = {"a": "m.safetensors", "b": "model-00001-of-00002.safetensors"}
    assert headers.parse_index(index({"metadata": {}, "weight_map": weight_map}), "i") == weight_map


# --- strict JSON ---

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_strict_json_reads_every_document_that_is_unambiguous(value: Any) -> None:
    assert strict_json.loads(json.dumps(value).encode(), "x") == value
    assert strict_json.loads(strict_json.dumps(value), "x") == value
    assert strict_json.loads(strict_json.pretty(value), "x") == value


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_an_input_error(raw: bytes) -> None:
    try:
        strict_json.loads(raw, "x")
    except InputError as e:
        assert str(e).startswith("x: ")


@given(st.binary(max_size=80))
def test_any_bytes_as_a_header_give_a_header_or_a_header_error(raw: bytes) -> None:
    try:
        headers.parse_header(raw, 8 + len(raw), "f")
    except HeaderError as e:
        assert str(e).startswith("f")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_json_does_not_have_are_refused(literal: str) -> None:
    with pytest.raises(InputError):
        strict_json.loads(f'{{"rope_theta": {literal}}}'.encode(), "config.json")


def test_a_surrogate_pair_in_escapes_is_text_and_half_of_one_is_refused() -> None:
    assert strict_json.loads(b'["\\ud83d\\ude00", "\\\\ud800"]', "x") == ["\U0001f600", "\\ud800"]
    for raw in (b'"\\ud800"', b'{"\\uDFFF": 1}', b'{"a": [{"b": "x\\udc00"}]}', b'["\\ude00\\ud83d"]'):
        with pytest.raises(InputError, match="surrogate"):
            strict_json.loads(raw, "x")


@given(st.text())
def test_show_gives_printable_text_of_bounded_length(text: str) -> None:
    shown = show(text, 40)
    assert shown.isprintable() and len(shown) <= 400
