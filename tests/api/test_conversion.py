"""`plan` and `convert` from Python: what they take, what they tell on the way, and how they go on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import ds4convert as ds4
from ds4convert.api import values
from ds4convert.api.conversion_options import ConversionOptions
from ds4convert.api.reporting import Message, Progress
from ds4convert.errors import UsageError
from tests import support


class Stopped(Exception):
    pass


def test_progress_counts_every_byte_from_one_thread_at_a_time(mini_source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    inside = threading.Lock()

    def progress(now: Progress) -> None:
        assert inside.acquire(blocking=False), "called from two threads at once"
        seen.append(now)
        inside.release()

    made = ds4.plan(mini_source)
    ds4.convert(made, tmp_path / "out", jobs=4, progress=progress)
    assert {p.what for p in seen} == {"converting"} and {p.total for p in seen} == {made.output_bytes}
    assert seen[0].done == 0 and [p.done for p in seen] == sorted(p.done for p in seen)
    assert [p.finished for p in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].done == made.output_bytes and any(0 < p.done < p.total for p in seen)


def test_verifying_never_counts_more_than_it_said_there_was(mini_source: Path, tmp_path: Path) -> None:
    ds4.convert(mini_source, tmp_path / "out", layout="universal")
    for source in (None, mini_source):
        told: list[Progress] = []
        assert ds4.verify(tmp_path / "out", source=source, progress=told.append).ok
        assert told and all(p.total is not None and 0 <= p.done <= p.total for p in told) and told[-1].finished


def test_what_progress_raises_ends_a_run_that_the_next_call_finishes(mini_source: Path, tmp_path: Path) -> None:
    def progress(now: Progress) -> None:
        if now.done > now.total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        ds4.convert(mini_source, tmp_path / "out", jobs=1, progress=progress)
    assert not (tmp_path / "out" / "ds4convert_manifest.json").exists()
    done = ds4.convert(mini_source, tmp_path / "out", jobs=1)
    assert done.resumed and not done.already_done and ds4.verify(done.folder, source=mini_source).ok


def test_warnings_notes_and_details_are_told_and_print_as_text(mini_source: Path, tmp_path: Path) -> None:
    told: list[Message] = []
    ds4.convert(mini_source, tmp_path / "out", mtp="affine-4-g32", say=told.append)
    warned = [str(m) for m in told if m.kind == "warning"]
    assert warned and all(w.startswith("Warning: ") for w in warned) and "the head is written as" in warned[0]
    assert any(m.kind == "detail" and str(m).startswith("plan ") for m in told)


def test_an_option_that_this_call_has_no_use_for_is_warned_of(mini_source: Path, tmp_path: Path) -> None:
    told: list[str] = []
    ds4.plan(mini_source, context=1024, say=lambda m: told.append(m.text))
    ds4.convert(mini_source, tmp_path / "out", window="9GB", say=lambda m: told.append(m.text))
    ds4.verify(tmp_path / "out", max_tokens=8, say=lambda m: told.append(m.text))
    assert any(t.startswith("--context has no effect here") for t in told)
    assert any(t.startswith("--window has no effect here") for t in told)
    assert any(t.startswith("--max-tokens has no effect here") for t in told)


def test_a_plan_is_carried_out_as_it_is_and_takes_no_other_options(mini_source: Path, tmp_path: Path) -> None:
    made = ds4.plan(mini_source, layout="mtplx")
    done = ds4.convert(made, tmp_path / "out", jobs=1)
    assert done.plan.id == made.id == ds4.plan(mini_source, layout="mtplx").id
    for options in ({"layout": "vlm"}, {"recipe": "q4"}, {"keep_mtp": False}):
        with pytest.raises(ds4.UsageError, match="plan was made with its options"):
            ds4.convert(made, tmp_path / "other", **options)  # type: ignore[arg-type]
    with pytest.raises(ds4.UsageError, match="config alone"):
        ds4.convert(ds4.plan(config="tiny"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_source_may_be_text_a_path_or_opened(mini_source: Path) -> None:
    opened = ds4.open(mini_source)
    assert (opened.family, opened.format, opened.head_kind) == ("deepseek_v4", "official", "classic")
    ids = {ds4.plan(place).id for place in (mini_source, str(mini_source), opened)}
    assert len(ids) == 1 and ds4.open(opened) is opened


def test_a_converted_folder_is_converted_again(mini_source: Path, tmp_path: Path) -> None:
    first = ds4.convert(mini_source, tmp_path / "a").folder
    again = ds4.convert(first, tmp_path / "b", from_mlx=True, recipe="bf16")
    assert again.as_json()["recipe"] == "bf16" and ds4.verify(again.folder).ok
    with pytest.raises(ds4.InputError):
        ds4.convert(first, tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"recipi": "q4"}, "did you mean recipe?"),
        ({"layout": "nowhere"}, "nowhere"),
        ({"recipe": "q9"}, "q9"),
        ({"mtp": "affine-4-g32", "keep_mtp": False}, "contradict"),
        ({"fit": "96"}, "which unit"),
        ({"fit": "100GB", "mac": "128GB"}, "one of them"),
        ({"mac": "Pro"}, "memory of a Mac"),
        ({"recipe": "fit"}, "what to fit into"),
        ({"recipe": "q4", "fit": "100GB"}, "no recipe"),
        ({"jobs": 0}, "1 to 64"),
        ({"jobs": "two"}, "expected int"),
        ({"jobs": True}, "expected int"),
        ({"keep_mtp": "no"}, "expected bool"),
        ({"rounding": "up"}, "optimal, nearest, or compensated"),
        ({"max_shard_size": "5 parsecs"}, "is not a size"),
        ({"max_shard_size": -1}, "--max-shard-size"),
        ({"calibration": "x", "rounding": "nearest"}, "no use for it"),
        ({"backbone": 4}, "--backbone"),
    ],
)
def test_bad_options_are_usage_errors_that_name_the_option(
    options: dict[str, object], part: str, mini_source: Path
) -> None:
    with pytest.raises(ds4.UsageError, match=part.replace("?", r"\?")) as found:
        ds4.plan(mini_source, **options)  # type: ignore[arg-type]
    assert found.value.exit_code == 2 and found.value.kind == "usage"


def test_a_record_and_keywords_go_together(mini_source: Path) -> None:
    record = ConversionOptions(recipe="bf16", layout="universal")
    made = ds4.plan(mini_source, record, layout="vlm")
    assert (made.options.recipe, made.options.layout) == ("bf16", "vlm") and record.layout == "universal"
    with pytest.raises(ds4.UsageError, match="expected ConversionOptions"):
        ds4.plan(mini_source, {"recipe": "q4"})  # type: ignore[arg-type]


def test_bad_input_raises_the_class_that_the_command_exits_with(
    mini_source: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ds4.InputError, match="no such file") as missing:
        ds4.open(tmp_path / "nothing")
    assert missing.value.file == str(tmp_path / "nothing")
    with pytest.raises(ds4.UsageError, match="SRC or --config"):
        ds4.plan()
    with pytest.raises(ds4.UsageError, match="one of"):
        ds4.convert(mini_source, tmp_path / "o", fit="1GB", mac="8GB")
    with pytest.raises(ds4.OutputError):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").touch()
        ds4.convert(mini_source, tmp_path / "full")
    support.edit_json(source / "config.json", lambda t: t.update(num_hidden_layers="four"))
    with pytest.raises(ds4.ConfigError) as wrong:
        ds4.plan(source)
    assert wrong.value.file == "config.json"


def test_a_path_object_is_never_a_repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ds4.InputError, match="no such file"):
        ds4.inspect(Path("owner/name"))


@pytest.mark.parametrize(
    ("given", "meant"), [(400_000, 400_000), ("400KB", 400_000), ("1MiB", 1 << 20), ("2000000", 2_000_000)]
)
def test_a_size_to_fit_into_is_a_number_of_bytes_or_a_text_with_its_unit(given: int | str, meant: int) -> None:
    assert values.fit_size(given) == meant


def test_compensated_rounding_is_not_divided(mini_source: Path, tmp_path: Path) -> None:
    """Each part would go through the model by itself, in the state folder of all."""
    text = tmp_path / "text.txt"
    text.write_text("In the beginning. " * 200)
    demo = support.ROOT / "manifests" / "demo"
    words = {"rounding": "compensated", "calibrate": text, "calibration_tokens": 64, "recipe": "q4"}
    with pytest.raises(UsageError, match="stays on one machine"):
        ds4.convert(demo, tmp_path / "out", part="1/2", **words)
    with pytest.raises(UsageError, match="stays on one machine"):
        ds4.plan(demo, **words).parts(2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["96", "96G", "400000", " 1.5 g"])
def test_a_size_that_does_not_say_its_unit_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="which unit"):
        values.fit_size(given)
