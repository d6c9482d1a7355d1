"""The L-Softmax classifier as a module: ``logits = head(x)``, and ``head(x, target)`` while training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .functional import check_margin, margin_logits


class LSoftmaxLinear(nn.Module):
    """A linear classifier without bias whose training logits carry the large margin (Liu et al., ICML 2016).

    ``head(x)`` is ``F.linear(x, head.weight)``, bit for bit: use it to predict and to measure. ``head(x, target)``
    has the margin on each sample's own class: feed it to any cross-entropy. The state dict holds ``weight``
    [num_classes, in_features] and nothing else, as ``nn.Linear(bias=False)``.

    Args:
        in_features: D, the width of a feature.
        num_classes: C, at least 2.
        margin: m, an integer >= 1; 1 is plain softmax.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax). Anneal it by setting the
            attribute of the same name.
        device: Where the weight is made.
        dtype: Type of the weight.

    Raises:
        InputError: If a size, the margin or lambda is out of range.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from lsoftmax_lightning import LSoftmaxLinear
        >>> head = LSoftmaxLinear(in_features=64, num_classes=10, margin=4, lambda_=5.0)
        >>> features, target = torch.randn(8, 64), torch.randint(10, (8,))
        >>> loss = F.cross_entropy(head(features, target), target)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: int,
        lambda_: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("in_features", in_features, 1), ("num_classes", num_classes, 2)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}.")
        self.in_features = in_features
        self.num_classes = num_classes
        self.margin = check_margin(margin)
        # A plain tensor on the CPU: as an input of the graph it moves without a recompile, a GPU kernel takes it as a
        # number without a copy, and what averages, broadcasts, casts or saves buffers leaves it alone.
        self._lambda = torch.zeros((), dtype=torch.float64, device="cpu")
        self.lambda_ = lambda_
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew as the authors do (MSRA: normal with variance 2 / in_features)."""
        nn.init.kaiming_normal_(self.weight)

    @property
    def lambda_(self) -> float:
        """Weight of the plain logit beside the margin logit, 0 to infinity; set it as training goes."""
        return float(self._lambda)

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        if math.isnan(value) or value < 0:
            raise InputError(f"lambda must be 0 (the pure loss) to infinity (plain softmax), got {value}.")
        self._lambda.fill_(value)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Plain logits, or with a target the margin logits.

        Args:
            x: Features, [N, in_features].
            target: Class of each sample, [N], an integer type.

        Returns:
            Logits, [N, num_classes].

        Raises:
            InputError: If ``target`` does not fit ``x`` and ``num_classes``.
        """
        logits = F.linear(x, self.weight)
        return logits if target is None else self.apply_margin(logits, x, target)

    def apply_margin(self, logits: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """Puts the margin on logits that ``head(x)`` gave, for a caller who wants both from one product.

        Args:
            logits: ``head(x)``, [N, num_classes].
            x: Features, [N, in_features].
            target: Class of each sample, [N], an integer type.

        Returns:
            Margin logits, [N, num_classes].

        Raises:
            InputError: If ``target`` does not fit ``x`` and ``num_classes``.
        """
        return margin_logits(logits, x, self.weight, target, self.margin, self._lambda)

    def extra_repr(self) -> str:
        """Sizes, margin and the current lambda."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, margin={self.margin}, "
            f"lambda_={self.lambda_:g}"
        )
