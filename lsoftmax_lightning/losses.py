"""The L-Softmax loss without its N x C logits: by chunks of samples, and with classes divided over processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .functional import (
    autocast_disabled,
    check_margin,
    check_target,
    margin_linear,
    margin_target,
    out_of_range,
    promote,
)

LEAN_FROM = 4000
"""Classes from which on the loss by chunks is the default (docs/performance.md)."""
_FEW = 2**23  # logits, 32 MiB of them


class LeanLoss(NamedTuple):
    """What remains of the logits."""

    loss: Tensor
    """Mean over the batch, a scalar; 0 for an empty batch."""
    prediction: Tensor
    """Class of the highest plain logit of each sample, int64 [N]."""
    correct: Tensor
    """Whether the logit with the margin is the highest, ties included, for each sample, bool ``(N,)``."""


class ClassShard(NamedTuple):
    """Which of the classes a process has, where they are divided over a group of processes."""

    group: dist.ProcessGroup | None
    """None where one process has them all."""
    start: int
    """The first class here."""
    num_classes: int
    """Of all processes."""

    @property
    def processes(self) -> int:
        """How many they are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, each of which has as many as the others."""
        if self.group is None:
            return rows
        gathered = rows.new_empty(self.processes * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.processes)), rows.contiguous(), group=self.group)
        return gathered

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum, say, over processes, in place."""
        if self.group is not None:
            dist.all_reduce(x, op, group=self.group)
        return x

    def share(self, rows: Tensor) -> Tensor:
        """Of rows of all processes those of this one."""
        if self.group is None:
            return rows
        return rows.chunk(self.processes)[dist.get_rank(self.group)]


