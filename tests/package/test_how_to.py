"""The files of docs/how-to do what they say: run as a scheduler runs them, or with the real program's own help."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import support_run as s

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
WORDS = "--recipe q4 --max-shard-size 1MB"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("how-to") / "source")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    s.run(source, out, recipe="q4", max_shard_bytes=1_000_000)
    return s.contents(out)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder of programs: ds4convert itself, and stand-ins that run on this machine what they are asked to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "ds4convert", f'exec "{sys.executable}" -m ds4convert "$@"')
    script(folder / "ssh", 'shift; exec bash -c "$*"')
    # As sbatch does: each task of an array has its number in the environment, a plain job has none; the id is printed.
    script(
        folder / "sbatch",
        'for w; do case "$w" in --array=1-*) n=${w#--array=1-};; esac; last=$w; done\n'
        "export SLURM_JOB_ID=7\n"
        'if [ -n "${n:-}" ]; then for i in $(seq $n); do SLURM_ARRAY_TASK_ID=$i bash "$last" >&2; done; echo 7; else bash "$last"; fi',
    )
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(name: str, programs: Path, **values: str | Path) -> subprocess.CompletedProcess[str]:
    env = s.environment() | {k: str(v) for k, v in values.items()}
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    return subprocess.run(["bash", HOW_TO / name], env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["slurm.sh", "two-macs.sh"])
def test_a_script_leaves_the_folder_of_a_single_run(
    source: Path, whole: dict[str, str], programs: Path, name: str, tmp_path: Path
) -> None:
    done = run(name, programs, SRC=source, OUT=tmp_path / "out", OPTIONS=WORDS, PARTS="3", OTHER="studio")
    assert done.returncode == 0, done.stderr
    assert "part 2/" in done.stdout + done.stderr
    assert s.contents(tmp_path / "out") == whole


def test_two_macs_of_other_versions_do_not_begin(source: Path, programs: Path, tmp_path: Path) -> None:
    script(programs / "ssh", "echo ds4convert, version 9")
    done = run("two-macs.sh", programs, SRC=source, OUT=tmp_path / "out", OTHER="studio")
    assert done.returncode == 2 and "version 9" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(HOW_TO.glob("*.sh")), ids=lambda p: p.name)
def test_a_script_is_bash_and_says_what_it_needs(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    done = subprocess.run(["bash", path], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and re.search(r"[A-Z]+: ", done.stderr)


def test_the_jobs_of_kubernetes_divide_by_their_number_of_completions() -> None:
    parts, end = yaml.safe_load_all((HOW_TO / "kubernetes.yaml").read_text())
    (command,) = parts["spec"]["template"]["spec"]["containers"][0]["args"]
    assert parts["spec"]["completionMode"] == "Indexed"
    assert command.endswith(f'"$((JOB_COMPLETION_INDEX + 1))/{parts["spec"]["completions"]}"')
    (ending,) = end["spec"]["template"]["spec"]["containers"][0]["args"]
    assert command.partition(" --part")[0] == ending
    assert [volume["name"] for volume in end["spec"]["template"]["spec"]["volumes"]] == ["shared"]


def test_the_options_of_hf_jobs_are_those_of_the_hub_client_that_is_installed() -> None:
    hf = shutil.which("hf", path=str(Path(sys.executable).parent)) or shutil.which("hf")
    assert hf is not None, "huggingface_hub brings the program hf"
    told = subprocess.run([hf, "jobs", "run", "--help"], capture_output=True, text=True, timeout=120).stdout
    text = (HOW_TO / "hf-jobs.sh").read_text()
    used = set(re.findall(r"--[a-z-]+", text[text.index("hf jobs run") : text.index('ds4convert quantize "$SRC"')]))
    assert {"--detach", "--flavor", "--timeout", "--secrets"} <= used
    assert not {word for word in used if word not in told}


def test_hf_jobs_asks_for_one_job_a_part_and_then_for_the_end(programs: Path, tmp_path: Path) -> None:
    script(programs / "hf", f'printf "%s\\n" "$*" >> "{tmp_path}/asked"')
    given = {"IMAGE": "image", "BUCKET": "me/work", "SRC": "hf://a/b", "NAME": "q2", "OPTIONS": "--recipe q2"}
    assert run("hf-jobs.sh", programs, PARTS="3", **given).returncode == 0
    assert run("hf-jobs.sh", programs, END="1", **given).returncode == 0
    lines = (tmp_path / "asked").read_text().splitlines()
    assert [line.rpartition("ds4convert ")[2] for line in lines] == [
        *(f"quantize hf://a/b /shared/q2 --recipe q2 --part {n}/3" for n in (1, 2, 3)),
        "quantize hf://a/b /shared/q2 --recipe q2",
    ]


def test_the_commands_of_the_page_are_those_that_plan_prints(source: Path) -> None:
    page = (HOW_TO / "several-machines.md").read_text()
    part = next(line for line in page.splitlines() if "--part 3/8" in line)
    told = json.loads(s.cli("plan", source, "--recipe", "q2", "--out", "/tmp", "--parts", "8", "--json").stdout)[
        "commands"
    ]
    assert part.replace("DeepSeek-V4-Pro", str(source)).replace("/shared/pro-q2", "/tmp") in told
