"""The L-Softmax classifier as a module: ``logits = head(x)``, and ``head(x, target)`` while training."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .errors import InputError
from .functional import check_margin, margin_linear, margin_logits, plain_logits
from .losses import LEAN_FROM, ClassShard, LeanLoss, lean_cross_entropy, lsoftmax_cross_entropy


class LSoftmaxLinear(nn.Module):
    """A linear classifier without bias whose training logits carry the large margin (Liu et al., ICML 2016).

    ``head(x)`` is ``F.linear(x, head.weight)``, bit for bit: use it to predict and to measure. ``head(x, target)``
    has the margin on each sample's own class: feed it to any cross-entropy. Of many classes :meth:`cross_entropy` is
    faster and takes less memory. The state dict holds ``weight`` [num_classes, in_features] and nothing else, as
    ``nn.Linear(bias=False)``.

    Logits are computed in float32 and returned in float32, with autocast disabled and also for half-precision features
    or weight: the margin amplifies the rounding of the target logit by up to m^2. They are float64 if an input is
    float64.

    Args:
        in_features: D, the width of a feature.
        num_classes: C, at least 2.
        margin: m, an integer >= 1; 1 is plain softmax.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax). Anneal it by setting the
            attribute of the same name. None means 0; the first training step then warns, except while compiling.
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

    _warn_if_trained = False  # default for heads unpickled from an earlier release

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: int,
        lambda_: float | None = None,
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
        if lambda_ is not None:
            self.lambda_ = lambda_
        self._warn_if_trained = lambda_ is None
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self._gathered: Tensor | None = None
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
        self._warn_if_trained = False

    @property
    def sharded(self) -> bool:
        """Whether the weight is divided over processes by class."""
        return isinstance(self.weight, DTensor)

    @property
    def lean(self) -> bool:
        """Whether :meth:`cross_entropy` is to be preferred to margin logits: of many classes, or where it has to be."""
        return self.sharded or self.num_classes >= LEAN_FROM

    def shard(self, mesh: DeviceMesh) -> None:
        """Divides the weight over processes by class: each keeps a run of classes, and may be left with none.

        The weight becomes a DTensor, which optimisers, clipping and checkpoints know. Train by :meth:`cross_entropy`.

        Args:
            mesh: Of one dimension; the weight is the same on all its processes.
        """
        each = math.ceil(self.num_classes / mesh.size())  # as DTensor has it
        own = self.weight.detach()[each * mesh.get_local_rank() :][:each].to(mesh.device_type, copy=True)
        shape, stride = self.weight.shape, self.weight.stride()
        whole = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        self.weight = nn.Parameter(whole, requires_grad=self.weight.requires_grad)

    def forward(
        self,
        x: Tensor,
        target: Tensor | None = None,
        with_plain: bool = False,
        label_smoothing: float | None = None,
    ) -> Any:
        """Plain logits, or with a target the margin logits.

        Args:
            x: Features, [N, in_features].
            target: Class of each sample, [N], an integer type.
            with_plain: Asks for margin logits and plain ones, in a pair.
            label_smoothing: Asks for :meth:`cross_entropy`, which comes here so that hooks hear of it.

        Returns:
            Logits, [N, num_classes].

        Raises:
            InputError: If ``target`` does not fit ``x`` and ``num_classes``, or the head is sharded and to be trained.
        """
        if target is not None:  # the level is that of the caller of head(...), or of head.cross_entropy(...)
            self._check_lambda(stacklevel=5 if label_smoothing is None else 6)
        if label_smoothing is not None:
            self._gathered = None  # the weight is about to move
            own, shard = self._own()
            return lean_cross_entropy(x, own, target, self.margin, self._lambda, label_smoothing, shard)
        if target is None:
            return plain_logits(x, self.full_weight)
        logits = margin_linear(x, self.full_weight, target, self.margin, self._lambda)
        return logits if with_plain else logits[0]

    def cross_entropy(self, x: Tensor, target: Tensor, label_smoothing: float = 0.0) -> LeanLoss:
        """The loss of the margin logits and the predictions of the plain ones, without holding either.

        See :func:`~lsoftmax_lightning.losses.lean_cross_entropy`. Where the head is sharded, each process gives its own
        samples, as many as the others.

        Args:
            x: Features, [N, in_features].
            target: Class of each sample, [N], an integer type.
            label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.

        Raises:
            InputError: If ``target`` does not fit ``x`` and ``num_classes``.
        """
        loss: LeanLoss = self(x, target, label_smoothing=label_smoothing)
        return loss

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
        self._check_lambda(stacklevel=3)
        return margin_logits(logits, x, self.full_weight, target, self.margin, self._lambda)

    def _check_lambda(self, stacklevel: int) -> None:
        """Warns once if the head trains with a margin and lambda was never set."""
        if torch.compiler.is_compiling():  # no graph break, and no guard on the flag
            return
        if self._warn_if_trained and self.margin > 1 and self.training and torch.is_grad_enabled():
            self._warn_if_trained = False
            warnings.warn(
                f"lambda_: not set, so training starts with the full margin {self.margin}, which often costs accuracy; "
                "add LambdaAnnealing() to the callbacks of the Lightning Trainer, or set head.lambda_ before each step "
                "of your own loop. To train with the full margin on purpose, pass lambda_=0.0.",
                stacklevel=stacklevel,
            )

    @property
    def full_weight(self) -> Tensor:
        """W, [num_classes, in_features]; of a sharded head a copy, for no training.

        To be asked for on all processes at once. The copy is kept until the next step of training or :meth:`release`.

        Raises:
            InputError: If gradients are to flow to a sharded weight.
        """
        if not isinstance(self.weight, DTensor):
            return self.weight
        if torch.is_grad_enabled():
            raise InputError("a sharded head has no logits to train on: use head.cross_entropy(x, target).")
        if self._gathered is None:
            with torch.inference_mode(False), torch.no_grad():  # DTensor knows no inference mode
                self._gathered = self.weight.full_tensor()
        return self._gathered

    def release(self) -> None:
        """Lets go of the copy that :attr:`full_weight` made."""
        self._gathered = None

    @torch.no_grad()
    def class_weights(self, target: Tensor) -> Tensor:
        """Weight of each sample's class, [N, in_features], without a graph; of a sharded head as of any other.

        Args:
            target: Classes, [N], int64; on each process as many.
        """
        own, shard = self._own()
        if shard is None:
            return own.detach()[target]
        wanted = shard.gather(target) - shard.start
        here = (wanted >= 0) & (wanted < len(own))
        rows = own.new_zeros(len(wanted), self.in_features)
        rows[here] = own[wanted[here]]
        return shard.share(shard.reduce(rows))

    @torch.no_grad()
    def plain_cross_entropy(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss without a margin and without a graph.

        Computed in the wider of the dtypes of ``x`` and the weight; with few classes in at least float32.

        Args:
            x: Features, [N, in_features].
            target: Class of each sample, [N], an integer type.
        """
        own, shard = self._own()
        return lsoftmax_cross_entropy(x, own, target, margin=1, shard=shard)

    def _own(self) -> tuple[Tensor, ClassShard | None]:
        """The weight of this process, and which classes these are."""
        if not isinstance(self.weight, DTensor):
            return self.weight, None
        mesh = self.weight.device_mesh
        start = math.ceil(self.num_classes / mesh.size()) * mesh.get_local_rank()
        return self.weight.to_local(), ClassShard(mesh.get_group(), start, self.num_classes)

    def extra_repr(self) -> str:
        """Sizes, margin and the current lambda."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, margin={self.margin}, "
            f"lambda_={self.lambda_:g}"
        )
