"""Settings and fixtures of all tests."""

import gc
import os
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on machines without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session", autouse=True)
def _imports_without_garbage_collection() -> None:
    """Leave imported objects out of garbage collection, which takes a seventh of the time and copies them in forks."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a temporary folder, and restore seeds and signals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SignalHandler, "latest", -1.0)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture(autouse=True)
def _blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures blank in tests without the marker `draws`, because drawing takes most of the time."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(Figure, "draw", lambda figure, renderer: None)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the loss in chunks, however few logits there are."""
    monkeypatch.setattr("lsoftmax_lightning.chunked_loss.CHUNK_LOGITS", 0)
