"""Exit of a run that a signal stops outside of training."""

from __future__ import annotations

import atexit
import signal
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ..compat import signal_launched_ranks, trains_in_other_processes
from ..process_group import leave_process_group
from ..signals import SignalHandler, stop

EXIT_SECONDS = 15  # time for loggers and other callbacks to finish


class ExitOnSignals(Callback):
    """End all ranks of a run when one of them receives a signal outside of training.

    Lightning ends a sanity check, a validation or a test with exit code 0, ignores SIGTERM while it predicts, and waits
    for the other ranks inside its handler. In training, :class:`~lsoftmax_lightning.callbacks.LastCheckpoint` saves
    first.

    Raises:
        SystemExit: After a signal, with code 130 (SIGINT) or 143 (SIGTERM).
    """

    _handler: SignalHandler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Handle signals while data and checkpoint are read."""
        if trains_in_other_processes(trainer):  # the main process leaves the group elsewhere
            atexit.register(leave_process_group)
        self._stop_if_received()
        self._handler = SignalHandler(partial(_stop_all_ranks, trainer))
        self._handler.install()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handler that Lightning or LastCheckpoint has just installed."""
        self._stop_if_received()
        if self._handler is not None:
            self._handler.install()

    on_train_start = on_train_end = on_test_start = on_predict_start = on_sanity_check_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handler of Lightning, unless the validation is part of training."""
        if trainer.state.fn != "fit":
            self.on_sanity_check_start(trainer, pl_module)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Stop now if Python ignored the exception of the handler."""
        self._stop_if_received()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _stop_if_received(self) -> None:
        """Stop if a signal arrived in a destructor or a weakref callback, where Python ignores exceptions."""
        if self._handler is not None and self._handler.received is not None:
            stop(self._handler.received, EXIT_SECONDS)


def _stop_all_ranks(trainer: Trainer, signum: signal.Signals) -> None:
    signal_launched_ranks(trainer, signum)
    stop(signum, EXIT_SECONDS)
