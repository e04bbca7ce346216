"""`inference/config.json`, which one host reads a DSpark head's sizes from: written with the head, gone with it, and
whatever a user keeps in that folder stays.

Source: rapid-mlx 0.16.10, rapid_mlx/spec_decode/dspark/detect.py: it wants the five keys below in that file, and the
official names of a first and a last stage in the index.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import support
from tests import support_run as s

NAME = "inference/config.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    return {kind: s.tiny(home / kind, layers=3, experts=4, head=kind) for kind in ("classic", "dspark", "none")}


@pytest.fixture(scope="module")
def base(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of the DSpark source without its head. Read only."""
    out = tmp_path_factory.mktemp("base") / "mlx"
    s.run(sources["dspark"], out, keep_mtp=False)
    return out


def test_it_has_the_sizes_of_the_head_under_the_names_of_the_official_code(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    s.run(sources["dspark"], tmp_path / "mlx")
    config = json.loads((sources["dspark"] / "config.json").read_text())
    told = json.loads((tmp_path / "mlx" / NAME).read_text())
    stages = {n.split(".")[1] for n in support.read_folder(sources["dspark"]) if n.startswith("mtp.")}
    assert told.pop("n_mtp_layers") == len(stages) == 3
    assert told == {k: config[k] for k in config if k.startswith("dspark_")} and len(told) == 4
    index = json.loads((tmp_path / "mlx" / support.INDEX).read_text())["weight_map"]
    assert {"mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w2.weight"} <= {
        *index
    }
    assert support.run("verify", tmp_path / "mlx", "--source", sources["dspark"]).code == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [("classic", {}), ("none", {}), ("dspark", {"layout": "vlm"}), ("dspark", {"keep_mtp": False})],
)
def test_no_other_folder_has_it(
    kind: str, options: dict[str, object], sources: dict[str, Path], tmp_path: Path
) -> None:
    s.run(sources[kind], tmp_path / "mlx", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "mlx" / "inference").exists()


def test_a_relayout_leaves_it_out_and_writes_it_again(sources: dict[str, Path], tmp_path: Path) -> None:
    s.run(sources["dspark"], tmp_path / "mlx")
    assert support.run("relayout", tmp_path / "mlx", tmp_path / "vlm", "--layout", "vlm").code == 0
    assert not (tmp_path / "vlm" / "inference").exists()
    assert support.run("relayout", tmp_path / "vlm", tmp_path / "back", "--layout", "inline").code == 0
    assert support.tree(tmp_path / "back") == support.tree(tmp_path / "mlx")


@pytest.mark.parametrize("kept", [(), ("inference/notes.txt",), ("inference/model.py", "inference/more/x.json")])
def test_a_head_put_in_and_taken_out_leaves_what_was_there(
    kept: tuple[str, ...], base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = s.copied(base, tmp_path / "mlx")
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of the user")
    before = support.tree(folder)
    for _ in range(2):
        assert support.run("graft", folder, "--from", sources["dspark"], "--in-place").code == 0
        assert (folder / NAME).is_file()
        assert support.run("graft", folder, "--remove").code == 0
        assert support.tree(folder) == before and (folder / "inference").exists() == bool(kept)


def test_a_file_of_that_name_which_was_there_comes_back(base: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = s.copied(base, tmp_path / "mlx")
    (folder / "inference").mkdir()
    (folder / NAME).write_text('{"of": "the user"}')
    before = support.tree(folder)
    assert support.run("graft", folder, "--from", sources["dspark"], "--in-place").code == 0
    assert "n_mtp_layers" in (folder / NAME).read_text()
    assert support.run("graft", folder, "--remove").code == 0
    assert support.tree(folder) == before


def test_overwriting_removes_ours_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    s.run(sources["dspark"], out)
    (out / "inference" / "model.py").write_text("of the user")
    assert support.run("quantize", sources["classic"], out, "--overwrite").code == 0
    assert [p.name for p in (out / "inference").iterdir()] == ["model.py"]
    s.run(sources["dspark"], tmp_path / "other")
    assert support.run("quantize", sources["classic"], tmp_path / "other", "--overwrite").code == 0
    assert not (tmp_path / "other" / "inference").exists()


@pytest.mark.parametrize("way", ["altered", "link", "file"])
def test_what_is_not_ours_in_its_way_is_refused(way: str, sources: dict[str, Path], tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "mlx", tmp_path / "elsewhere"
    s.run(sources["dspark" if way == "altered" else "classic"], out)
    if way == "altered":
        (out / NAME).write_text("{}")
    elif way == "link":
        elsewhere.mkdir()
        (out / "inference").symlink_to(elsewhere)
    else:
        (out / "inference").write_text("of the user")
    before = support.tree(out)
    result = support.run("quantize", sources["dspark"], out, "--overwrite")
    assert result.code == 3 and "inference" in result.err, result
    assert support.tree(out) == before and (way != "link" or not any(elsewhere.iterdir()))


def test_a_damaged_one_is_found_by_verify(sources: dict[str, Path], tmp_path: Path) -> None:
    s.run(sources["dspark"], tmp_path / "mlx")
    (tmp_path / "mlx" / NAME).write_text("{}")
    result = support.run("verify", tmp_path / "mlx")
    assert result.code == 1 and NAME in result.out
    shutil.rmtree(tmp_path / "mlx" / "inference")
    result = support.run("verify", tmp_path / "mlx")
    assert result.code == 1 and f"{NAME}: missing" in result.out
