"""Chat templates that end a machine rather than a prompt (jinja's sandbox bounds neither time nor memory)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds4convert.errors import InputError
from ds4convert.inference import chat_templates, tokens

HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 3000000000 }}",
    "width": "{{ '%2000000000s' % 'a' }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "hidden": "{% generation %}{{ 'a'|center(3000000000) }}{% endgeneration %}",
    "later": "{% if messages|length > 2 %}{{ 'a' * 3000000000 }}{% endif %}",
    "long": "{# " + "x" * (1 << 20) + " #}",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", HOSTILE)
def test_templates_without_end_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"somewhere: its chat template (takes|does not end|is longer)"):
        chat_templates.check(HOSTILE[kind], "somewhere")


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "{{ raise_exception('no tools') }}",
        "{% if", "{{ strftime_now('%Y') }}", "{% for m in messages %}{% break %}{% endfor %}", "",
    ],
)  # fmt: skip
def test_templates_as_people_write_them_pass(text: str) -> None:
    chat_templates.check(text, "somewhere")


def test_a_folder_whose_name_is_no_utf8_is_named(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"q\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no UTF-8 text"):
        tokens.read_tokenizer(folder)