def lsoftmax_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: int,
    lambda_: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    shard: ClassShard | None = None,
) -> Tensor:
    """The L-Softmax loss (section 3.2), averaged over the batch.

    Of :data:`LEAN_FROM` classes or more, and of divided ones, it is that of :func:`lean_cross_entropy`. Otherwise it is
    computed in float32, with autocast disabled; in float64 if an input is float64.

    Args:
        features: x, [N, D].
        weight: W, [C, D]; there is no bias.
        target: Class of each sample, [N], an integer type.
        margin: m, an integer >= 1. With 1 this is softmax cross-entropy.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        shard: Which classes these are, if not all.

    Returns:
        The loss, a scalar; 0 for an empty batch.

    Raises:
        InputError: As :func:`~lsoftmax_lightning.functional.margin_logits`.
    """
    if shard or len(weight) >= LEAN_FROM:
        loss: Tensor = lean_cross_entropy(features, weight, target, margin, lambda_, label_smoothing, shard).loss
        return loss
    logits, _ = margin_linear(features, weight, target, margin, lambda_)
    if logits.shape[0] == 0:
        return logits.sum()  # the mean over nothing would be NaN
    return F.cross_entropy(logits, target.long(), label_smoothing=label_smoothing)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lean_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: int,
    lambda_: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    shard: ClassShard | None = None,
) -> LeanLoss:
    """The L-Softmax loss by chunks of samples: no more of the logits is held at a time than those of a chunk.

    Value and gradients are those of the whole to rounding. The gradients are computed along with the loss, out of the
    same logits; they are to be had once, and have no derivatives.

    With a ``shard`` each process gives its own samples, as many as the others, and the weight of its own classes. The
    loss is that of all samples over all classes, the same on every process. The gradient of the weight is whole; that
    of the features is multiplied by the number of processes, over which DDP and FSDP2 will take the mean.

    The matrix products run in the dtype of autocast, or else in the wider of the two input dtypes; float16 is replaced
    by float32. The target logit and its gradient are computed in float32 from the unconverted inputs, and so is the
    softmax; in float64 if an input is float64.

    Args:
        features: x, [N, D].
        weight: W, [C, D]; with a ``shard`` the rows of this process, which may be none.
        target: Class of each sample among all of them, [N], an integer type.
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, as in :func:`lsoftmax_cross_entropy`.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        shard: Which classes these are; by default all.

    Raises:
        InputError: As :func:`~lsoftmax_lightning.functional.margin_logits`.
    """
    check_margin(margin)
    shard = shard or ClassShard(None, 0, len(weight))
    target = check_target(target, len(features))
    valid = ((target >= 0) & (target < shard.num_classes)).all()
    if target.device.type != "cpu":
        torch._assert_async(valid)  # which does not wait for the device
    elif not valid:
        raise out_of_range(target, shard.num_classes)
    return LeanLoss(*_Lean.apply(features, weight, target, margin, lambda_, label_smoothing, shard))


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        kind = features.device.type
        dtype = torch.promote_types(features.dtype, weight.dtype)
        if dtype != torch.float64 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if dtype == torch.float16:  # whose range does not hold the gradient of one logit among many
            dtype = torch.float32
        differentiate = any(ctx.needs_input_grad)
        with autocast_disabled(features.device):
            loss, prediction, correct, *ctx.gradients = _by_chunks(
                differentiate, dtype, features.detach(), weight.detach(), *settings
            )
        ctx.dtypes = features.dtype, weight.dtype
        ctx.mark_non_differentiable(prediction, correct)
        return loss, prediction, correct

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lean_cross_entropy has no second derivatives (create_graph); F.cross_entropy of margin_logits has."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("lean_cross_entropy gives its gradients once: retain_graph is of no use with it.")
        if gradient.device.type != "cpu" or gradient != 1:  # mostly a pass over all of the weight for nothing
            for own in gradients:
                own.mul_(gradient)
        return *(own.to(dtype) for own, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 5


def _by_chunks(
    differentiate: bool,
    product_dtype: torch.dtype,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: int,
    lambda_: float | Tensor,
    label_smoothing: float,
    shard: ClassShard,
) -> tuple[Tensor, ...]:
    """Loss, predictions and correctness of this rank's samples; to differentiate, gradients of features and weight."""
    classes = len(weight)
    if not classes:  # one that is never of use, so that this process goes along with the others
        weight = weight.new_zeros(1, weight.shape[1])
    features, target = shard.gather(features), shard.gather(target)
    size = max(len(features), 1)

    # the logit with the margin, where the class of a sample is here: the code, and the autograd, of the whole head
    own = target - shard.start
    here = (own >= 0) & (own < classes)
    own = own.clamp(0, len(weight) - 1)
    x, w = (of.detach().requires_grad_(differentiate) for of in promote(features, weight[own]))
    with torch.set_grad_enabled(differentiate):
        own_logit = (x * w).sum(dim=1)
        if margin > 1:
            x_norm, w_norm = (torch.linalg.vector_norm(of, dim=1) for of in (x, w))
            own_logit = margin_target(own_logit, x_norm, w_norm, margin, lambda_)
    dtype, features, weight = x.dtype, features.to(product_dtype), weight.to(product_dtype)

    # so that logits take no more than half of what the weight does, or than is nothing: fewer rows are slower
    rows = max(64, features.shape[1] // 2, _FEW // len(weight))
    product = features.new_empty(min(rows, len(features)), len(weight))
    smooth = label_smoothing / shard.num_classes
    losses, of_own, predictions = x.new_empty(len(x)), x.new_empty(len(x)), torch.empty_like(target)
    correct = torch.empty_like(target, dtype=torch.bool)
    if differentiate:
        of_features, of_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=dtype)
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        inside, at = here[part], own[part].unsqueeze(1)
        logits = torch.mm(features[part], weight.T, out=product[: len(at)]).to(dtype)
        logits[:, classes:] = -torch.inf
        plain = torch.where(inside, logits.gather(1, at).squeeze(1), -torch.inf)
        ours = torch.where(inside, own_logit.detach()[part], -torch.inf)
        stats = logits.new_zeros(4, len(at))
        stats[1] = torch.where(inside, ours, 0)
        if label_smoothing:
            stats[2] = logits[:, :classes].sum(dim=1) + torch.where(inside, ours - plain, 0)
        _set_own(logits, at, inside, -torch.inf)  # apart from the others from now on

        others, best = logits.max(dim=1)
        local = torch.stack([others.maximum(plain), others.maximum(ours)])
        highest, shift = shard.reduce(local.clone(), dist.ReduceOp.MAX)
        best = torch.where(plain >= others, target[part], best + shard.start)
        best = torch.where(local[0] == highest, best, shard.num_classes)  # the first one, of several
        predictions[part] = shard.reduce(best, dist.ReduceOp.MIN).clamp_max(shard.num_classes - 1)  # where it is NaN

        stats[3] = ours == shift
        logits.sub_(shift.unsqueeze(1)).exp_()
        ours = (ours - shift).exp()
        stats[0] = logits.sum(dim=1) + ours
        partition, own_value, sums, correct[part] = shard.reduce(stats)
        losses[part] = partition.log() + shift - (1 - label_smoothing) * own_value - smooth * sums
        if not differentiate:
            continue
        partition *= size
        logits.div_(partition.unsqueeze(1))
        if label_smoothing:
            logits.sub_(smooth / size)
            _set_own(logits, at, inside, 0)
        of_own[part] = torch.where(inside, ours / partition - (1 - label_smoothing + smooth) / size, 0)
        of_logits = logits.to(weight.dtype)
        of_features[part] = of_logits @ weight
        if weight.dtype == dtype:
            of_weight.addmm_(of_logits.T, features[part])
        else:
            of_weight += of_logits.T @ features[part]

    loss = losses.sum() / size
    predictions, correct = shard.share(predictions), shard.share(correct)
    if not differentiate:
        return loss, predictions, correct
    x_rest, w_rest = torch.autograd.grad(own_logit, (x, w), of_own)
    of_features += x_rest
    of_weight.index_add_(0, own, w_rest)
    of_features = shard.share(shard.reduce(of_features)) * shard.processes
    return loss, predictions, correct, of_features, of_weight[:classes]


def _set_own(logits: Tensor, at: Tensor, inside: Tensor, value: float) -> None:
    """Sets the logit of each sample's own class, where that is here."""
    logits.scatter_(1, at, torch.where(inside.unsqueeze(1), value, logits.gather(1, at)))
