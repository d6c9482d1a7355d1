"""The L-Softmax loss without its (N, C) logits: over chunks of samples, and with classes sharded over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import assert_on_device
from .distributed import ClassShard
from .functional import (
    autocast_disabled,
    check_margin,
    check_target,
    is_in_range,
    margin_logits,
    margin_target_logit,
    out_of_range,
    plain_logits,
    promote,
)

CHUNKED_FROM = 4000
"""Number of classes from which the chunked loss is the default (docs/performance.md)."""
_CHUNK_LOGITS = 2**23  # 32 MiB
_CHUNK_LOGITS_ACCELERATOR = 2**27


class ChunkedLoss(NamedTuple):
    """The loss, and the predictions that need the logits."""

    loss: Tensor
    """Mean over the batch, a scalar; 0 for an empty batch."""
    prediction: Tensor
    """Class with the highest plain logit for each sample, int64 (N,)."""
    correct: Tensor
    """Whether the target logit with the margin is the highest, ties included, for each sample, bool (N,)."""


def is_cross_entropy(criterion: nn.Module) -> TypeGuard[nn.CrossEntropyLoss]:
    """Return whether the loss of a module is what :func:`chunked_cross_entropy` computes."""
    is_plain = type(criterion) is nn.CrossEntropyLoss
    return is_plain and criterion.weight is None and criterion.reduction == "mean"


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

    With at least :data:`CHUNKED_FROM` classes, or with sharded classes, it is that of :func:`chunked_cross_entropy`.
    Otherwise it is computed in float32, with autocast disabled; in float64 if an input is float64.

    Args:
        features: x, (N, D).
        weight: W, (C, D); there is no bias.
        target: Class of each sample, (N,), an integer type.
        margin: m, an integer >= 1. With 1 this is softmax cross-entropy.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        shard: The classes of this rank. Default: all classes.

    Returns:
        The loss, a scalar; 0 for an empty batch.

    Raises:
        InputError: As :func:`~lsoftmax_lightning.functional.margin_logits`.
    """
    if shard or len(weight) >= CHUNKED_FROM:
        loss: Tensor = chunked_cross_entropy(features, weight, target, margin, lambda_, label_smoothing, shard).loss
        return loss
    logits = margin_logits(plain_logits(features, weight), features, weight, target, margin, lambda_)
    if logits.shape[0] == 0:
        return logits.sum()  # the mean over nothing would be NaN
    return F.cross_entropy(logits, target.long(), label_smoothing=label_smoothing)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: int,
    lambda_: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    shard: ClassShard | None = None,
) -> ChunkedLoss:
    """The L-Softmax loss over chunks of samples, which holds the logits of one chunk at a time.

    Loss and gradients equal those of the whole batch up to rounding. The gradients are computed together with the loss,
    from the same logits. Backward can run only once and is not differentiable.

    With a ``shard``, each rank passes its own samples, equally many on each rank, and the weight of its own classes.
    The loss is that of all samples over all classes, and is the same on every rank. The gradient of the weight is that
    of all samples. The gradient of the features is multiplied by the number of ranks, because DDP and FSDP2 average
    gradients over the ranks.

    The matrix products run in the dtype of autocast, or else in the wider of the two input dtypes; float16 is replaced
    by float32. The target logit and its gradient are computed in float32 from the unconverted inputs, and so is the
    softmax; in float64 if an input is float64.

    Args:
        features: x, (N, D).
        weight: W, (C, D); with a ``shard`` the rows of this rank, which may be none.
        target: Class of each sample among all classes, (N,), an integer type.
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, as in :func:`lsoftmax_cross_entropy`.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        shard: The classes of this rank. Default: all classes.

    Raises:
        InputError: As :func:`~lsoftmax_lightning.functional.margin_logits`.
    """
    check_margin(margin)
    shard = shard or ClassShard(None, 0, len(weight))
    target = check_target(target, len(features))
    is_valid = is_in_range(target, shard.num_classes).all()
    if target.device.type != "cpu":
        assert_on_device(is_valid)
    elif not is_valid:
        raise out_of_range(target, shard.num_classes)
    return ChunkedLoss(*_ChunkedCrossEntropy.apply(features, weight, target, margin, lambda_, label_smoothing, shard))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        device_type = features.device.type
        dtype = torch.promote_types(features.dtype, weight.dtype)
        if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        if dtype == torch.float16:  # its range does not hold the gradient of one logit among many
            dtype = torch.float32
        with autocast_disabled(features.device):
            loss, prediction, correct, *ctx.gradients = _loss_and_gradients(
                any(ctx.needs_input_grad), dtype, features.detach(), weight.detach(), *settings
            )
        ctx.dtypes = features.dtype, weight.dtype
        ctx.mark_non_differentiable(prediction, correct)
        return loss, prediction, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_cross_entropy: has no second derivatives, got create_graph=True; use F.cross_entropy of "
                "margin_logits."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("chunked_cross_entropy: backward can run only once; remove retain_graph=True.")
        if grad_loss.device.type != "cpu" or grad_loss != 1:  # usually 1: saves a pass over the weight
            for gradient in gradients:
                gradient.mul_(grad_loss)
        return *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 5


