"""The tokenizer's files as strangers make them: panics of its library, links, templates, code. Nothing runs, all is said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import assert_refused, combined, edit_json, nightly, run
from tests.verification.mtp.folders import DEMO

SMALL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
KINDS = ("link", "pipe", "device")

pytest.importorskip("mlx.core")

PANICS: dict[str, dict[str, Any]] = {
    "at reading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "at every text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "of a template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}
"""tokenizers raises a PanicException, which is no Exception, for each of them (src/normalizers/mod.rs,
src/pre_tokenizers/fixed_length.rs, src/processors/template.rs)."""


@pytest.mark.parametrize("command", ["generate", "verify", "serve", "calibrate"])
@pytest.mark.parametrize("kind", PANICS)
def test_a_panic_of_the_library_is_a_refusal_that_names_the_file(
    kind: str, command: str, converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(converted / "tokenizer.json", lambda t: t.update(PANICS[kind]))
    text = tmp_path / "text.txt"
    text.write_text("In the beginning")
    more = {
        "generate": ("--prompt", "In"), "verify": ("--mtp",), "serve": ("--port", 0), "calibrate": (text, tmp_path / "out"),
    }  # fmt: skip
    assert_refused(run(command, converted, *more[command]), "tokenizer.json", "the tokenizer library breaks on")
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_of_one_text_is_an_error_of_that_text(converted: Path) -> None:
    from ds4convert.errors import InputError
    from ds4convert.inference import tokens

    edges = {"type": "Replace", "pattern": {"Regex": "(?=q)"}, "content": "x"}  # nothing, before a q, becomes x
    edit_json(converted / "tokenizer.json", lambda t: t.update(normalizer=edges))
    tokenizer = tokens.read_tokenizer(converted)
    assert tokens.encode(tokenizer, "In the") and tokenizer.decode([5, 6])
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer library breaks on this text"):
        tokens.encode(tokenizer, "q")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "what"),
    combined(SMALL, KINDS, is_repetition=lambda name, what: SMALL.index(name) % len(KINDS) != KINDS.index(what)),
)
def test_small_files_are_plain_files_of_the_folder(name: str, what: str, converted: Path, tmp_path: Path) -> None:
    path = converted / name
    path.rename(tmp_path / "elsewhere.json")
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere.json")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for words in (("generate", converted, "--prompt", "In"), ("verify", converted, "--mtp", "--max-tokens", 2)):
        result = run(*words)
        assert result.code == 3 and name in result.err and "Traceback" not in result.err, result
        assert "link that leads out" in result.err or "not a regular file" in result.err


def test_code_that_a_tokenizer_names_is_not_run(converted: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    (converted / "tokenization_evil.py").write_text(f"open({str(told)!r}, 'w')\nclass Evil: pass\n")
    for key in ("tokenizer_config.json", "config.json"):
        code = {
            "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
            "AutoConfig": "tokenization_evil.Evil",
        }
        edit_json(converted / key, lambda t, code=code: t.update(auto_map=code, tokenizer_class="Evil"))
    result = run("generate", converted, "--prompt", "In", "--raw", "--max-tokens", 1)
    assert not told.exists() and result.code in {0, 3} and "Traceback" not in result.err


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ 'TOLD') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_is_rendered_in_a_sandbox(
    template: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (converted / "chat_template.jinja").write_text(template.replace("TOLD", str(tmp_path / "told")))
    assert_refused(run("generate", converted, "--prompt", "In"), "chat template fails")
    assert not (tmp_path / "told").exists()


# --- the head ----------------------------------------------------------------------------------------------------


def test_a_head_that_lies_beside_is_run_only_with_drafter_and_said(tmp_path: Path) -> None:
    bare, head = tmp_path / "X", tmp_path / "X-mtp"
    assert run("quantize", DEMO, bare, "--drop-mtp").code == 0
    assert run("graft", bare, "--from", DEMO, "--out", head).code == 0
    words = ("--prompt-ids", "3,4,5", "--max-tokens", 6, "--json", "--dtype", "float32")
    alone = run("generate", bare, *words)
    assert alone.code == 0 and alone.json["mtp_active"] is False and alone.err.count("Warning") == 0
    named = run("generate", bare, *words, "--drafter", head)
    assert named.code == 0 and named.json["mtp_active"] is True and named.json["tokens"] == alone.json["tokens"]
    assert str(head) in named.err
    assert run("generate", bare, *words, "--drafter", head, "--no-mtp").code == 2
    assert run("generate", bare, *words, "--drafter", tmp_path / "none").code == 3
    checked = run("verify", bare, "--mtp", "--max-tokens", 2, "--json")
    assert checked.json["mtp"]["present"] is False
    borrowed = run("verify", bare, "--mtp", "--max-tokens", 2, "--json", "--drafter", head)
    assert (
        borrowed.json["mtp"]["present"] is True and borrowed.json["drafter"] == str(head) and str(head) in borrowed.err
    )
    assert not (bare / "ds4convert_verify.json").exists() or "none" in (bare / "ds4convert_verify.json").read_text()
    assert run("verify", head, "--mtp", "--max-tokens", 2).code == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "layout", nightly(["inline", "mtplx", "vlm", "mlx-lm", "universal"], lambda layout: layout not in {"mtplx", "vlm"})
)
def test_a_finished_folder_of_another_program_runs_as_it_is(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    assert run("quantize", DEMO, folder, "--layout", layout).code == 0
    (folder / "ds4convert_manifest.json").unlink()
    result = run("generate", folder, "--raw", "--prompt", "And it came", "--max-tokens", 6, "--json")
    assert result.code == 0 and result.json["mtp_active"] is True, result.err
    assert run("verify", folder, "--mtp", "--max-tokens", 2).code == 0
    (folder / ".ds4convert").mkdir()
    (folder / ".ds4convert" / "plan.json").write_text("{}")
    assert_refused(run("generate", folder, "--prompt", "In"), "unfinished")
