"""Whatever a stranger may have named is text on the page of `inspect --report`, and one word on its command lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ds4convert.checkpoint.types import Finding, LeftOut
from ds4convert.converted import rounding_losses
from ds4convert.converted.inspection import Inspection, Row
from ds4convert.converted.verify_record import HeadFigures, VerifyRecord
from ds4convert.planning.types import Tool
from ds4convert.report import inspected
from ds4convert.report.inspected import Choice, Holding, Listed, Quality, Subject
from ds4convert.words import macs
from tests.html_pages import parse
from tests.report.hostile import EVIL, evil_record


def evil_subjects() -> Iterator[Subject]:
    """Everything that a stranger may have named, named so: of a source, a repo, and a converted folder."""
    row = Row(EVIL, EVIL, (2, 2), 8, EVIL, EVIL)
    matrices = (rounding_losses.LayerLoss(EVIL, 0, (EVIL,), 4.0, 0.0, 0.0),)
    found = Inspection(EVIL, "official", EVIL, (row,), 4, (Finding(EVIL, EVIL, EVIL, EVIL),), EVIL, None,
                       (LeftOut(EVIL, EVIL),), None, matrices)  # fmt: skip
    choice = Choice(EVIL, EVIL, 8, 4.0, None, Quality(0.1, 0.5), Quality(0.1, 0.5))
    source = Subject(
        EVIL, f"hf://{EVIL}", found, EVIL, EVIL, ((EVIL, EVIL),), (choice,),
        (Holding(8 * macs.GIB, 16 * macs.GIB, EVIL, 7), Holding(32 * macs.GIB, 32 * macs.GIB, None, None)), 4096, (EVIL,), True, (Listed(EVIL, 5, EVIL),),
    )  # fmt: skip
    yield source
    yield replace(source, found=replace(found, problems=(), format="plain", family=None), choices=(), macs=(), files=())
    kept = VerifyRecord(Tool(EVIL, EVIL), EVIL, EVIL, True, (EVIL,), HeadFigures(EVIL, EVIL, 0.5, verdict=EVIL))
    yield replace(
        source, found=replace(found, format="mlx", manifest=evil_record(), problems=()), choices=(), kept=kept
    )


def test_no_name_becomes_markup_anywhere_on_the_page() -> None:
    for subject in evil_subjects():
        text = inspected.page(subject)
        page = parse(text)
        assert "script" not in page.tags and "<script" not in text and "&lt;script&gt;" in text
        assert not any(name.startswith("on") for name, _ in page.attributes)


def test_a_name_is_one_word_on_the_command_line() -> None:
    name = "my model; rm"
    found = Inspection("deepseek_v4", "official", "none", (), 0, ())
    subject = Subject(name, name, found, choices=[Choice("q", "q", 1, 1.0, None, None, None)])
    shown = " ".join(parse(inspected.page(subject)).texts)
    assert "ds4convert quantize 'my model; rm' 'my model; rm-mlx'" in shown
