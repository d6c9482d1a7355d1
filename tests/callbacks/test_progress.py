"""The progress bar of the command line."""

import io
import pickle
import re

import pytest
from rich.console import Console

from lsoftmax_lightning.callbacks import RunProgress
from lsoftmax_lightning.callbacks import progress as module

from ..helpers.training import BlobsDataModule, make_model, make_trainer


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns."""
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: True, raising=False)
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(module, "get_console", lambda: console)
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0)
    return file


def frames(file: io.StringIO) -> list[str]:
    """Each state of the line."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", file.getvalue())
    return [frame for frame in re.split(r"[\r\n]+", text) if frame.strip()]


def test_one_line_counts_the_steps_of_the_whole_run(terminal: io.StringIO) -> None:
    trainer = make_trainer(callbacks=[RunProgress()], enable_progress_bar=True, max_epochs=3)
    trainer.fit(make_model(), BlobsDataModule())
    lines = frames(terminal)
    steps = trainer.global_step
    assert all(f"/{steps} steps" in line for line in lines)
    assert {line.split()[0] for line in lines} <= {"Training", "Validating"}
    assert max(map(len, lines)) <= 80
    assert f"{steps}/{steps} steps" in lines[-1]
    assert re.search(r"val/\w+ [\d.]+", lines[-1])
    assert "left" not in lines[-1]


def test_evaluation_counts_batches_and_clears_the_line(terminal: io.StringIO) -> None:
    trainer = make_trainer(callbacks=[RunProgress()], enable_progress_bar=True)
    model, data = make_model(), BlobsDataModule()
    for run, name in ((trainer.validate, "Validating"), (trainer.test, "Testing")):
        terminal.seek(terminal.truncate(0))
        run(model, data, verbose=False)
        lines = frames(terminal)
        assert {line.split()[0] for line in lines} == {name}
        total = re.search(r"(\d+)/(\d+) batches", lines[-1])
        assert total is not None
        assert total[1] == total[2]
        assert terminal.getvalue().endswith("\x1b[2K")


def test_steps_of_a_run_of_unknown_length_are_counted(terminal: io.StringIO) -> None:
    trainer = make_trainer(callbacks=[RunProgress()], enable_progress_bar=True, max_epochs=-1, max_time="00:00:00:01")
    trainer.fit(make_model(), BlobsDataModule())
    assert re.search(rf" {trainer.global_step} steps", frames(terminal)[-1])


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True}, {"force_jupyter": True}])
def test_nothing_is_shown_without_a_terminal(
    settings: dict[str, bool], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(**settings)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "get_console", lambda: console)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    trainer = make_trainer(callbacks=[RunProgress()], enable_progress_bar=True, max_epochs=1)
    trainer.fit(make_model(), BlobsDataModule())
    assert capsys.readouterr().out == ""


def test_error_restores_the_cursor(terminal: io.StringIO) -> None:
    class Fails(BlobsDataModule):
        def on_after_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
            raise RuntimeError("no batch")

    bar = RunProgress()
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="no batch"):
        trainer.fit(make_model(), Fails())
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_progress_bar_is_picklable() -> None:
    assert isinstance(pickle.loads(pickle.dumps(RunProgress())), RunProgress)
