"""Damaged checkpoints through the real program: a refusal or a result, never a traceback, a hang, or a file written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ds4convert.errors import HeaderError
from tests import support
from tests.hostile import fuzz
from tests.support import Result, frame, mini_config, run

ATTACKS = support.ROOT / "tests" / "hostile" / "attacks"
NIGHTLY_CASES = 12_000
LIMIT_SECONDS = 60.0
"""Processor seconds; far more than the two or three that it takes, as a busy machine makes them longer: what takes time
with the square of the size takes many minutes on a giant."""
LIMIT_MB = 300


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the smallest checkpoint with all kinds of tensors: small headers make a mutation likely to matter."""
    small = {"hidden_size": 64, "vocab_size": 8, "q_lora_rank": 32, "o_lora_rank": 32, "moe_intermediate_size": 32}
    config = mini_config(**small, n_routed_experts=2, num_hidden_layers=3, compress_ratios=[0, 4, 128, 0])
    return support.write_synth(tmp_path_factory.mktemp("fuzz") / "clean", config)


def timed(*arguments: object) -> Result:
    start = time.process_time()  # of this process: another's load is no fault of ours
    result = run(*arguments)
    took = time.process_time() - start
    assert took < LIMIT_SECONDS, f"{arguments[0]} took {took:.1f} s"
    return result


def check(folder: Path, out: Path) -> int:
    """Run the three commands on a damaged folder; return the exit code of quantize."""
    inspected, planned = timed("inspect", folder, "--json"), timed("plan", folder, "--json")
    before = sorted(p.name for p in folder.iterdir())
    written = timed("quantize", folder, out, "--no-hash", "--jobs", "1")
    for result in (inspected, planned, written):
        assert result.code in {0, 3}, result.err
        assert "Traceback" not in result.err and "this is a bug" not in result.err, result.err
        if result.code == 3:
            assert result.err.startswith("Error: "), result
            assert result.out == "" or result.json.keys() == {"schema", "error"}, result
            assert len(result.err) < 8000 and all(line.isprintable() for line in result.err.splitlines()), result.err
    assert planned.code == written.code, (planned.err, written.err)
    if written.code == 3:
        assert planned.err == written.err
        assert not out.exists(), "a refused input left files"
    else:
        json.loads(planned.out)
        proof = timed("verify", out, "--source", folder)
        assert proof.code == 0, (proof.out, proof.err)
    assert sorted(p.name for p in folder.iterdir()) == before, "the source folder was changed"
    return written.code


def fuzz_range(seeds: range, clean: Path, tmp_path: Path) -> Counter[int]:
    codes: Counter[int] = Counter()
    for seed in seeds:
        folder, out = tmp_path / "case", tmp_path / "out"
        fuzz.make(seed, clean, folder)
        try:
            codes[check(folder, out)] += 1
        except BaseException as e:
            e.add_note(f"fuzz case {seed}; to see it: fuzz.make({seed}, clean, folder)")
            raise
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    return codes


def test_a_clean_checkpoint_passes_so_that_refusals_mean_something(clean: Path, tmp_path: Path) -> None:
    assert check(clean, tmp_path / "out") == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", range(6))
def test_three_hundred_damaged_checkpoints_are_refused_or_converted_right(
    part: int, clean: Path, tmp_path: Path
) -> None:
    codes = fuzz_range(range(part * 50, part * 50 + 50), clean, tmp_path)
    assert codes[3] > 25 and codes.total() == 50


