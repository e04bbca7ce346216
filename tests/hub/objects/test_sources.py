"""A checkpoint in an object store: the same result as from a folder, and a changed, refused or missing one is told."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import sys
from pathlib import Path

import pytest

import ds4convert as ds4
from ds4convert.api.opening import source_of
from ds4convert.hub.objects import address
from tests import support_run as s
from tests.hub.objects.conftest import DENIED, S3, SLOW_DOWN, Answer

NUMBERS = itertools.count()
OPTIONS = {"max_shard_size": 1_000_000}


@pytest.fixture
def stored(s3: S3, source: Path) -> str:
    """Return the address of a copy of the source that a test may change."""
    where = f"tiny-{next(NUMBERS)}"
    s3.put(source, where)
    s3.seen.clear()
    return f"s3://models/{where}"


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    ds4.convert(source, out, **OPTIONS)
    return s.contents(out)


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def test_a_conversion_reads_ranges_of_the_listed_version_and_equals_that_of_a_folder(
    s3: S3, stored: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    heard: list[str] = []
    ds4.convert(stored, tmp_path / "out", window="1MB", say=lambda m: heard.append(m.text), **OPTIONS)
    assert s.contents(tmp_path / "out") == whole
    reads = [(wanted, tag) for path, wanted, tag in s3.seen if path.endswith(".safetensors")]
    assert reads and all(wanted.startswith("bytes=") and tag for wanted, tag in reads)
    fetched = sum(int(b) - int(a) + 1 for a, b in (wanted.removeprefix("bytes=").split("-") for wanted, _ in reads))
    assert fetched < 1.3 * sum(p.stat().st_size for p in shards(source)) + (256 << 10) * len(shards(source))
    assert any("no sha256 is known" in text and "SHA256SUMS" in text for text in heard)


def test_parts_read_from_a_store_make_the_same_folder(stored: str, whole: dict[str, str], tmp_path: Path) -> None:
    for number in (2, 1):
        ds4.convert(stored, tmp_path / "out", part=f"{number}/2", **OPTIONS)
    done = ds4.convert(stored, tmp_path / "out", **OPTIONS)
    assert done.resumed and s.contents(tmp_path / "out") == whole


def test_a_source_that_is_sent_to_another_process_reads_the_listed_version_with_rights_of_its_own(
    s3: S3, stored: str, source: Path
) -> None:
    files = source_of(stored).bytes
    sent = pickle.dumps(files)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    there, name = pickle.loads(sent), shards(source)[0].name
    assert there.read(name, 100, 1000) == (source / name).read_bytes()[100:1100]
    assert s3.request("PUT", f"/{stored.removeprefix('s3://')}/{name}", (source / name).read_bytes()[::-1]) == 200
    with pytest.raises(ds4.EnvironmentFault, match="was changed while it was read"):
        there.read(name, 100, 1000)


def test_an_object_that_changed_since_it_was_listed_is_refused(
    s3: S3, stored: str, source: Path, tmp_path: Path
) -> None:
    plan = ds4.plan(stored, **OPTIONS)
    path = shards(source)[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    assert s3.request("PUT", f"/{stored.removeprefix('s3://')}/{path.name}", bytes(data)) == 200
    with pytest.raises(ds4.EnvironmentFault, match=f"{path.name}: was changed while it was read .its ETag"):
        ds4.convert(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "ds4convert_manifest.json").exists()


def test_digests_beside_the_shards_are_taken_and_a_wrong_one_is_told(
    s3: S3, stored: str, source: Path, tmp_path: Path
) -> None:
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards(source)}
    place = f"/{stored.removeprefix('s3://')}/SHA256SUMS"

    def put() -> None:
        assert s3.request("PUT", place, "".join(f"{d}  {n}\n" for n, d in sums.items()).encode()) == 200

    put()
    heard: list[str] = []
    ds4.convert(stored, tmp_path / "good", say=lambda m: heard.append(m.text), **OPTIONS)
    assert not any("sha256" in text for text in heard)
    name = shards(source)[0].name
    sums[name] = "0" * 64
    put()
    with pytest.raises(ds4.EnvironmentFault, match=name):
        ds4.convert(stored, tmp_path / "bad", **OPTIONS)
    assert not (tmp_path / "bad" / "ds4convert_manifest.json").exists()


def test_a_store_that_asks_to_slow_down_is_asked_again(s3: S3, stored: str) -> None:
    left = [2]

    def fault(method: str, path: str) -> Answer:
        if path.endswith(".safetensors") and left[0]:
            left[0] -= 1
            return SLOW_DOWN
        return None

    s3.fault = fault
    assert ds4.inspect(stored).family == "deepseek_v4"
    assert left == [0]


def test_what_goes_wrong_with_a_store_is_one_line_that_says_what_to_do(
    s3: S3, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ds4.InputError, match="s3://models/nothing: holds no files; is the address right"):
        ds4.inspect("s3://models/nothing")
    with pytest.raises(ds4.InputError, match="no-such-bucket/x: there is no such bucket"):
        ds4.inspect("s3://no-such-bucket/x")
    s3.fault = lambda method, path: DENIED
    with pytest.raises(ds4.EnvironmentFault, match=r"refuses to let this be read .* AWS_ACCESS_KEY_ID") as caught:
        ds4.convert(stored, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    s3.fault = lambda method, path: None
    monkeypatch.setattr("ds4convert.hub.objects.store.RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ds4.EnvironmentFault, match=r"cannot be reached .* AWS_ENDPOINT_URL") as caught:
        ds4.inspect(stored)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3://", "names no bucket"),
        ("s3:///folder", "names no bucket"),
        ("gs://bucket/../other", "has parts that no object's name has"),
        ("s4://bucket/folder", "s4:// is no store that is known"),
    ],
)
def test_an_address_that_is_no_store_is_refused_with_what_is_expected(text: str, told: str) -> None:
    with pytest.raises(ds4.UsageError, match=told) as caught:
        ds4.inspect(text)
    assert address.EXPECTED in str(caught.value)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ds4.EnvironmentFault, match=r"pip install 'ds4convert\[objects\]'"):
        ds4.inspect("s3://models/tiny")
