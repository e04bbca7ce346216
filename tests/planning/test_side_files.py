"""Small files beside the tensors: what is carried over, what is not and why, and what is refused before it travels on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ds4convert.checkpoint.types import LeftOut
from ds4convert.errors import HeaderError, InputError
from ds4convert.planning import side_files
from ds4convert.planning.side_files import check_carried, survey, template

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


def test_every_file_is_carried_or_left_out_with_a_reason_or_is_no_part_of_the_folder(tmp_path: Path) -> None:
    carried = {"tokenizer.json": b"{}", "LICENSE": b"", "merges.txt": b"a b", "tokenizer.model": b"\x01"}
    for name, data in carried.items():
        (tmp_path / name).write_bytes(data)
    for name in ("config.json", "model.safetensors.index.json", "m.safetensors", ".gitattributes", "ds4convert_pull.json",
                 "readme.rst", "modeling.py", "x.bin", "a\nb"):  # fmt: skip
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "inference").mkdir()
    (tmp_path / "code.py").symlink_to("modeling.py")
    found = survey(tmp_path, "deepseek_v4")
    assert found.copies == {n: hashlib.sha256(d).hexdigest() for n, d in carried.items()}
    assert found.left_out == (
        LeftOut("a\\nb", "not a file that MLX hosts read"),
        LeftOut("code.py", "code; a converted folder carries none of the source's"),
        LeftOut("inference", "a folder; MLX hosts read none"),
        LeftOut("modeling.py", "code; a converted folder carries none of the source's"),
        LeftOut("readme.rst", "the source's model card; publish writes one for the result"),
        LeftOut("x.bin", "not a file that MLX hosts read"),
    )
    assert found.added == template("deepseek_v4")


@pytest.mark.parametrize(
    ("name", "data", "own"),
    [
        ("chat_template.jinja", b"x", True), ("chat_template.json", b"{}", True), ("tokenizer_config.json", b'{"chat_template": "x"}', True),
        ("tokenizer_config.json", b'{"chat_template": ""}', False), ("tokenizer_config.json", b"{}", False), ("tokenizer.json", b"{}", False),
    ],
)  # fmt: skip
def test_the_familys_template_is_added_where_the_source_has_none(
    name: str, data: bytes, own: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    assert survey(tmp_path, "deepseek_v4").added == ({} if own else template("deepseek_v4"))


def test_a_family_without_a_template_gets_none(tmp_path: Path) -> None:
    assert template("no_such_family") == {} == survey(tmp_path, "no_such_family").added
    assert list(template("deepseek_v4")) == ["chat_template.jinja"]


def test_a_link_out_of_the_folder_stops_the_plan(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(HeaderError, match=r"tokenizer\.json: is a link that leads out of the folder"):
        survey(tmp_path, "deepseek_v4")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "other").symlink_to("/etc/hostname")
    assert survey(tmp_path, "deepseek_v4").left_out[0].tensor == "other", "what is not carried is not opened"


FINE = [
    ("LICENSE", b""), ("LICENSE.md", b"<html>a licence</html>"), ("LICENSE", b"text"), ("tokenizer.json", b" {} "), ("merges.txt", b"a"),
]  # fmt: skip
REFUSED = {
    ("LICENSE", POINTER): "LICENSE: is a Git LFS pointer, not the file itself; fetch the file itself: `git lfs pull` in a clone, or `ds4convert pull REPO DEST`",
    ("tokenizer.json", b""): "tokenizer.json: is empty; download it again",
    ("tokenizer.model", bytes(4)): "tokenizer.model: holds 4 zero bytes and nothing else, as an interrupted download leaves; download it again",
    ("vocab.json", b"[1]"): "vocab.json: expected a JSON object; download it again",
    ("vocab.json", b'{"a": 1'): "vocab.json: not valid JSON: Expecting ',' delimiter at character 7; the file ends there: it is cut off, download it again",
    ("merges.txt", b"<!doctype html><p>"): "merges.txt: is a web page (HTML: an error or a login), not the file itself; fetch the file itself: `git lfs pull` in a clone, or `ds4convert pull REPO DEST`",
}  # fmt: skip


@pytest.mark.parametrize(("name", "data"), FINE)
def test_what_is_what_its_name_says_is_carried(name: str, data: bytes) -> None:
    check_carried(name, data)


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: f"{c[0]} {c[1][:8]!r}")
def test_what_is_not_what_its_name_says_is_refused_in_words(case: tuple[str, bytes]) -> None:
    with pytest.raises(InputError) as caught:
        check_carried(*case)
    assert str(caught.value) == REFUSED[case]


def test_large_json_of_wide_characters_is_looked_at_from_both_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "LARGE_BYTES", 10)
    check_carried("tokenizer.json", ' {"é": not even json} \n'.encode())
    check_carried("tokenizer.json", b'{"plain": "ascii"}')
    for text in ('{"éééééé": 1', '["éééééé", 1]'):
        with pytest.raises(InputError, match=r"^tokenizer\.json: is cut off or no JSON object; download it again$"):
            check_carried("tokenizer.json", text.encode())
    with pytest.raises(InputError, match="not valid JSON"):
        check_carried("tokenizer.json", b'{"plain" "ascii"}')
