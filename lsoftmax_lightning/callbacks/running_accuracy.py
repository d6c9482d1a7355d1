"""Exponential mean of the training accuracy, read without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..heads import HeadCall, LSoftmaxLinear

_DELAY = 2
"""Optimiser steps between a count and its use; by then an accelerator has copied the count to the host."""
_EMPTY_STEPS = 10
"""Optimiser steps without a sample after which the head is assumed to be called in a way that cannot be counted."""


class RunningAccuracy:
    """Exponential mean, over optimiser steps, of the accuracy of a head's training logits.

    Samples of all forward passes and of all ranks are counted between two optimiser steps, so gradient accumulation and
    DDP do not change the mean, and it is the same on every rank. Counts reach the host by an asynchronous copy and
    enter the mean two steps later on every device.

    Args:
        decay: Decay of the mean per optimiser step, from 0 to below 1.

    Attributes:
        value: The mean, 0 before the first step.

    Raises:
        InputError: If ``decay`` is out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"accuracy_decay: must be at least 0 and below 1, got {decay}; the usual value is 0.95.")
        self.decay = decay
        self.value = 0.0
        self._empty_steps = 0
        self._device = torch.device("cpu")
        self._correct: list[Tensor] = []  # correct samples of each batch of the current step, on the device
        self._total = 0  # number of samples in these batches
        self._pending: deque[tuple[Tensor, torch.Event | None]] = deque()
        self._hook: RemovableHandle | None = None

    def attach(self, head: LSoftmaxLinear, device: torch.device) -> None:
        """Start counting the training batches of a head.

        Args:
            head: The head.
            device: Device of its logits.
        """
        self.detach()
        self._device = device
        self._hook = head.observed.register_forward_hook(self._forward_hook)

    def detach(self) -> None:
        """Stop counting."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _forward_hook(self, observed: nn.Module, args: tuple[HeadCall], call: HeadCall) -> None:
        if call.target is None or not torch.is_grad_enabled():
            return
        correct = call.correct
        if call.margin_logits is not None:
            correct = call.margin_logits.argmax(dim=1) == call.target
        assert correct is not None
        self._correct.append(correct.sum())
        self._total += len(call.target)

    def end_step(self) -> None:
        """Queue the counts of an optimiser step; call it on every rank."""
        first, *rest = self._correct or [torch.zeros((), dtype=torch.int64, device=self._device)]
        counts = torch.stack([sum(rest, first), torch.full_like(first, self._total)])
        self._correct, self._total = [], 0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        copy = counts.to("cpu", non_blocking=True)
        copied = None
        if counts.device.type != "cpu":
            copied = torch.Event(counts.device)
            copied.record()
        self._pending.append((copy, copied))

    def update(self) -> float:
        """Return the mean for the next optimiser step.

        Raises:
            InputError: If no sample was counted in the first ten steps.
        """
        while len(self._pending) > _DELAY:
            correct, total = _wait(*self._pending.popleft())
            if total:
                self.value += (1 - self.decay) * (correct / total - self.value)
                self._empty_steps = -1
            elif self._empty_steps >= 0:
                self._empty_steps += 1
        if self._empty_steps == _EMPTY_STEPS:
            raise InputError(
                "lambda_schedule: needs the training accuracy, but the head was called without a target; call "
                "self.head(x, target) or self.head.cross_entropy(x, target) in training_step, or use a schedule of the "
                "step such as RunFraction."
            )
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the queued counts, as plain values."""
        return {"value": self.value, "pending": [_wait(*pending) for pending in self._pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the mean and the queued counts.

        Args:
            state: Result of :meth:`state_dict`.
        """
        self.value = state["value"]
        self._pending = deque((torch.tensor(counts), None) for counts in state["pending"])


def _wait(copy: Tensor, copied: torch.Event | None) -> list[int]:
    """Return counts once they have reached the host."""
    if copied is not None:
        copied.synchronize()
    counts: list[int] = copy.tolist()
    return counts
