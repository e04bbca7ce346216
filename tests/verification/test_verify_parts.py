"""`verify --source --part I/N`: every tensor and every digest is looked at by some part, and a fault by the right one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ds4convert.errors import UsageError
from ds4convert.planning.parts import Part, names_of
from ds4convert.verification.against_source import against_source
from ds4convert.verification.structure import structure
from tests import support_run as s

COUNT = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("parts") / "source")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "mlx"
    s.run(source, out, layout="universal", max_shard_bytes=1_000_000)  # the head lies in it twice
    return out


def wrong(folder: Path, source: Path, number: int) -> list[str]:
    part = Part(number, COUNT)
    checks = structure(folder, part=part) + against_source(folder, source, part=part)
    return [c.name for c in checks if not c.ok]


def test_every_part_of_a_good_folder_is_good(source: Path, whole: Path) -> None:
    assert [wrong(whole, source, n) for n in range(1, COUNT + 1)] == [[], [], []]


def test_parts_share_the_files_out_and_leave_none(whole: Path) -> None:
    sizes = {p.name: p.stat().st_size for p in whole.glob("*.safetensors")}
    shares = [names_of(sizes, Part(n, COUNT)) for n in range(1, COUNT + 1)]
    assert all(shares) and sum(map(len, shares)) == len(sizes) and frozenset().union(*shares) == set(sizes)


def test_a_flipped_bit_in_any_file_is_found_by_exactly_the_part_that_has_it(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    for name in sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*.safetensors")):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        found = [wrong(folder, source, n) for n in range(1, COUNT + 1)]
        values = [n for n, names in enumerate(found) if any(name.startswith("values") for name in names)]
        digests = [n for n, names in enumerate(found) if "digests" in names]
        assert len(values) == 1 and len(digests) == 1, (name, found)
        shutil.rmtree(folder)


def test_a_tensor_that_the_folder_lacks_is_told_by_every_part(source: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    s.run(s.tiny(tmp_path / "less", layers=2), folder, max_shard_bytes=1_000_000)
    assert all("values" in wrong(folder, source, n) for n in range(1, COUNT + 1))


def test_the_command_line_divides_the_comparison_and_nothing_else(source: Path, whole: Path) -> None:
    told = json.loads(s.cli("verify", whole, "--source", source, "--part", "2/3", "--json").stdout)
    assert told["ok"] and "(part 2/3" in next(c["detail"] for c in told["checks"] if c["name"] == "digests")
    assert "--part divides" in s.cli("verify", whole, "--part", "2/3", exit_code=2).stderr
    assert "--part" in s.cli("verify", whole, "--source", source, "--part", "9/3", exit_code=2).stderr


def test_the_library_takes_a_part_as_text(source: Path, whole: Path) -> None:
    import ds4convert as ds4

    assert ds4.verify(str(whole), source=str(source), part="1/3").ok
    with pytest.raises(UsageError, match=r"^--part '0': expected I/N"):
        ds4.verify(str(whole), source=str(source), part="0")
    with pytest.raises(UsageError, match="--part divides"):
        ds4.verify(str(whole), source=str(source), part="1/3", mtp=True)