def _loss_and_gradients(
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
    """Return loss, predictions and correctness of the samples of this rank; if asked, gradients of features and weight.

    All samples of all ranks meet the classes of this rank, so rows below are those of all samples.
    """
    num_local = len(weight)
    if not num_local:  # a dummy class, so that a rank without classes still joins the collectives
        weight = weight.new_zeros(1, weight.shape[1])
    features, target = shard.all_gather(features), shard.all_gather(target)
    num_samples = max(len(features), 1)
    local_target, is_local = _local_target(target, num_local, shard)

    x, w = promote(features, weight[local_target])
    x, w = x.detach().requires_grad_(differentiate), w.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        target_logit = _target_logit(x, w, margin, lambda_)
    margin_logit = _where(is_local, target_logit.detach(), -torch.inf)

    dtype, features, weight = x.dtype, features.to(product_dtype), weight.to(product_dtype)
    highest, shift, partition, logit_sum = margin_logit.new_empty(4, len(x))
    best = torch.empty_like(target)
    length = chunk_length(features, weight)
    buffer = features.new_empty(min(length, len(x)), len(weight))
    if differentiate:
        grad_features, grad_weight = torch.empty_like(features), torch.zeros_like(weight, dtype=dtype)
    for start in range(0, len(x), length):
        rows = slice(start, start + length)
        columns = local_target[rows].unsqueeze(1)
        is_local_row = None if is_local is None else is_local[rows].unsqueeze(1)
        logits = torch.mm(features[rows], weight.T, out=buffer[: len(columns)]).to(dtype)
        if not num_local:
            logits.fill_(-torch.inf)
        torch.max(logits, dim=1, out=(highest[rows], best[rows]))
        _place(logits, columns, is_local_row, margin_logit[rows].unsqueeze(1))
        if label_smoothing:
            torch.sum(logits[:, :num_local], dim=1, out=logit_sum[rows])
        shard.all_reduce(torch.amax(logits, dim=1, out=shift[rows]), dist.ReduceOp.MAX)
        exponentials = logits.sub_(shift[rows].unsqueeze(1)).exp_()
        shard.all_reduce(torch.sum(exponentials, dim=1, out=partition[rows]))
        if not differentiate:
            continue
        # Gradients of all logits but the target logit, times `scale`: dividing N x D numbers by it later is cheaper.
        scale = partition[rows].unsqueeze(1)
        if label_smoothing:
            exponentials.sub_(scale * (label_smoothing / shard.num_classes))
        _place(exponentials, columns, is_local_row, 0.0)
        scaled = x.detach()[rows] / (scale * num_samples)
        if weight.dtype == dtype:
            grad_weight.addmm_(exponentials.T, scaled)
        else:
            exponentials = buffer[: len(columns)].copy_(exponentials)
            grad_weight += exponentials.T @ scaled.to(weight.dtype)
        torch.mm(exponentials, weight, out=grad_features[rows])

    prediction = _global_argmax(highest, best, shard)
    correct = margin_logit >= shift
    if shard.group is not None:
        correct = shard.all_reduce(correct.to(torch.int32)) > 0
    target_value = shard.all_reduce(_where(is_local, target_logit.detach(), 0.0))
    losses = partition.log() + shift - target_value
    if label_smoothing:
        losses += label_smoothing * (target_value - shard.all_reduce(logit_sum) / shard.num_classes)
    outputs = losses.sum() / num_samples, shard.local_rows(prediction), shard.local_rows(correct)
    if not differentiate:
        return outputs

    smoothed_target = 1 - label_smoothing + label_smoothing / shard.num_classes
    grad_logit = ((margin_logit - shift).exp() / partition - smoothed_target) / num_samples
    grad_x, grad_w = torch.autograd.grad(target_logit, (x, w), _where(is_local, grad_logit, 0.0))
    grad_weight.index_add_(0, local_target, grad_w)
    grad_x.addcdiv_(grad_features, (partition * num_samples).unsqueeze(1))
    grad_x = shard.local_rows(shard.all_reduce(grad_x))
    if shard.group is not None:
        grad_x *= shard.world_size
    return *outputs, grad_x, grad_weight[:num_local]


def _target_logit(x: Tensor, w: Tensor, margin: int, lambda_: float | Tensor) -> Tensor:
    """Return the target logit with the margin, (N,), from features and weights of the target classes, (N, D) each."""
    plain = (x * w).sum(dim=1)
    if margin == 1:
        return plain
    x_norm, w_norm = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(w, dim=1)
    return margin_target_logit(plain, x_norm, w_norm, margin, lambda_)


def _local_target(target: Tensor, num_local: int, shard: ClassShard) -> tuple[Tensor, Tensor | None]:
    """Return the index of each target class in this shard, any index if it is in another one, and whether it is here.

    The second is None if all classes are.
    """
    if shard.group is None:
        return target, None
    local_target = target - shard.start
    is_local = (local_target >= 0) & (local_target < num_local)
    return local_target.clamp(0, max(num_local, 1) - 1), is_local


def chunk_length(features: Tensor, weight: Tensor) -> int:
    """Return the samples of a chunk: few logits to save memory, enough of them to keep a device busy.

    Args:
        features: x, (N, D).
        weight: W, (C, D).
    """
    logits = _CHUNK_LOGITS if features.device.type == "cpu" else _CHUNK_LOGITS_ACCELERATOR
    return max(64, features.shape[1] // 2, logits // len(weight))


def _where(condition: Tensor | None, value: Tensor, other: float) -> Tensor:
    """Return ``value`` where the condition holds, everywhere if it is None."""
    return value if condition is None else torch.where(condition, value, other)


def _place(logits: Tensor, columns: Tensor, is_local: Tensor | None, value: Tensor | float) -> None:
    """Set one logit in each row, (N, 1) columns, where its class is in this shard."""
    if is_local is not None:
        value = torch.where(is_local, value, logits.gather(1, columns))
    logits.scatter_(1, columns, value)


def _global_argmax(highest: Tensor, best: Tensor, shard: ClassShard) -> Tensor:
    """Return the class of the highest logit over all shards, the lowest class among equals.

    Args:
        highest: Highest logit in this shard, (N,).
        best: Its index in this shard, (N,).
        shard: The shard.
    """
    if shard.group is None:
        return best
    is_highest = highest == shard.all_reduce(highest.clone(), dist.ReduceOp.MAX)
    prediction = torch.where(is_highest, best + shard.start, shard.num_classes)
    return shard.all_reduce(prediction, dist.ReduceOp.MIN).clamp_max(shard.num_classes - 1)  # NaN equals nothing
