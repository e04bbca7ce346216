"""Small plans made by hand: two output files of two steps each, from two source files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ds4convert.planning.types import Output, OutputFile, Plan, Step
from ds4convert.storage.records import ByteRange, SourceFile

HEADER = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"


def step(file: int, offset: int, size: int, *ranges: ByteRange, transform: str = "copy", **more: Any) -> Step:
    """Return a step with one output of bytes."""
    output = Output(f"t{file}.{offset}", "U8", (size,), file, offset, size)
    made = Step(
        (output,),
        transform,
        (ranges,),
        {},
        ((f"s{file}.{offset}",),),
        ((size,),),
        "U8",
        "native",
        "backbone",
        "norm",
        0,
        0,
    )
    return replace(made, **more)


def plan(**more: Any) -> Plan:
    """Return the plan; each file has 10 bytes of header and 30 of data, in two steps of 10 and 20 bytes."""
    made = Plan(
        id="1" * 64, family="deepseek_v4", head_kind="classic", layout="inline", recipe="native",
        formats={"backbone": "native", "mtp": "native"}, hashing=True,
        sources=(SourceFile("a", 100, "h" * 64), SourceFile("b", 200, "i" * 64)),
        files=(OutputFile("model-1.safetensors", 40, HEADER), OutputFile("model-2.safetensors", 40, HEADER)),
        steps=(
            step(0, 10, 10, ByteRange(0, 20, 10)),
            step(0, 20, 20, ByteRange(1, 0, 20)),
            step(1, 10, 10, ByteRange(0, 50, 4), ByteRange(1, 70, 6)),
            step(1, 20, 20, ByteRange(0, 80, 20)),
        ),
        texts={"config.json": b"{}"}, copies={"tokenizer.json": "c" * 64}, left_out=(), files_left_out=(),
    )  # fmt: skip
    return replace(made, **more)