@pytest.mark.nightly
def test_ten_thousand_damaged_checkpoints_are_refused_or_converted_right(
    clean: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start = 1000 + NIGHTLY_CASES * request.config.getoption("--seed")
    codes = fuzz_range(range(start, start + NIGHTLY_CASES), clean, tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"\n{codes.total()} cases from seed {start}: {codes[3]} refused, "
        f"{codes[0]} converted and verified; peak {peak} MB"
    )
    assert codes.total() == NIGHTLY_CASES >= 10_000


# --- kept finds: tests/hostile/attacks/NAME.json says what was damaged and how it has to be refused ---


@pytest.mark.parametrize("path", sorted(ATTACKS.glob("*.json")), ids=lambda p: p.stem)
def test_kept_attacks_stay_refused(path: Path, clean: Path, tmp_path: Path) -> None:
    attack = json.loads(path.read_text())
    folder, out = tmp_path / "case", tmp_path / "out"
    support.copy_folder(clean, folder)
    if "seed" in attack:
        shutil.rmtree(folder)
        fuzz.make(attack["seed"], clean, folder)
    for name, text in attack.get("files", {}).items():
        (folder / name).write_text(text)
    for name, changes in attack.get("merge", {}).items():
        support.edit_json(folder / name, lambda table, changes=changes: table.update(changes))
    for name, entries in attack.get("tensors", {}).items():
        found = support.read_file(folder / name) if (folder / name).exists() else {}
        for tensor, (dtype, shape) in entries.items():
            found[tensor] = support.Tensor(dtype, shape, bytes(support.math.prod(shape) * support.WIDTHS[dtype]))
        support.write_file(folder / name, found)
    if attack.get("no_index"):
        (folder / support.INDEX).unlink()
    check(folder, out)
    result = run("quantize", folder, out)
    if attack.get("message"):
        support.assert_refused(result, attack["message"])


# --- giants: memory and time of the process ---


def sparse(path: Path, length: int, size: int) -> None:
    with path.open("wb") as f:
        f.write(length.to_bytes(8, "little") + b"{")
        f.truncate(size)


def write_giant(kind: str, folder: Path) -> None:
    """Write a hostile folder of a few MB to 100 MB."""
    shard, one = folder / "model.safetensors", b'{"dtype":"I8","shape":[1],"data_offsets":[%d,%d]}'
    (folder / "config.json").write_text(json.dumps(mini_config()))
    if kind == "sparse header of 99 MB":
        sparse(shard, 99_000_000, 100_000_000)
    elif kind == "90 MB of opening brackets":
        shard.write_bytes(frame(b'{"a":' + b"[" * 90_000_000))
    elif kind == "2 million opening brackets":
        shard.write_bytes(frame(b'{"a":' + b"[" * 2_000_000))
    elif kind == "90 MB of commas":
        shard.write_bytes(frame(b'{"a":[' + b"," * 90_000_000))
    elif kind == "an emoji in 50 MB of text":
        shard.write_bytes(frame(b'{"' + b"a" * 50_000_000 + "\U0001f600".encode() + b'":1}'))
    elif kind == "an emoji in 15 MB of text":
        shard.write_bytes(frame(b'{"' + b"a" * 15_000_000 + "\U0001f600".encode() + b'":1}'))
    elif kind == "one name of 99 MB":
        shard.write_bytes(frame(b'{"' + b"a" * 99_000_000 + b'":1}'))
    elif kind == "one name of 79 MB":
        shard.write_bytes(frame(b'{"' + b"a" * 79_000_000 + b'":1}'))
    elif kind == "a number of 79 MB":
        shard.write_bytes(frame(b'{"a":1.' + b"1" * 79_000_000 + b"}"))
    elif kind == "an integer of 79 MB":
        shard.write_bytes(frame(b'{"a":' + b"1" * 79_000_000 + b"}"))
    elif kind == "79 MB of spaces":
        shard.write_bytes(frame(b"{" + b" " * 79_000_000 + b"}"))
    elif kind == "as many flat keys as are accepted":
        shard.write_bytes(frame(b"{" + b",".join(b'"a%07d":0' % i for i in range(639_999)) + b"}"))
    elif kind == "two million empty lists":
        shard.write_bytes(frame(b'{"a":[' + b"[]," * 2_000_000 + b"1]}"))
    elif kind == "as many short texts as are accepted":
        shard.write_bytes(frame(b'{"a":[' + b",".join(b'"%07d"' % i for i in range(2_600_000)) + b"]}"))
    elif kind == "a shape of a million axes":
        shard.write_bytes(
            frame(b'{"a":{"dtype":"I8","shape":[' + b"281474976710655," * 1_000_000 + b'1],"data_offsets":[0,1]}}')
        )
    elif kind == "150,000 valid tensors":
        entries = b",".join(b'"t%06d":' % i + one % (i, i + 1) for i in range(150_000))
        shard.write_bytes(frame(b"{" + entries + b"}", bytes(150_000)))
    elif kind == "two files of 140,000 valid tensors":
        for f in "ab":
            entries = b",".join(b'"%s%06d":' % (f.encode(), i) + one % (i, i + 1) for i in range(140_000))
            (folder / f"{f}.safetensors").write_bytes(frame(b"{" + entries + b"}", bytes(140_000)))
    elif kind == "an index of 90 MB":
        entries = b",".join(b'"t%07d":"m.safetensors"' % i for i in range(3_300_000))
        (folder / support.INDEX).write_bytes(b'{"weight_map":{' + entries + b"}}")
    elif kind == "the largest index that is accepted":
        entries = b",".join(b'"t%07d":"m.safetensors"' % i for i in range(299_990))
        (folder / support.INDEX).write_bytes(b'{"weight_map":{' + entries + b"}}")
    elif kind == "an index of 290,000 files":
        entries = b",".join(b'"t%07d":"m%07d.safetensors"' % (i, i) for i in range(290_000))
        (folder / support.INDEX).write_bytes(b'{"weight_map":{' + entries + b"}}")
    elif kind == "a config of 15 MB":
        (folder / "config.json").write_text('{"model_type":"deepseek_v4","a":["' + "\u00e9" * 7_000_000 + '"]}')
        support.write_file(shard, {})
    elif kind == "a config of many experts over one tensor":
        raw = mini_config(n_routed_experts=8000)
        (folder / "config.json").write_text(json.dumps(raw))
        support.write_file(shard, {"x": support.Tensor("I8", [1], b"x")})
    elif kind == "a config of many layers over one tensor":
        raw = mini_config(num_hidden_layers=3500, compress_ratios=[4] * 3501, n_routed_experts=1)
        (folder / "config.json").write_text(json.dumps(raw))
        support.write_file(shard, {"x": support.Tensor("I8", [1], b"x")})
    else:
        raise AssertionError(kind)


GIANTS = [
    "sparse header of 99 MB", "90 MB of opening brackets", "2 million opening brackets", "90 MB of commas",
    "an emoji in 50 MB of text", "an emoji in 15 MB of text", "one name of 99 MB", "one name of 79 MB",
    "a number of 79 MB",
    "an integer of 79 MB", "79 MB of spaces", "as many flat keys as are accepted", "two million empty lists",
    "as many short texts as are accepted", "a shape of a million axes", "150,000 valid tensors",
    "two files of 140,000 valid tensors", "an index of 90 MB", "the largest index that is accepted",
    "an index of 290,000 files", "a config of 15 MB", "a config of many experts over one tensor",
    "a config of many layers over one tensor",
]  # fmt: skip


REPETITIONS = {
    "2 million opening brackets", "90 MB of commas", "an emoji in 15 MB of text", "one name of 79 MB",
    "an integer of 79 MB", "79 MB of spaces", "two million empty lists", "a shape of a million axes",
    "an index of 90 MB", "an index of 290,000 files", "a config of 15 MB", "150,000 valid tensors",
}  # fmt: skip
"""Giants of a kind that others of the list have, too: nightly."""

LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "ds4convert", *sys.argv[1:]], capture_output=True, text=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout, done.stderr, usage.ru_maxrss >> 10, usage.ru_utime + usage.ru_stime]))
"""
"""Measures from a small process: a child's peak counts the memory of the one that it was forked from."""


