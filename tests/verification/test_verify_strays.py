"""`verify` names every file beside the manifest's that a host would read, and every one of the manifest's that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds4convert.verification import structure
from ds4convert.verification.checks import Check
from tests import support_run as s
from tests.verification.test_verify_settings import small_files

READ = [
    "generation_config.json", "special_tokens_map.json", "modeling_deepseek_v4.py", "tool_use.jinja", "vocab.txt",
    "additional_chat_templates/rag.jinja", "chat_templates/default.jinja", "encoding/encoding_dsv4.py",
    "adapters/adapters.safetensors", "8bit/model-00001-of-00001.safetensors", "mtp/weights.safetensors",
    "mtp/generation_config.json", "tokenizer.model", "qwen.tiktoken", "Tool_Use.JINJA", "pytorch_model.bin",
]  # fmt: skip
NOT_READ = [
    "README.md",
    "report.html",
    "plot.png",
    ".DS_Store",
    "._config.json",
    ".git/x.py",
    "notes.txt",
    "figures/a.png",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("strays")
    source = small_files(s.tiny(home / "source", layers=2, experts=2))
    (source / "generation_config.json").unlink()
    s.run(source, home / "mlx")
    return home / "mlx"


def files_check(out: Path) -> Check:
    return next(c for c in structure.structure(out) if c.name == "files")


@pytest.mark.parametrize("name", READ)
def test_a_file_that_hosts_read_is_a_stray(good: Path, name: str, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"{}")
    check = files_check(out)
    assert not check.ok and name in check.detail and "to spare" not in check.detail


def test_what_no_host_reads_is_none(good: Path, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    for name in NOT_READ:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"{}")
    assert files_check(out).ok


def test_a_link_to_a_folder_is_named(good: Path, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    (tmp_path / "elsewhere").mkdir()
    (out / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert "additional_chat_templates (a link" in files_check(out).detail


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_carried_file_that_is_gone_is_named(good: Path, name: str, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    (out / name).unlink()
    assert f"{name}: missing" in files_check(out).detail


@pytest.mark.parametrize("name", ["chat_template.jinja", "extra.json", "notes.txt"])
def test_a_link_to_itself_is_a_finding_or_nothing_and_no_fault_of_the_drive(
    good: Path, name: str, tmp_path: Path
) -> None:
    out = s.copied(good, tmp_path / "mlx")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(name)
    check = files_check(out)
    assert (check.ok and name == "notes.txt") or (not check.ok and name in check.detail)
