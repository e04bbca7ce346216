"""Every message of docs/troubleshooting.md is one that the program gives, with the exit code that the page tells.

Each heading of the page is a message with `...` for what differs; `CASES` has what brings it about.
"""

from __future__ import annotations

import fcntl
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest import mock

import pytest

from ds4convert.execution import run as execution_run
from tests import support, support_run
from tests.checkpoint.families import vision
from tests.package.site import pages
from tests.support import INDEX, ROOT, Result, edit_json, run, run_process

PAGE = "troubleshooting.md"
DEMO = ROOT / "manifests" / "demo"
SHARD = "model-00003-of-00007.safetensors"
FP8 = "layers.2.attn.wkv.weight"
Case = Callable[["Place"], Result]


class Place:
    """A folder with a small checkpoint to damage, and what is made of checkpoints on the way."""

    def __init__(self, here: Path, mini: Path) -> None:
        self.here, self.mini = here, mini

    @property
    def source(self) -> Path:
        """Return a copy of the small checkpoint, the same one each time."""
        path = self.here / "source"
        return path if path.exists() else support.copy_folder(self.mini, path)

    def converted(self, *words: object, source: Path | None = None) -> Path:
        out = self.here / "out"
        assert run("quantize", source or self.source, out, *words).code == 0
        return out


def damaged(change: Callable[[Path], object]) -> Case:
    def produce(place: Place) -> Result:
        change(place.source)
        return run("plan", place.source)

    return produce


def config(**changes: object) -> Case:
    return damaged(lambda folder: edit_json(folder / "config.json", lambda t: t.update(changes)))


def shard(text: str) -> Case:
    return damaged(lambda folder: (folder / SHARD).write_text(text))