def measured(*arguments: object) -> tuple[Result, int, float]:
    """Run the program in a process of its own; return (result, peak resident MB, processor seconds)."""
    env = os.environ | {"PYTHONPATH": str(support.ROOT)}
    command = [sys.executable, "-c", LAUNCHER, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=True)
    code, out, err, peak, seconds = json.loads(done.stdout)
    return Result(code, out, err), peak, seconds


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("kind", support.nightly(GIANTS, lambda kind: kind in REPETITIONS))
def test_giants_are_refused_within_300_mb_and_soon(kind: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "giant", tmp_path / "out"
    folder.mkdir()
    write_giant(kind, folder)
    for command in (("inspect", folder), ("quantize", folder, out)):
        result, peak, seconds = measured(*command)
        print(f"{kind}: {command[0]} {peak} MB, {seconds:.1f} s, code {result.code}: {result.err[:150]!r}")
        assert peak <= LIMIT_MB and seconds < LIMIT_SECONDS, (command[0], peak, seconds)
        assert "Traceback" not in result.err and "this is a bug" not in result.err, result.err[:500]
        assert result.code == 3 or (command[0] == "inspect" and result.code == 0)
        assert len(result.err) < 8000
    assert result.code == 3 and not out.exists()


def test_header_error_is_what_a_giant_raises(tmp_path: Path) -> None:
    from ds4convert.checkpoint.folder import header_at

    sparse(tmp_path / "x.safetensors", 99_000_000, 100_000_000)
    with pytest.raises(HeaderError, match="the header is not JSON text"):
        header_at(tmp_path / "x.safetensors")
