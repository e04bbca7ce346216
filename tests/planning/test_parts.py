"""A plan divided: every file in exactly one part, contiguous, even; what each reads; names of parts; command lines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import expected
from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.source import open_source
from ds4convert.checkpoint.types import TensorInfo
from ds4convert.errors import UsageError
from ds4convert.planning import build, parts, side_files
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.parts import Part
from ds4convert.planning.recipes import recipe_of
from ds4convert.planning.side_files import SideFiles
from ds4convert.planning.types import Plan
from ds4convert.storage.records import SourceFile
from tests import support_run as s


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source = s.tiny(tmp_path_factory.mktemp("parts") / "source")
    options = build.Options(recipe_of("q3"), layout_of("inline"), max_shard_bytes=100_000)
    return make_plan(open_source(source), options)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 200))
def test_every_file_is_in_one_part_and_parts_are_contiguous(plan: Plan, count: int) -> None:
    assert len(plan.files) > 12
    found = [parts.files_of(plan, Part(n, count)) for n in range(1, count + 1)]
    assert [n for files in found for n in files] == list(range(len(plan.files)))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19])
def test_shares_add_up_to_the_whole_and_are_as_even_as_files_allow(plan: Plan, count: int) -> None:
    found = parts.shares(plan, count)
    assert sum(x.bytes_written for x in found) == sum(f.size for f in plan.files)
    whole, largest = sum(parts.costs(plan)), max(parts.costs(plan))
    assert sum(x.cost for x in found) == pytest.approx(whole)
    assert max(x.cost for x in found) <= whole / count + largest
    assert [x.as_json()["part"] for x in found] == [f"{n}/{count}" for n in range(1, count + 1)]
    assert found[0] == parts.share(plan, Part(1, count))


def test_a_part_reads_each_byte_of_the_source_once_and_all_parts_read_what_the_plan_does(plan: Plan) -> None:
    wanted = {(r.file, at) for step in plan.steps for operand in step.operands for r in operand
              for at in range(r.offset, r.offset + r.size)}  # fmt: skip
    assert parts.share(plan, Part(1, 1)).bytes_read == len(wanted)
    assert sum(x.bytes_read for x in parts.shares(plan, 4)) >= len(wanted)


def pro_in_shards(size: int) -> Plan:
    """Return the plan of Pro as it is published: its tensors in their order, in shards of at most `size` bytes."""
    inventory = expected(parse_config(named_config("pro") or b""))
    tensors: dict[str, TensorInfo] = {}
    files = [SourceFile("model-0.safetensors", 0, "")]
    for spec in inventory.tensors():
        at, n = files[-1].size, math.prod(spec.shape) * DTYPE_BYTES[spec.dtypes[0]]
        if at + n > size:
            files.append(SourceFile(f"model-{len(files)}.safetensors", 0, ""))
            at = 0
        tensors[spec.name] = TensorInfo(spec.name, spec.dtypes[0], spec.shape, len(files) - 1, at, n)
        files[-1] = replace(files[-1], size=at + n)
    side = SideFiles({}, (), side_files.template(inventory.config.family.name))
    options = build.Options(recipe_of("q2"), layout_of("inline"))
    return build.build(inventory, Named(tensors, ()), tuple(files), options, side)


@pytest.mark.nightly  # a plan of 145,000 tensors
def test_four_parts_of_pro_fetch_a_tenth_more_than_one_machine_at_most() -> None:
    plan = pro_in_shards(5 * 10**9)
    of = parts.part_of_each(plan, 4)
    # A shard of which a digest is listed is fetched whole by every part that reads of it.
    fetched = {(of[s.outputs[0].file], r.file) for s in plan.steps for operand in s.operands for r in operand}
    assert len(plan.sources) > 150
    assert sum(plan.sources[file].size for _, file in fetched) <= 1.1 * sum(f.size for f in plan.sources)


def test_rounding_costs_more_than_copying(plan: Plan, tmp_path: Path) -> None:
    native = build.Options(recipe_of("native"), layout_of("inline"), max_shard_bytes=100_000)
    source = s.tiny(tmp_path / "source")
    assert sum(parts.costs(make_plan(open_source(source), native))) < sum(parts.costs(plan))


@pytest.mark.parametrize(
    "text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "1/3/4", "a/b", "1.5/3", "1/999999", "١/٣", "1 3"]
)
def test_what_is_no_part_is_refused_with_how_a_part_is_written(text: str) -> None:
    with pytest.raises(UsageError, match=r"--part .*(expected|counted)"):
        Part.parse(text)


@pytest.mark.parametrize(("text", "part"), [("1/1", Part(1, 1)), (" 2 / 8 ", Part(2, 8)), ("007/007", Part(7, 7))])
def test_a_part_is_read(text: str, part: Part) -> None:
    assert Part.parse(text) == part


def test_the_command_lines_are_those_of_quantize_with_the_same_options() -> None:
    given = "ds4convert plan 'my model' --recipe q2 --parts 2 --json --jobs 3 --out=here --mtp native"
    assert parts.commands(given, 2, "a b") == [
        "ds4convert quantize 'my model' 'a b' --recipe q2 --jobs 3 --mtp native --part 1/2",
        "ds4convert quantize 'my model' 'a b' --recipe q2 --jobs 3 --mtp native --part 2/2",
        "ds4convert quantize 'my model' 'a b' --recipe q2 --jobs 3 --mtp native",
    ]
