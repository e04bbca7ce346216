"""What a machine of a cluster does before and while it writes a part. Needs no Ray: these are plain functions."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.errors import ValueFault
from ds4convert.execution import run
from ds4convert.execution.cluster import proof, task
from ds4convert.execution.cluster.parts import Journals, check_address
from ds4convert.execution.cluster.task import Work
from ds4convert.execution.rounding_steps import no_importance
from ds4convert.execution.run import Looked, Way
from ds4convert.files import Disk
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.parts import Part, shares
from ds4convert.planning.recipes import recipe_of
from ds4convert.storage.state_folder import STATE_FOLDER
from tests import support_run as s

OPTIONS = {"recipe": "q2", "max_shard_bytes": 1_000_000}
COUNT = 3


class Begun:
    """A folder that is ready for parts, and the work as it is sent to machines."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = s.tiny(folder / "source", experts=24), folder / "out"
        opened = open_source(self.source)
        options = build.Options(recipe_of("q2"), layout_of("inline"), max_shard_bytes=1_000_000)
        self.plan = make_plan(opened, options)
        found = run.look(opened, self.plan, self.out, Way())
        assert isinstance(found, Looked) and run.begin_parts(self.plan, self.out, found) is None
        self.work = Work(self.plan, self.out, opened.bytes, found.ending.marks, no_importance, 0, 1, COUNT, Disk())
        self.proof = proof.here(proof.kinds_of(self.plan))

    def write(self, number: int, **other: object) -> tuple[str, bytes]:
        return task.write(replace(self.proof, **other).as_json(), pickle.dumps(self.work), number)

    def files(self) -> list[str]:
        return sorted(p.name for p in self.out.iterdir() if p.name != STATE_FOLDER)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    return Begun(tmp_path_factory.mktemp("task"))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"version": "9.9.9"}, "it has ds4convert 0.1.0, and the run 9.9.9"),
        ({"numpy": "1.0"}, "and the run 1.0; install the same version there"),
        ({"mlx": "0.1"}, "and the run 0.1"),
        ({"code": "0" * 16}, "has other code than the run's"),
        ({"digests": ("0" * 64,)}, "rounds to other bytes: bf16 to affine-"),
    ],
)
def test_a_machine_that_differs_in_anything_is_refused_before_it_writes_a_byte(
    begun: Begun, other: dict[str, object], told: str
) -> None:
    before = begun.files(), sorted((begun.out / STATE_FOLDER).iterdir())
    kind, value = begun.write(1, **other)
    assert kind == "refused" and told in value.decode()
    assert (begun.files(), sorted((begun.out / STATE_FOLDER).iterdir())) == before


def test_the_proof_has_a_digest_of_every_kind_of_rounding_of_the_plan_and_comes_back_from_the_wire(
    begun: Begun,
) -> None:
    stores = {k.store for k in begun.proof.kinds}
    assert stores == {"fp4", "fp8", "bf16"} and len(set(begun.proof.digests)) == len(begun.proof.kinds)
    assert proof.Proof.parse(begun.proof.as_json()) == begun.proof
    assert proof.difference(begun.proof, proof.Proof.parse(begun.proof.as_json())) is None


def test_every_kind_of_store_and_rounding_has_a_sample_that_rounding_changes() -> None:
    kinds = tuple(
        proof.Kind(store, source, codec, rounding, weighed)
        for store, source in (("fp4", ""), ("fp8", ""), ("bf16", ""), ("codec", "affine-4-g64"), ("codec", "mxfp4"))
        for codec in ("affine-2-g64", "affine-8-g32", "mxfp4", "nvfp4")
        for rounding in ("nearest", "optimal")
        for weighed in (False, True)
    )
    digests = proof.digests_of(kinds)
    assert digests == proof.digests_of(kinds)
    optimal = {k: d for k, d in zip(kinds, digests, strict=True) if k.codec == "affine-2-g64"}
    assert len(set(optimal.values())) >= 3 * len(optimal) // 4  # plain rounding knows of no weights


def test_a_machine_that_does_not_share_the_folder_is_refused_and_makes_nothing(
    begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "SHARED_S", 0.0)
    elsewhere = replace(begun.work, out=tmp_path / "out")
    kind, value = task.write(begun.proof.as_json(), pickle.dumps(elsewhere), 1)
    assert kind == "refused" and "is not the run's folder there" in value.decode()
    assert not (tmp_path / "out").exists()


def test_a_machine_with_another_source_is_refused(begun: Begun, tmp_path: Path) -> None:
    other = s.tiny(tmp_path / "source", experts=4)
    work = replace(begun.work, source=open_source(other).bytes)
    kind, value = task.write(begun.proof.as_json(), pickle.dumps(work), 2)
    assert kind == "refused" and "its copy of the source is not the run's" in value.decode()


def test_a_nan_comes_back_as_the_error_that_it_is(tmp_path: Path) -> None:
    begun = Begun(tmp_path)
    step = next(x for x in begun.plan.steps if x.transform == "quantize_fp4")
    scale = step.operands[1][0]
    path = begun.source / begun.plan.sources[scale.file].name
    data = bytearray(path.read_bytes())
    data[scale.offset] = 0xFF
    path.write_bytes(data)
    number = next(p.part.number for p in shares(begun.plan, COUNT) if step.outputs[0].file in p.files)
    kind, value = begun.write(number)
    error = pickle.loads(value)
    assert kind == "failed" and isinstance(error, ValueFault) and "NaN in E8M0 block scales" in str(error)


def test_parts_written_one_by_one_are_the_folder_of_a_single_run_and_their_journals_tell_the_progress(
    begun: Begun, tmp_path: Path
) -> None:
    told: list[int] = []
    journals = Journals(begun.plan, begun.out / STATE_FOLDER, [Part(n + 1, COUNT) for n in range(COUNT)], told.append)
    for number in (3, 1, 2):
        assert begun.write(number) == ("done", b"")
        journals._looked = 0.0
        journals.look()
    assert len(told) >= 3 and sum(told) == sum(o.size for x in begun.plan.steps for o in x.outputs)
    s.run(begun.source, begun.out, **OPTIONS)
    s.run(begun.source, tmp_path / "single", **OPTIONS)
    assert s.contents(begun.out) == s.contents(tmp_path / "single")


@pytest.mark.parametrize(
    ("text", "found"),
    [("auto", None), ("head:6379", ("head", 6379)), ("10.0.0.7:1", ("10.0.0.7", 1)), ("[::1]:6379", ("::1", 6379))],
)
def test_addresses(text: str, found: tuple[str, int] | None) -> None:
    assert check_address(text) == found


def test_without_ray_the_option_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from ds4convert.__main__ import main; main()"
    source = s.tiny(tmp_path / "source")
    words = ["quantize", str(source), str(tmp_path / "out"), "--cluster", "auto"]
    done = s.subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=s.environment(),
        check=False,
        timeout=120,
    )
    assert done.returncode == 4 and "pip install 'ds4convert[ray]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_compensated_rounding_stays_on_one_machine_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words " * 4000)
    source = s.GOLDEN / "tiny-a" / "checkpoint"
    words = [
        "--rounding",
        "compensated",
        "--recipe",
        "q2",
        "--calibrate",
        tmp_path / "text",
        "--calibration-tokens",
        "64",
    ]
    done = s.cli("quantize", source, tmp_path / "out", *words, "--cluster", "auto", exit_code=2)
    assert "goes through the model layer by layer, so it stays on one machine: leave out --cluster" in done.stderr
