"""Settings and fixtures of all tests."""

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from lsoftmax_lightning.signals import SignalHandler

# tests run in parallel, one core each, like the programs that they start
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# After torch.export, the first backward of a process starts threads that a fork cannot use; an earlier one does not.
torch.ones((), requires_grad=True).backward()
# Lightning calls functions that jsonargparse 5 removes; the dependency excludes that version
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


def _on_one_stack(test: Callable[[], None]) -> None:
    """Run a test on one piece of Python's stack.

    Since version 3.11, Python maps the next 16 KiB of its stack when a call needs it, and unmaps it when the call
    returns. Where loops cross this boundary, this takes a seventh of the time of a test.
    """
    test()


# a large frame gets a piece of its size, and the calls within it fill the rest of it
_on_one_stack.__code__ = _on_one_stack.__code__.replace(co_stacksize=2**16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each test on one piece of the stack; skip GPU tests on machines without one."""
    for item in items:
        item.runtest = partial(_on_one_stack, item.runtest)  # type: ignore[method-assign]
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session", autouse=True)
def _imports_without_garbage_collection() -> None:
    """Leave imported objects out of garbage collection, which takes a seventh of the time and copies them in forks."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a temporary folder, without waiting for the disk, and restore signals and the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(SignalHandler, "latest", -1.0)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture(autouse=True)
def _blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures blank and small in tests without the marker `draws`, because drawing takes most of the time."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(Figure, "draw", lambda figure, renderer: None)
        monkeypatch.setattr("lsoftmax_lightning.dashboard.plots.DPI", 10)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the loss in chunks, however few logits there are."""
    monkeypatch.setattr("lsoftmax_lightning.chunked_loss.CHUNK_LOGITS", 0)
