"""Options and fixtures of the whole suite, and what makes one run like the other: environment, seeds, room on disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

from ds4convert.checkpoint import advice
from tests import places, sharing, support
from tests.fast import is_fast

ENDING_SECONDS = 10
"""How long a process may take to end that a test has told to."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well")
    parser.addoption("--seed", type=int, default=0, help="where random numbers start that have no seed of their own")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: libraries read some variables while they are imported."""
    config.pluginmanager.register(sharing)  # a conftest is not asked about fixtures of the whole session
    choose_examples(nightly=config.getoption("--nightly"))
    if not config.option.basetemp and (folder := places.in_memory()):  # of workers it is that of the run
        places.use(folder)
        config.add_cleanup(lambda: places.give_back(folder))
    if getattr(config.option, "numprocesses", None):
        return  # the workers run the tests, and begin with this process's environment
    hear_signals()
    home = Path(tempfile.mkdtemp(prefix="ds4convert-hf-"))
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    support.clean(os.environ, home)


def choose_examples(nightly: bool) -> None:
    """Have hypothesis try the same examples on every change, and others every night; no example has to be quick."""
    always = {"print_blob": True, "deadline": None, "database": None}
    settings.register_profile("change", derandomize=True, **always)
    settings.register_profile("nightly", max_examples=1000, **always)
    settings.load_profile("nightly" if nightly else "change")


def hear_signals() -> None:
    """Let signals arrive in the processes that tests start, also where this run is to ignore them (`nohup`, `&`).

    Children inherit what is ignored, but not a handler: so this run goes on not to mind, by a function.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            with suppress(ValueError):  # only the main thread may
                signal.signal(number, lambda *_: None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, do not even import the files that have none."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if config.option.markexpr == "fast" and is_test and not is_fast(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="only with --nightly")
    left_out = not_sampled(items)
    for item in items:
        if item.get_closest_marker("nightly") or item in left_out:
            if not config.getoption("--nightly"):
                item.add_marker(skip)
        elif is_fast(item.path) and not item.get_closest_marker("slow"):
            item.add_marker("fast")


def not_sampled(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the cases that are for the night of tests marked `sampled(n)`: all but n of them, from all over the list."""
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("nightly"):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    out: set[pytest.Item] = set()
    for cases in by_test.values():
        marker = cases[0].get_closest_marker("sampled")
        assert marker is not None
        kept = {round(n * (len(cases) - 1) / max(marker.args[0] - 1, 1)) for n in range(marker.args[0])}
        out.update(case for number, case in enumerate(cases) if number not in kept)
    return out


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Every test begins with the environment that `support.clean` left, whatever the test before did to it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name != "PYTEST_CURRENT_TEST" and os.environ.get(name) != before.get(name):  # pytest's own changes meanwhile
            os.environ.pop(name, None)
            os.environ.update({n: v for n, v in before.items() if n == name})


@pytest.fixture(autouse=True)
def no_command() -> Iterator[None]:
    """Every test begins outside of a command: a test that parses a command line leaves the names of its options."""
    token = advice.OPTIONS.set(None)
    yield
    with suppress(ValueError):  # set in another context: it goes with that
        advice.OPTIONS.reset(token)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A test ends what it starts, however it ends: a server left alone would hold its memory and its port all along."""
    before = support.children()
    yield
    until = time.monotonic() + ENDING_SECONDS
    while (left := support.children() - before - sharing.PROCESSES) and time.monotonic() < until:
        time.sleep(0.02)
    told = [support.command_of(pid) for pid in left]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not told, f"processes were left behind: {told}"


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> None:
    """Every test begins with the same random numbers; MLX would begin with the time of day."""
    seed = request.config.getoption("--seed")
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].random.seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Say with every failure how to meet it again."""
    report = yield
    if report.failed:
        how = f"pytest {'--nightly ' * item.config.getoption('--nightly')}--seed {item.config.getoption('--seed')}"
        report.sections.append(("To repeat it, random numbers included", f"{how} '{item.nodeid}'"))
    return report


@pytest.fixture(scope="session")
def mini_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint in the official format, shared by many tests: read only, copy it to change it."""
    return support.write_synth(tmp_path_factory.mktemp("mini") / "source", support.mini_config())


@pytest.fixture
def source(mini_source: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the small checkpoint that a test may damage."""
    yield support.copy_folder(mini_source, tmp_path / "source")
