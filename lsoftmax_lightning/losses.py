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
    margin_target_with_slopes,
    out_of_range,
    promote,
)

LEAN_FROM = 4000
"""Classes from which on the loss by chunks is the default (docs/performance.md)."""
_FEW_LOGITS = 2**23  # of a chunk, 32 MiB of them
_FEW_LOGITS_ACCELERATOR = 2**27


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
    num_local = len(weight)
    if not num_local:  # one class that is never the target, so that this rank takes part in the collectives
        weight = weight.new_zeros(1, weight.shape[1])
    features, target = shard.gather(features), shard.gather(target)
    size = max(len(features), 1)

    # the target logit with the margin, where its class is in this shard
    local_target, is_local = target, None
    if shard.group is not None:
        local_target = target - shard.start
        is_local = (local_target >= 0) & (local_target < num_local)
        local_target = local_target.clamp(0, len(weight) - 1)
    x, w = promote(features, weight[local_target])
    target_logit, slopes = (x * w).sum(dim=1), None
    if margin > 1:
        x_norm, w_norm = (torch.linalg.vector_norm(rows, dim=1) for rows in (x, w))
        target_logit, *slopes = margin_target_with_slopes(target_logit, x_norm, w_norm, margin, lambda_)
    dtype, features, weight = x.dtype, features.to(product_dtype), weight.to(product_dtype)

    smooth = label_smoothing / shard.num_classes
    target_logits = _where(is_local, target_logit, -torch.inf)
    plain, others, shift, partition, sums = target_logits.new_empty(5, len(x))
    best = torch.empty_like(target)
    length = _chunk_length(features, weight)
    product = features.new_empty(min(length, len(x)), len(weight))
    if differentiate:
        grad_features, grad_weight, scaled = torch.empty_like(features), torch.zeros_like(weight, dtype=dtype), x / size
    for first in range(0, len(x), length):
        part = slice(first, first + length)
        columns, local = local_target[part].unsqueeze(1), None if is_local is None else is_local[part].unsqueeze(1)
        logits = torch.mm(features[part], weight.T, out=product[: len(columns)]).to(dtype)
        if not num_local:
            logits.fill_(-torch.inf)
        torch.gather(logits, 1, columns, out=plain[part].unsqueeze(1))
        _place(logits, columns, local, -torch.inf)
        torch.max(logits, dim=1, out=(others[part], best[part]))
        shard.reduce(torch.maximum(others[part], target_logits[part], out=shift[part]), dist.ReduceOp.MAX)
        _place(logits, columns, local, target_logits[part].unsqueeze(1))
        if label_smoothing:
            torch.sum(logits[:, :num_local], dim=1, out=sums[part])
        logits.sub_(shift[part].unsqueeze(1)).exp_()
        scale = shard.reduce(torch.sum(logits, dim=1, out=partition[part])).unsqueeze(1)
        if not differentiate:
            continue
        # the gradients of the logits are these over `scale`, by which N x D numbers are divided instead of N x C
        if label_smoothing:
            logits.sub_(scale * smooth)
        _place(logits, columns, local, 0.0)  # the gradient of the target logit goes through the margin
        if weight.dtype == dtype:
            grad_weight.addmm_(logits.T, scaled[part] / scale)
        else:
            logits = product[: len(columns)].copy_(logits)
            grad_weight += logits.T @ (scaled[part] / scale).to(weight.dtype)
        torch.mm(logits, weight, out=grad_features[part])

    prediction = _predictions(_where(is_local, plain, -torch.inf), others, best, target, shard)
    correct = target_logits >= shift
    if shard.group is not None:
        correct = shard.reduce(correct.to(torch.int32)) > 0
    value = shard.reduce(_where(is_local, target_logits, 0.0))
    losses = partition.log() + shift - value
    if label_smoothing:
        losses += label_smoothing * value - smooth * shard.reduce(sums)
    loss = losses.sum() / size
    prediction, correct = shard.share(prediction), shard.share(correct)
    if not differentiate:
        return loss, prediction, correct
    partition *= size
    grad_x = grad_features / partition.unsqueeze(1)
    grad_target = (target_logits - shift).exp() / partition - (1 - label_smoothing + smooth) / size
    grad_target = _where(is_local, grad_target, 0.0).unsqueeze(1)
    if slopes is None:
        grad_x, grad_w = grad_x.addcmul_(grad_target, w), grad_target * x
    else:
        grad_logit, along_x, along_w = (grad_target * slope.unsqueeze(1) for slope in slopes)
        grad_x = grad_x.addcmul_(grad_logit, w).addcmul_(along_x, x)
        grad_w = (grad_logit * x).addcmul_(along_w, w)
    grad_weight.index_add_(0, local_target, grad_w)
    grad_x = shard.share(shard.reduce(grad_x))
    if shard.group is not None:
        grad_x *= shard.processes
    return loss, prediction, correct, grad_x, grad_weight[:num_local]


def _chunk_length(features: Tensor, weight: Tensor) -> int:
    """Return how many samples make a chunk: few logits for memory, enough of them to keep a device busy."""
    few = _FEW_LOGITS if features.device.type == "cpu" else _FEW_LOGITS_ACCELERATOR
    return max(64, features.shape[1] // 2, few // len(weight))


def _where(condition: Tensor | None, value: Tensor, other: float) -> Tensor:
    """Return ``value`` where the condition holds, everywhere if it is None."""
    return value if condition is None else torch.where(condition, value, other)


def _place(logits: Tensor, columns: Tensor, local: Tensor | None, value: Tensor | float) -> None:
    """Set the target logits, where their class is in this shard."""
    if local is not None:
        value = torch.where(local, value, logits.gather(1, columns))
    logits.scatter_(1, columns, value)


def _predictions(plain: Tensor, others: Tensor, best: Tensor, target: Tensor, shard: ClassShard) -> Tensor:
    """Return the class of the highest plain logit, the target among equals.

    Args:
        plain: Plain target logits, (N,); -infinity where the class is in another shard.
        others: Highest of the other logits of this shard, (N,).
        best: Index of it in this shard, (N,).
        target: Target classes, (N,).
        shard: The shard.
    """
    if shard.group is None:
        return torch.where(plain >= others, target, best)
    prediction = torch.where(plain >= others, target, best + shard.start)
    highest = plain.maximum(others)
    first = torch.where(highest == shard.reduce(highest.clone(), dist.ReduceOp.MAX), prediction, shard.num_classes)
    return shard.reduce(first, dist.ReduceOp.MIN).clamp_max(shard.num_classes - 1)  # NaN equals nothing
