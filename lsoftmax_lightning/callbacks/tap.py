"""Features and logits of a step, read where they pass through the head, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HeadTap:
    """Keeps what the head of a module was last given, until the next time.

    A module without an :class:`~lsoftmax_lightning.LSoftmaxLinear` as its ``head`` gives nothing, with a warning.

    Args:
        pl_module: The module.
        owner: Who asks, for the warning.
    """

    def __init__(self, pl_module: Any, owner: str) -> None:
        self._last: tuple[Any, Tensor, Tensor | None] | None = None
        self._handle: RemovableHandle | None = None
        head: Any = getattr(pl_module, "head", None)
        if hasattr(head, "apply_margin"):
            self._handle = head.register_forward_hook(self._keep, with_kwargs=True)
        else:
            rank_zero_warn(f"{owner} shows nothing: {type(pl_module).__name__} has no LSoftmaxLinear as its `head`.")

    def _keep(self, head: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        given = [*args, *kwargs.values()]
        plain = len(given) == 1  # with a target the output carries the margin
        self._last = head, given[0].detach(), output.detach() if plain else None

    def take(self, batch: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Features [N, D], plain logits [N, C] and classes [N] of the batch that has just been through the module.

        Nothing where the head was not called, or the batch is not (images, classes, ...) of as many rows.
        """
        last, self._last = self._last, None
        if last is None or not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
            return None
        head, features, logits = last
        if batch[1].shape != features.shape[:1]:
            return None
        if logits is None:
            logits = F.linear(features, head.weight.detach().to(features.dtype))
        return features, logits, batch[1].long()

    @property
    def attached(self) -> bool:
        """Whether there is a head."""
        return self._handle is not None

    def remove(self) -> None:
        """Leaves the head alone."""
        if self._handle is not None:
            self._handle.remove()