def one_file(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors"))[1:]:
        path.unlink()
    next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")


def cut(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as file:
        file.truncate((folder / SHARD).stat().st_size - 10)


def without_a_norm(folder: Path) -> None:
    path = support.shard_with(folder, "mtp.0.hnorm.weight")
    tensors = support.read_file(path)
    del tensors["mtp.0.hnorm.weight"]
    support.write_file(path, tensors)
    edit_json(folder / INDEX, lambda t: t["weight_map"].pop("mtp.0.hnorm.weight"))


def nan(place: Place) -> Result:
    path = support.shard_with(place.source, FP8)
    raw = bytearray(path.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + support.header_of(path)[FP8]["data_offsets"][0]] = 0x7F
    path.write_bytes(raw)
    return run("quantize", place.source, place.here / "out")


def interrupted(place: Place) -> Path:
    assert support_run.killed_at(12, "quantize", place.source, place.here / "out")
    return place.here / "out"


def without_manifest(place: Place) -> Result:
    out = place.converted()
    (out / "ds4convert_manifest.json").unlink()
    return run("verify", out)


def altered(place: Place) -> Result:
    out = place.converted()
    edit_json(out / "config.json", lambda t: t.update(rope_theta=1))
    return run("verify", out)


def grafted(place: Place, seed: int | None, *words: str) -> Result:
    """Graft, into the conversion with these options, the head of a checkpoint of other values or of a headless folder."""
    out = place.converted(*words)
    donor = out if seed is None else support.write_synth(place.here / "donor", support.mini_config(), seed)
    return run("graft", out, "--from", donor, "--out", place.here / "grafted")


def has_one_already(place: Place) -> Result:
    dspark = ROOT / "tests" / "golden" / "dspark-a" / "checkpoint"
    return run("graft", place.converted(), "--from", dspark, "--in-place")


def no_head(place: Place, *words: object) -> Result:
    return run(words[0], place.converted("--drop-mtp", source=DEMO), *words[1:])


def full(place: Place) -> Result:
    with mock.patch.object(execution_run, "free_bytes", lambda _: 1000):
        return run("quantize", place.source, place.here / "out")


def held(place: Place) -> Result:
    state = place.here / "out" / ".ds4convert"
    state.mkdir(parents=True)
    with (state / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return run("quantize", place.source, place.here / "out")


def offline(place: Place) -> Result:
    return run_process("inspect", "hf://someone/something", variables={"HF_HUB_OFFLINE": "1"}, cwd=place.here)


class Refusing(BaseHTTPRequestHandler):
    """Answers 403 to everything."""

    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def server() -> Iterator[str]:
    made = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def refused(place: Place) -> Result:
    with server() as address:
        return run_process("inspect", "hf://someone/something", variables={"HF_ENDPOINT": address}, cwd=place.here)


def port_taken(place: Place) -> Result:
    out = place.converted(source=DEMO)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        return run("serve", out, "--port", other.getsockname()[1])


def with_keys(folder: Path) -> None:
    """A tensor of a tower beside a config of a text model."""
    support.write_file(folder / "tower.safetensors", {"vision.norm.weight": support.Tensor("BF16", [2], bytes(4))})
    edit_json(folder / INDEX, lambda t: t["weight_map"].update({"vision.norm.weight": "tower.safetensors"}))


def pruned_apart(folder: Path) -> None:
    """One layer has an expert less, and a row less in its router."""
    for path in folder.glob("*.safetensors"):
        kept = {}
        for name, t in support.read_file(path).items():
            if name.startswith("layers.2.ffn.experts.2."):
                continue
            if name in {"layers.2.ffn.gate.weight", "layers.2.ffn.gate.bias"}:
                t = support.Tensor(t.dtype, [2, *t.shape[1:]], t.data[: len(t.data) // 3 * 2])
            kept[name] = t
        support.write_file(path, kept)
    edit_json(
        folder / INDEX, lambda t: [t["weight_map"].pop(n) for n in list(t["weight_map"]) if ".2.ffn.experts.2." in n]
    )


def odd_scale(place: Place) -> Result:
    path = support.shard_with(place.source, FP8)
    tensors = support.read_file(path)
    scale = tensors[FP8.replace("weight", "scale")]
    scale.dtype, scale.data = "F32", struct.pack("<f", 0.3) * len(scale.data)
    support.write_file(path, tensors)
    return run("quantize", place.source, place.here / "out")


def with_a_tower(place: Place) -> Result:
    dspark = ROOT / "tests" / "golden" / "dspark-b" / "checkpoint"
    return run("plan", vision.with_tower(dspark, place.here / "vision"), "--layout", "mlx-lm")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 5000000000\n"
CASES: dict[str, tuple[int, Case]] = {
    "...: no such file or folder": (3, lambda p: run("inspect", p.here / "nowhere")),
    "holds no .safetensors file": (3, lambda p: run("inspect", p.here)),
    "the file is truncated, download it again": (3, damaged(cut)),
    "is a Git LFS pointer, not the file itself": (3, shard(LFS)),
    "is a web page (HTML: an error or a login), not the file itself": (3, shard("<!DOCTYPE html><html>Log in</html>")),
    "the file is missing; download it again": (3, damaged(lambda f: (f / SHARD).unlink())),
    "is stale: of the ... files that it names none is here": (3, damaged(one_file)),
    "model_type is ..., expected one of: ...": (
        3, config(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"]),
    ),
    "quantization_config is not the official FP8 one": (
        3, config(quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    ),
    "...: missing; expected ...": (3, damaged(without_a_norm)),
    "belong to a vision tower, which config.json does not describe": (3, damaged(with_keys)),
    "experts were pruned to different numbers": (3, damaged(pruned_apart)),
    "which is no power of two, so MLX's block scales (E8M0) cannot hold it without rounding": (3, odd_scale),
    "is NaN in FP8 E4M3": (3, nan),
    "is a converted folder, its values may be rounded already": (3, lambda p: run("plan", p.converted())),
    "source and output folder may not lie in each other": (
        3, lambda p: run("quantize", p.source, p.source / "out"),
    ),
    "is not empty (it holds ...); choose another folder": (
        3, lambda p: run("quantize", p.source, p.converted(), "--layout", "vlm"),
    ),
    "holds an unfinished conversion with other settings": (
        3, lambda p: run("quantize", p.source, interrupted(p), "--layout", "vlm"),
    ),
    "is unfinished; repeat the command that wrote it": (
        3, lambda p: run("generate", interrupted(p), "--prompt-ids", "1,2"),
    ),
    "not a converted folder; convert it first": (1, lambda p: run("verify", p.source)),
    "no ds4convert_manifest.json: another program wrote this folder, or its manifest was lost": (1, without_manifest),
    "altered since it was written": (1, altered),
    "No MTP head to draft with": (1, lambda p: no_head(p, "verify", "--mtp", "--max-tokens", "2")),
    "Warning: --mtp has no effect": (
        0, lambda p: no_head(p, "generate", "--mtp", "--prompt-ids", "1,2", "--max-tokens", "1"),
    ),
    "has no head to graft": (3, lambda p: grafted(p, None, "--drop-mtp")),
    "so its head is of another training run and would not fit": (3, lambda p: grafted(p, 5, "--drop-mtp")),
    "has a ... head already; take it out first": (3, has_one_already),
    "its hosts load no ... head": (
        3, lambda p: run("plan", ROOT / "tests" / "golden" / "dspark-a" / "checkpoint", "--layout", "mtplx"),
    ),
    "its hosts load the text model of ... alone": (3, with_a_tower),
    "no layout is called ...": (2, lambda p: run("plan", p.source, "--layout", "mlxlm")),
    "does not say which unit": (2, lambda p: run("plan", p.source, "--fit", "96")),
    "is too small for this model: in its smallest formats it needs ...": (
        2, lambda p: run("plan", "--config", "tiny", "--fit", "1MB"),
    ),
    "contradict each other": (2, lambda p: run("plan", p.source, "--mtp", "bf16", "--drop-mtp")),
    "more bytes, but this disk has ... free": (4, full),
    "another ds4convert is writing to this folder": (4, held),
    "offline mode is on (HF_HUB_OFFLINE)": (4, offline),
    "refused to answer (HTTP 403)": (4, refused),
    "cannot listen there: ...; choose another --port or --host": (4, port_taken),
}  # fmt: skip
SLOW = {"No MTP head to draft with"}


def messages() -> dict[str, str]:
    """Return every message of the page, with the heading of its section."""
    found, section = {}, ""
    for line in pages.text(PAGE).splitlines():
        if line.startswith("## "):
            section = line
        elif line.startswith("### "):
            found[line.removeprefix("### ").strip("`")] = section
    return found


def test_every_message_of_the_page_has_a_case_and_every_case_is_on_the_page() -> None:
    assert list(messages()) == list(CASES)


def test_the_sections_tell_the_exit_codes_of_their_messages() -> None:
    for message, section in messages().items():
        told = re.search(r"\(exit code ([^)]*)\)", section)
        code = CASES[message][0]
        assert told is not None, section
        if not message.startswith("Warning:"):  # the page says of this one that the exit code is 0
            assert str(code) in re.findall(r"\d", told[1]), message


@pytest.mark.parametrize(
    "message", [pytest.param(m, marks=[pytest.mark.slow, pytest.mark.nightly] if m in SLOW else []) for m in CASES]
)
def test_a_message_of_the_page_is_given_by_the_program(message: str, mini_source: Path, tmp_path: Path) -> None:
    code, produce = CASES[message]
    done = produce(Place(tmp_path, mini_source))
    pattern = ".+".join(re.escape(part) for part in message.split("...")).removeprefix(".+")
    assert re.search(pattern, done.out + done.err), (message, done)
    assert done.code == code and "Traceback" not in done.err


def test_an_error_document_has_the_keys_that_the_page_on_json_tells(source: Path) -> None:
    (source / SHARD).unlink()
    told = re.findall(r"`error\.(\w+)`", pages.text("json.md"))
    assert set(told) == set(json.loads(run("plan", source, "--json").out)["error"])
