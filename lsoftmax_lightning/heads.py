"""The L-Softmax classifier as a module: ``head(x)`` for plain logits, ``head(x, target)`` for margin logits."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from .chunked_loss import CHUNKED_FROM, ChunkedLoss, chunked_cross_entropy, lsoftmax_cross_entropy
from .distributed import ClassShard
from .errors import InputError
from .functional import check_lambda, check_margin, is_in_range, margin_logits, plain_logits


class HeadCall(NamedTuple):
    """Inputs and outputs of one call of the head, for forward hooks on :attr:`LSoftmaxLinear.observed`."""

    features: Tensor
    """x, (N, D)."""
    plain_logits: Tensor | None
    """Plain logits, (N, C); None from the chunked loss, which does not store them."""
    target: Tensor | None = None
    """Class of each sample, (N,); None for plain logits."""
    correct: Tensor | None = None
    """Whether the target logit with the margin is the highest, bool (N,); None if ``margin_logits`` is given."""
    margin_logits: Tensor | None = None
    """Margin logits, (N, C); None for plain logits and from the chunked loss."""


class LSoftmaxLinear(nn.Module):
    """Linear classifier without bias, with the large margin on its training logits (Liu et al., ICML 2016).

    ``head(x)`` returns plain logits, equal to ``F.linear(x, head.weight)`` to the last bit in float32. Use them to
    predict and to measure. ``head(x, target)`` returns logits with the margin on each sample's target class. Pass them
    to any cross-entropy. With many classes, :meth:`cross_entropy` is faster and needs less memory. The state dict
    contains only ``weight``, (num_classes, in_features), like that of ``nn.Linear(bias=False)``.

    Logits are computed and returned in float32, or in float64 if an input is float64. Autocast is disabled, and
    half-precision inputs are converted, because the margin amplifies the rounding error of the target logit by up to
    m^2.

    Args:
        in_features: D, the width of a feature.
        num_classes: C, at least 2.
        margin: m, an integer >= 1; 1 is plain softmax.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax). Anneal it by setting the
            attribute of the same name. None means 0, with a warning at the first training step (none in a compiled
            graph).
        device: Device of the weight.
        dtype: Dtype of the weight.

    Attributes:
        observed: Identity module that is called with a :class:`HeadCall` in each call of the head and of
            :meth:`cross_entropy`. A forward hook on it reads features and logits without computing them again.

    Raises:
        InputError: If a size, the margin or lambda is out of range.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from lsoftmax_lightning import LSoftmaxLinear
        >>> head = LSoftmaxLinear(in_features=64, num_classes=10, margin=4, lambda_=5.0)
        >>> features, target = torch.randn(8, 64), torch.randint(10, (8,))
        >>> loss = F.cross_entropy(head(features, target), target)
    """

    _lambda_unset = False  # default for heads unpickled from an earlier release

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
        for name, value, minimum in (("in_features", in_features, 1), ("num_classes", num_classes, 2)):
            if not isinstance(value, int) or value < minimum:
                advice = "raise it" if isinstance(value, int) else f"pass an int instead of {type(value).__name__}"
                raise InputError(f"{name}: must be an integer of at least {minimum}, got {value!r}; {advice}.")
        self.in_features = in_features
        self.num_classes = num_classes
        self.margin = check_margin(margin)
        # A tensor, so that a new value does not recompile a graph. On the CPU, so that a GPU kernel takes it as a
        # scalar, without a copy. Not a buffer, so that weight averaging, DDP, casts and state dicts ignore it.
        self._lambda = torch.zeros((), dtype=torch.float64, device="cpu")
        if lambda_ is not None:
            self.lambda_ = lambda_
        self._lambda_unset = lambda_ is None
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.observed = nn.Identity()
        self._full_weight: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight as the authors do (MSRA: normal with variance 2 / in_features)."""
        nn.init.kaiming_normal_(self.weight)

    @property
    def lambda_(self) -> float:
        """Weight of the plain logit against the margin logit, 0 to infinity; set it before each training step."""
        return float(self._lambda)

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        check_lambda(float(value))
        self._lambda.fill_(value)
        self._lambda_unset = False

    @property
    def sharded(self) -> bool:
        """Whether the weight is sharded over ranks, by :meth:`shard` or FSDP2; also while FSDP2 has gathered it."""
        return isinstance(self.weight, DTensor) or isinstance(self, FSDPModule)

    @property
    def uses_chunked_loss(self) -> bool:
        """Whether the loss is computed by :meth:`cross_entropy`, as with many classes or a sharded weight."""
        return self.sharded or self.num_classes >= CHUNKED_FROM

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weight over ranks by class, unless it is sharded already; a rank may get no class.

        The weight becomes a DTensor, which optimizers, gradient clipping and checkpoints support. Compute the loss by
        :meth:`cross_entropy`.

        Args:
            mesh: One-dimensional mesh. The weight must be the same on all its ranks.
        """
        if self.sharded:
            return
        rows = self._rows_per_rank(mesh)
        start = rows * mesh.get_local_rank()
        local = self.weight.detach()[start : start + rows].to(mesh.device_type, copy=True)
        shape, stride = self.weight.shape, self.weight.stride()
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        self.weight = nn.Parameter(sharded, requires_grad=self.weight.requires_grad)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute plain logits, or margin logits if ``target`` is given.

        Args:
            x: Features, (N, in_features).
            target: Class of each sample, (N,), an integer type.

        Returns:
            Logits, (N, num_classes).

        Raises:
            InputError: If ``target`` is invalid (:func:`~lsoftmax_lightning.functional.gather_target_logits`), or the
                head is sharded and gradients are enabled.
        """
        self._check_width(x)
        if target is not None:
            self._check_lambda(stacklevel=5)  # the caller of head(...)
            return self._margin_and_plain_logits(x, target)[0]
        logits = plain_logits(x, self.full_weight)
        self.observed(HeadCall(x, logits))
        return logits

    def margin_and_plain_logits(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute margin logits to train on and plain logits to measure with, by one matrix product.

        Args:
            x: Features, (N, in_features).
            target: Class of each sample, (N,), an integer type.

        Returns:
            Margin logits and plain logits, (N, num_classes) each.

        Raises:
            InputError: As :meth:`forward`.
        """
        self._check_width(x)
        self._check_lambda(stacklevel=3)
        self._compute_weight(x)
        if torch.is_grad_enabled():
            self.free_full_weight()  # the copy of FSDP2 gets no gradients
        return self._margin_and_plain_logits(x, target)

    def _margin_and_plain_logits(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.full_weight
        plain = plain_logits(x, weight)
        logits = margin_logits(plain, x, weight, target, self.margin, self._lambda)
        self.observed(HeadCall(x, plain, target, margin_logits=logits))
        return logits, plain

    def cross_entropy(self, x: Tensor, target: Tensor, label_smoothing: float = 0.0) -> ChunkedLoss:
        """Compute the loss of the margin logits and the predictions of the plain logits, in chunks of samples.

        See :func:`~lsoftmax_lightning.chunked_loss.chunked_cross_entropy`. If the head is sharded, each rank passes its
        own samples. Every rank must pass the same number.

        Args:
            x: Features, (N, in_features).
            target: Class of each sample, (N,), an integer type.
            label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.

        Raises:
            InputError: If ``target`` or ``label_smoothing`` is invalid.
        """
        self._check_width(x)
        self._check_lambda(stacklevel=3)
        self._compute_weight(x)
        self.free_full_weight()  # the weight is about to be updated
        weight, shard = self._local_weight()
        loss: ChunkedLoss = chunked_cross_entropy(x, weight, target, self.margin, self._lambda, label_smoothing, shard)
        self.observed(HeadCall(x, None, target, loss.correct))
        return loss

    def apply_margin(self, logits: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """Put the margin on plain logits that are already computed.

        Args:
            logits: ``head(x)``, (N, num_classes).
            x: Features, (N, in_features).
            target: Class of each sample, (N,), an integer type.

        Returns:
            Margin logits, (N, num_classes).

        Raises:
            InputError: As :meth:`forward`.
        """
        self._check_lambda(stacklevel=3)
        return margin_logits(logits, x, self.full_weight, target, self.margin, self._lambda)

    def _check_width(self, x: Tensor) -> None:
        if not torch.jit.is_tracing() and x.shape[-1] != self.in_features:  # type: ignore[attr-defined,no-untyped-call]
            raise InputError(
                f"features: must be (N, {self.in_features}), got {tuple(x.shape)}; correct the number of features, or "
                "pool or flatten them."
            )

    def _compute_weight(self, x: Tensor) -> None:
        """Call the hooks that compute the weight for ``forward``, if it is pruned or normalised by such a hook."""
        if "weight" in vars(self):
            for hook in self._forward_pre_hooks.values():
                hook(self, (x,))

    def _check_lambda(self, stacklevel: int) -> None:
        """Warn once if the head trains with a margin and lambda was never set."""
        if torch.compiler.is_compiling():  # no graph break, and no guard on the flag
            return
        if self._lambda_unset and self.margin > 1 and self.training and torch.is_grad_enabled():
            self._lambda_unset = False
            warnings.warn(
                f"lambda_: not set, so training starts with the full margin {self.margin}, which often costs accuracy; "
                "add LambdaAnnealing() to the callbacks of the Lightning Trainer, or set head.lambda_ before each step "
                "of your own loop. To train with the full margin on purpose, pass lambda_=0.0.",
                stacklevel=stacklevel,
            )

    @property
    def full_weight(self) -> Tensor:
        """W, (num_classes, in_features); for a sharded head, a gathered copy without gradients.

        Reading it from a sharded head is a collective, so read it on all ranks. The copy is kept until the next
        training step, validation, ``load_state_dict`` or :meth:`free_full_weight`.

        Raises:
            InputError: If the head is sharded and gradients are enabled.
        """
        if not isinstance(self.weight, DTensor):
            return self.weight
        if torch.is_grad_enabled():
            raise InputError("head: is sharded, so it has no logits to train on; use head.cross_entropy(x, target).")
        if self._full_weight is None:
            with torch.inference_mode(False), torch.no_grad():  # DTensor does not support inference mode
                self._full_weight = self.weight.full_tensor()
        return self._full_weight

    def free_full_weight(self) -> None:
        """Free the gathered copy of the weight, whether :attr:`full_weight` or FSDP2 gathered it."""
        self._full_weight = None
        if isinstance(self, FSDPModule):
            self.reshard()

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.free_full_weight()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def class_weights(self, target: Tensor) -> Tensor:
        """Gather the weight of each sample's class, without gradients; also for a sharded head.

        Args:
            target: Class of each sample, (N,), an integer type. If the head is sharded, N must be the same on every
                rank.

        Returns:
            Weights, (N, in_features).
        """
        weight, shard = self._local_weight()
        if shard is None:
            return weight.detach()[target.long()]
        local_target = shard.all_gather(target.long()) - shard.start
        is_local = is_in_range(local_target, len(weight))
        rows = weight.new_zeros(len(local_target), self.in_features)
        rows[is_local] = weight[local_target[is_local]]
        return shard.local_rows(shard.all_reduce_(rows))

    @torch.no_grad()
    def plain_cross_entropy(self, x: Tensor, target: Tensor) -> Tensor:
        """Compute the loss without a margin and without gradients.

        See :func:`~lsoftmax_lightning.chunked_loss.lsoftmax_cross_entropy`.

        Args:
            x: Features, (N, in_features).
            target: Class of each sample, (N,), an integer type.
        """
        weight, shard = self._local_weight()
        return lsoftmax_cross_entropy(x, weight, target, margin=1, shard=shard)

    def _local_weight(self) -> tuple[Tensor, ClassShard | None]:
        """Return the weight on this rank, and the classes of this rank if the weight is sharded."""
        if not isinstance(self.weight, DTensor):
            return self.weight, None
        mesh = self.weight.device_mesh
        start = self._rows_per_rank(mesh) * mesh.get_local_rank()
        return self.weight.to_local(), ClassShard(mesh.get_group(), start, self.num_classes)

    def _rows_per_rank(self, mesh: DeviceMesh) -> int:
        """Return ceil(C / ranks), DTensor's number of classes per rank; the last ranks may have fewer."""
        return math.ceil(self.num_classes / mesh.size())

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # on one line, without the identity

    @override
    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, margin={self.margin}, "
            f"lambda_={self.lambda_:g}"
        )
