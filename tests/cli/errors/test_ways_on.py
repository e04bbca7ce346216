"""What a message advises is what helps: arguments exchanged, files that are no checkpoints, halves of heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds4convert.api.reporting import NEXT
from ds4convert.checkpoint.config import named_config
from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.files import Disk, disk_errors
from tests import support
from tests.cli.test_error_documents import failure
from tests.support import ROOT, run

DEMO = ROOT / "manifests" / "demo"


@pytest.fixture(scope="module")
def mlx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ways") / "mlx"
    assert run("quantize", DEMO, out, "-q").code == 0
    return out


def test_a_hint_is_read_once_and_is_a_part_of_its_own() -> None:
    assert str(InputError("x: bad", hint="name another")) == "x: bad; name another"
    assert str(InputError("x: bad", hint="Name another")) == "x: bad. Name another"
    known = InputError("x: bad; name another one", hint="name another")
    assert str(known) == "x: bad; name another one" and known.hint == "name another"
    assert str(InputError("x: bad")) == "x: bad" and InputError("x: bad").hint is None


def test_every_kind_of_error_has_something_to_do_next() -> None:
    from ds4convert import errors

    found = {e.kind for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.Ds4Error)}
    assert found | {"bug", "interrupted"} == set(NEXT) and all(NEXT.values())


def test_documents_have_the_hint_of_the_place_where_the_error_is_made(mlx: Path, tmp_path: Path) -> None:
    near = failure("plan", DEMO, "--rounding", "neerest", code=2, kind="usage")
    assert near["hint"] == "did you mean nearest?"
    assert failure("plna", code=2, kind="usage")["hint"] == "did you mean plan?"
    assert failure("plan", DEMO, "--jobs", "x", code=2, kind="usage")["hint"].startswith("run `ds4convert plan --help`")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    taken = failure("quantize", DEMO, tmp_path / "full", code=3, kind="output")
    assert taken["hint"].startswith("choose another folder") and taken["message"].endswith(taken["hint"])
    headed = failure("graft", mlx, "--from", DEMO, "--out", tmp_path / "o", code=3, kind="input")
    assert headed["hint"] == f"take it out first: ds4convert graft --remove {mlx}"
    assert failure("plan", tmp_path / "no", code=3, kind="input")["hint"] == NEXT["input"]


def test_one_of_the_small_files_is_no_checkpoint_and_its_folder_is_named() -> None:
    for name, more in (("config.json", True), ("tokenizer.json", False), ("model.safetensors.index.json", False)):
        error = failure("inspect", DEMO / name, code=3, kind="input")
        assert error["hint"].startswith(f"name the folder: {DEMO}") and "git lfs" not in error["message"]
        assert ("--config" in error["hint"]) is more


def test_the_official_folder_in_the_place_of_the_converted_one_is_recognised(mlx: Path, tmp_path: Path) -> None:
    error = failure("verify", DEMO, "--source", mlx, code=3, kind="input")
    assert error["hint"] == "are MLX_DIR and --source exchanged?" and str(mlx) in error["message"]
    for words in (["--out", tmp_path / "o"], ["--in-place"]):
        error = failure("graft", DEMO, "--from", mlx, *words, code=3, kind="input")
        assert error["hint"] == "are MLX_DIR and SRC exchanged?"
    assert run("verify", DEMO).code == 1 and not (tmp_path / "o").exists()


def test_an_unfinished_folder_gets_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert support.run("quantize", DEMO, out, "--part", "1/2", "-q").code == 0
    checks = run("verify", out, "--json").json["checks"]
    assert [c["name"] for c in checks] == ["finished"] and "unfinished" in checks[0]["detail"]


@pytest.mark.parametrize("kind", ["deepseek_v4", "deepseek_v32", "deepseek_v41_text", "other"])
def test_a_config_of_v41_under_another_model_type_is_told_which_it_needs(kind: str, tmp_path: Path) -> None:
    table = json.loads(named_config("flash-v41") or b"")
    (tmp_path / "config.json").write_text(json.dumps(table | {"model_type": kind}))
    error = failure("plan", "--config", tmp_path / "config.json", code=3, kind="config")
    assert (
        f"model_type is '{kind}', expected 'deepseek_v41'" in error["message"] and "DeepSeek-V4.1" in error["message"]
    )
    assert error["hint"].startswith("Set model_type to 'deepseek_v41'") and "Move the keys" not in error["message"]


def test_a_config_that_names_no_architecture_is_told_as_before(tmp_path: Path) -> None:
    table = json.loads(named_config("flash-v41") or b"") | {"model_type": "other"}
    del table["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert "nested" in run("plan", "--config", tmp_path / "config.json").err


def test_a_link_below_the_folder_that_is_written_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "2-of-4").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFault) as told, disk_errors("writing", tmp_path / "state"):
        Disk().make_folder(tmp_path / "state" / "2-of-4")
    assert str(told.value).startswith(f"writing {tmp_path}/state/2-of-4: is a link, expected a folder")
    with pytest.raises(EnvironmentFault) as other, disk_errors("writing", tmp_path / "state"):
        raise OSError(5, "x", "/elsewhere")
    assert f"writing {tmp_path}/state: x" in str(other.value)


def test_half_a_head_is_not_pulled_again_but_another_source_named(tmp_path: Path) -> None:
    bare, half = tmp_path / "bare", tmp_path / "half"
    assert run("quantize", DEMO, bare, "--drop-mtp", "-q").code == 0
    tensors = {n: t for n, t in support.read_folder(DEMO).items() if not n.startswith("mtp.0.attn.wq_a")}
    support.write_folder(half, tensors, json.loads((DEMO / "config.json").read_text()))
    error = failure("graft", bare, "--from", half, "--out", tmp_path / "o", code=3, kind="findings")
    assert "pull it again" not in error["message"] and "name a source that has all of it" in error["hint"]
