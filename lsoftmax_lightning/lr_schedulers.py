"""Learning rate schedulers whose milestones scale with the length of the run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from .compat import ClosedFormLR
from .errors import InputError


class FractionalMultiStepLR(ClosedFormLR):
    """Decay the learning rate by ``gamma`` at fractions of the run.

    After n >= 1 calls of :meth:`step` the learning rate is ``lr * gamma ** k``, where k is the number of milestones m
    with ``n >= round(m * total_steps)``. The scheduler is :class:`torch.optim.lr_scheduler.MultiStepLR` with milestones
    that follow the length of the run, and it can be chained with other schedulers in the same way.

    The modules of this package set ``total_steps`` to the number of optimizer steps of the Trainer's run, which
    accounts for gradient accumulation, so the scheduler must be stepped once per optimizer step. A wrapper such as
    :class:`torch.optim.lr_scheduler.ChainedScheduler` and a training loop without a Trainer need ``total_steps`` as an
    argument.

    The state dict contains the milestones and ``gamma``, but not ``total_steps``. Under the modules of this
    package, a run that is resumed with another length continues with the learning rate that a run of the new length has
    at this step. The state of a ``MultiStepLR`` is accepted; the milestones of this scheduler replace its milestones.

    Args:
        optimizer: Wrapped optimizer.
        milestones: Increasing fractions of the run, above 0 and below 1. Each is rounded to the nearest step, so
            write as many digits as the run needs: ``0.66667`` of 18,000 steps is step 12,000.
        gamma: Factor of each decay, above 0 and at most 1.
        total_steps: Length of the run in steps. By default the length of the Trainer's run.
        last_epoch: Index of the last step, -1 at the start of a run.

    Attributes:
        follows_run: Whether the module sets ``total_steps`` at the start of each training loop; the loops of tuners
            are shorter than the run.

    Raises:
        InputError: If an argument is out of range, or ``total_steps`` is unknown when the first step is taken.

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.lr_schedulers import FractionalMultiStepLR
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
        >>> scheduler = FractionalMultiStepLR(optimizer, [0.5, 0.75], total_steps=800)  # a loop without a Trainer
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[float],
        gamma: float = 0.1,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        bounds = [0, *milestones, 1]
        if not all(lower < upper for lower, upper in pairwise(bounds)):
            raise InputError(
                "milestones: must be increasing fractions of the run, above 0 and below 1, got "
                f"{list(milestones)}; divide steps by the length of the run, or use "
                "torch.optim.lr_scheduler.MultiStepLR for milestones in steps."
            )
        if not 0 < gamma <= 1:
            raise InputError(f"gamma: must be above 0 and at most 1, got {gamma}; the usual value is 0.1.")
        self.milestones = [float(milestone) for milestone in milestones]
        self.gamma = gamma
        self.total_steps = None if total_steps is None else _check_total_steps(total_steps)
        self.follows_run = total_steps is None
        self._num_decays = self._count_milestones(last_epoch)  # decays that the learning rate already contains
        super().__init__(optimizer, last_epoch)

    def set_total_steps(self, total_steps: float) -> None:
        """Set the length of the run, and the learning rate of the current step accordingly.

        Args:
            total_steps: Length of the run in steps.

        Raises:
            InputError: If it is not a finite number of at least 1, as for a run without an end.
        """
        self.total_steps = _check_total_steps(total_steps)
        if self._count_milestones(self.last_epoch) == self._num_decays:
            return
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._num_decays = self._count_milestones(self.last_epoch)
        self.set_last_lr(self.get_lr())

    def step(self, epoch: int | None = None) -> None:
        """Step the scheduler, once after each step of the optimizer.

        Args:
            epoch: As in :class:`torch.optim.lr_scheduler.LRScheduler`, where it is deprecated.
        """
        super().step(epoch)
        self._num_decays = self._count_milestones(self.last_epoch)

    def get_lr(self) -> list[Any]:
        """Compute the learning rate of each parameter group from its current value."""
        factor = self.gamma ** (self._count_milestones(self.last_epoch) - self._num_decays)
        return [group["lr"] * factor for group in self.optimizer.param_groups]

    @override
    def get_closed_form_lr(self) -> list[Any]:
        factor = self.gamma ** self._count_milestones(self.last_epoch)
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scheduler, without the length of the run."""
        return {key: value for key, value in super().state_dict().items() if key not in ("total_steps", "follows_run")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the scheduler, or that of a ``MultiStepLR``.

        Args:
            state_dict: Result of :meth:`state_dict`.

        Raises:
            InputError: If it is the state of another class.
        """
        state = dict(state_dict)
        if isinstance(state.get("milestones"), Counter):
            steps = state.pop("milestones").elements()
            state["_num_decays"] = sum(step <= state["last_epoch"] for step in steps)
        if "_num_decays" not in state:
            raise InputError(
                "lr_scheduler: the checkpoint must contain the state of a FractionalMultiStepLR, got the keys "
                f"{sorted(state)}; resume with the lr_scheduler that the run began with."
            )
        super().load_state_dict(state)

    def _count_milestones(self, step: int) -> int:
        """Count the milestones at or before a step; step 0, which precedes all, needs no length of the run."""
        if step <= 0:
            return 0
        if self.total_steps is None:
            raise InputError(
                "total_steps: must be set before the first step, got None; pass total_steps to FractionalMultiStepLR, "
                "or let a module of this package set it in on_train_start."
            )
        return sum(step >= round(milestone * self.total_steps) for milestone in self.milestones)


def _check_total_steps(total_steps: float) -> int:
    if not 1 <= total_steps < math.inf:
        raise InputError(
            f"total_steps: the length of the run must be known and at least 1 step, got {total_steps}; set the "
            "Trainer's max_steps, or max_epochs if the data have a length (max_time is not enough)."
        )
    return int(total_steps)
