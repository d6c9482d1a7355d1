"""Exponential mean of the training accuracy, read without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DELAY = 2
"""Optimiser steps between a count and its use, in which an accelerator finishes the copy to the host."""


class RunningAccuracy:
    """Exponential mean, over optimiser steps, of the accuracy of a head's training logits.

    Samples of all forward passes and of all ranks are counted between two optimiser steps, so gradient accumulation and
    DDP do not change the mean, and it is the same on every rank. Counts reach the host by an asynchronous copy and
    enter the mean two steps later, on every device alike.

    Args:
        decay: Decay of the mean per optimiser step, from 0 to below 1.
        device: Device of the logits.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.value = 0.0
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # correct samples, samples
        self._pending: deque[tuple[Tensor, torch.Event | None]] = deque()

    def forward_hook(self, head: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Counts a training batch; register it with ``head.register_forward_hook(hook, with_kwargs=True)``."""
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if target is None or not torch.is_grad_enabled():
            return
        if hasattr(output, "correct"):  # the chunked loss, which holds no logits
            correct = output.correct
        else:
            logits = output[0] if isinstance(output, tuple) else output
            correct = logits.argmax(dim=1) == target
        self._counts[0] += correct.sum()
        self._counts[1] += len(target)

    def end_step(self) -> None:
        """Adds the counts of an optimiser step; call it on every rank."""
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        copy = counts.to("cpu", non_blocking=True)
        copied = None
        if counts.device.type != "cpu":
            copied = torch.Event(counts.device)
            copied.record()
        self._pending.append((copy, copied))

    def update(self) -> float:
        """Returns the mean for the next optimiser step."""
        while len(self._pending) > _DELAY:
            correct, total = _wait(*self._pending.popleft())
            if total:
                self.value += (1 - self.decay) * (correct / total - self.value)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Mean and pending counts, as plain values."""
        return {"value": self.value, "pending": [_wait(*pending) for pending in self._pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the mean and the pending counts."""
        self.value = state["value"]
        self._pending = deque((torch.tensor(counts), None) for counts in state["pending"])


def _wait(copy: Tensor, copied: torch.Event | None) -> list[int]:
    """Returns counts once they have reached the host."""
    if copied is not None:
        copied.synchronize()
    counts: list[int] = copy.tolist()
    return counts
