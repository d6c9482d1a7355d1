"""The L-Softmax loss in chunks of samples, without the (N, C) logits, and with classes sharded over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import assert_on_device
from .distributed import ClassShard
from .errors import InputError
from .functional import (
    autocast_disabled,
    check_lambda,
    check_margin,
    check_target,
    is_in_range,
    margin_logits,
    margin_target_logit,
    out_of_range_error,
    plain_logits,
    promote,
)

CHUNKED_FROM = 4000
"""Number of classes from which the chunked loss is the default (docs/performance.md)."""
CHUNK_LOGITS = 2**23  # logits per chunk on a CPU, 32 MiB in float32
CHUNK_LOGITS_ACCELERATOR = 2**27  # logits per chunk on an accelerator, 512 MiB in float32


class ChunkedLoss(NamedTuple):
    """Loss and predictions of :func:`chunked_cross_entropy`."""

    loss: Tensor
    """Mean loss of the batch, 0-d; 0 for an empty batch."""
    prediction: Tensor
    """Class with the highest plain logit of each sample, int64 (N,)."""
    correct: Tensor
    """Whether the target logit with the margin is the highest of each sample, ties included, bool (N,)."""


def is_plain_cross_entropy(criterion: nn.Module) -> TypeGuard[nn.CrossEntropyLoss]:
    """Return whether :func:`chunked_cross_entropy` can replace ``criterion``."""
    return (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and criterion.reduction == "mean"
        and criterion.ignore_index < 0  # no class
    )


def lsoftmax_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: int,
    lambda_: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    shard: ClassShard | None = None,
) -> Tensor:
    """Compute the L-Softmax loss (section 3.2), averaged over the batch.

    With at least :data:`CHUNKED_FROM` classes, or with sharded classes, :func:`chunked_cross_entropy` computes it.
    Otherwise it is computed in float32, with autocast disabled, or in float64 if an input is float64.

    Args:
        features: x, (N, D).
        weight: W, (C, D).
        target: Class of each sample, (N,), an integer type.
        margin: m, an integer >= 1. With 1 this is softmax cross-entropy.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        shard: The classes of this rank. Default: all classes.

    Returns:
        The loss, 0-d; 0 for an empty batch.

    Raises:
        InputError: As :func:`~lsoftmax_lightning.functional.margin_logits`.

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.chunked_loss import lsoftmax_cross_entropy
        >>> x, weight = torch.tensor([[0.0, 1.0]]), torch.eye(2)
        >>> lsoftmax_cross_entropy(x, weight, torch.tensor([0]), margin=2)
        tensor(2.1269)
    """
    if shard or len(weight) >= CHUNKED_FROM:
        loss: Tensor = chunked_cross_entropy(features, weight, target, margin, lambda_, label_smoothing, shard).loss
        return loss
    logits = margin_logits(plain_logits(features, weight), features, weight, target, margin, lambda_)
    if logits.shape[0] == 0:
        return logits.sum()  # 0; the mean of an empty batch would be NaN
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
    """Compute the L-Softmax loss in chunks of samples; only the logits of one chunk are in memory at a time.

    Loss and gradients equal those of the full logits up to rounding. The gradients are computed together with the loss,
    from the same logits. Backward can run only once and is not differentiable.

    With a ``shard``, each rank passes its own samples, the same number on each rank, and the weight of its own classes.
    The loss is the mean over the global batch, with a softmax over all classes, and is the same on every rank; scale it
    equally on every rank. The gradient of the weight is that of all samples. The gradient of the features is multiplied
    by the number of ranks, because DDP and FSDP2 average gradients over the ranks.

    Target logits and softmax are computed in float32, or in float64 if an input is float64. The matrix products run in
    the dtype of autocast, or else in the wider of the two input dtypes, with float32 in place of float16. With bfloat16
    products the other logits are rounded and may tie, which can change ``prediction`` and ``correct`` of close samples.

    Args:
        features: x, (N, D), of this rank.
        weight: W, (C, D); with a ``shard``, the rows of this rank, possibly none.
        target: Class of each sample among all classes, (N,), an integer type.
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, as in :func:`lsoftmax_cross_entropy`; it must not require gradients.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        shard: The classes of this rank. Default: all classes.

    Raises:
        InputError: As :func:`~lsoftmax_lightning.functional.margin_logits`, or if ``lambda_`` requires gradients or
            ``label_smoothing`` is not from 0 to 1.
    """
    check_margin(margin)
    check_lambda(lambda_)
    if isinstance(lambda_, Tensor) and lambda_.requires_grad:
        raise InputError("lambda_: must not require gradients in the chunked loss; pass lambda_.detach().")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing: must be from 0 to 1, got {label_smoothing}; the usual value is 0.1.")
    shard = shard or ClassShard(None, 0, len(weight))
    target = check_target(target, len(features))
    is_valid = is_in_range(target, shard.num_classes).all()
    if target.device.type != "cpu":
        assert_on_device(is_valid)
    elif not is_valid:
        raise out_of_range_error(target, shard.num_classes)
    needs_grad = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    return ChunkedLoss(
        *_ChunkedCrossEntropy.apply(needs_grad, features, weight, target, margin, lambda_, label_smoothing, shard)
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, needs_grad: bool, features: Tensor, weight: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        device_type = features.device.type
        dtype = torch.promote_types(features.dtype, weight.dtype)
        if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        if dtype == torch.float16:  # the gradients of single logits underflow in it
            dtype = torch.float32
        with autocast_disabled(features.device):
            loss, prediction, correct, *gradients = _loss_and_gradients(
                needs_grad, dtype, features.detach(), weight.detach(), *settings
            )
        ctx.gradients = gradients
        ctx.dtypes = features.dtype, weight.dtype
        ctx.mark_non_differentiable(prediction, correct)
        return loss, prediction, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_cross_entropy: has no second derivatives, got create_graph=True; use F.cross_entropy with "
                "margin_logits."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("chunked_cross_entropy: backward can run only once; remove retain_graph=True.")
        # It is usually 1, but reading it would synchronise an accelerator.
        if grad_loss.device.type != "cpu" or grad_loss != 1:
            for gradient in gradients:
                gradient.mul_(grad_loss)
        grad_features, grad_weight = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, grad_features, grad_weight, None, None, None, None, None


def _loss_and_gradients(
    needs_grad: bool,
    product_dtype: torch.dtype,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: int,
    lambda_: float | Tensor,
    label_smoothing: float,
    shard: ClassShard,
) -> tuple[Tensor, ...]:
    """Return loss, predictions and correctness of the samples of this rank, and the gradients if ``needs_grad``.

    1. Gather the samples of all ranks. In the following, a row is a sample of the global batch.
    2. Compute the target logits with the margin from (N, D) tensors, under autograd.
    3. For each chunk of rows compute the plain logits, predict, overwrite the target logits, and reduce the rows to
       their maximum and sum of exponentials; from the exponentials compute the gradients of all other logits.
    4. Compute the loss from these reductions.
    5. Add the gradients through the target logits.
    """
    num_local = len(weight)
    if not num_local:  # a dummy class, so that a rank without classes still joins the collectives
        weight = weight.new_zeros(1, weight.shape[1])
    features, target = shard.all_gather(features), shard.all_gather(target)
    num_samples = max(len(features), 1)
    local_target, is_local = _local_target(target, num_local, shard)

    x, target_weight = promote(features, weight[local_target])
    x, target_weight = (rows.detach().requires_grad_(needs_grad) for rows in (x, target_weight))
    with torch.set_grad_enabled(needs_grad):
        target_logit = _margin_target_logit(x, target_weight, margin, lambda_)
    local_target_logit = _where_local(is_local, target_logit.detach(), -torch.inf)

    dtype, features, weight = x.dtype, features.to(product_dtype), weight.to(product_dtype)
    max_plain, max_logit, sum_exp, sum_logit = local_target_logit.new_empty(4, len(x))
    argmax_plain = torch.empty_like(target)
    length = chunk_length(features, weight)
    buffer = features.new_empty(min(length, len(x)), len(weight))
    if needs_grad:
        grad_features, grad_weight = torch.empty_like(features), torch.zeros_like(weight, dtype=dtype)
    for start in range(0, len(x), length):
        rows = slice(start, start + length)
        column = local_target[rows].unsqueeze(1)
        is_local_row = None if is_local is None else is_local[rows].unsqueeze(1)
        logits = torch.mm(features[rows], weight.T, out=buffer[: len(column)]).to(dtype)
        if not num_local:
            logits.fill_(-torch.inf)  # the dummy class is never the maximum and adds nothing to the sum
        torch.max(logits, dim=1, out=(max_plain[rows], argmax_plain[rows]))
        _set_column_(logits, column, is_local_row, local_target_logit[rows].unsqueeze(1))
        if label_smoothing:
            torch.sum(logits[:, :num_local], dim=1, out=sum_logit[rows])
        shard.all_reduce_(torch.amax(logits, dim=1, out=max_logit[rows]), dist.ReduceOp.MAX)
        exponentials = logits.sub_(max_logit[rows].unsqueeze(1)).exp_()
        shard.all_reduce_(torch.sum(exponentials, dim=1, out=sum_exp[rows]))
        if not needs_grad:
            continue
        # dloss/dlogit = (exp(logit - max) / sum_exp - smoothing / C) / N. It is kept multiplied by N * sum_exp, because
        # dividing (N, D) tensors is cheaper: x here, for the weight; grad_features below, for the features.
        unscaled_grad, row_sum = exponentials, sum_exp[rows].unsqueeze(1)
        if label_smoothing:
            unscaled_grad.sub_(row_sum * (label_smoothing / shard.num_classes))
        _set_column_(unscaled_grad, column, is_local_row, 0.0)  # the target logit has a gradient of its own, see below
        scaled_x = x.detach()[rows] / (row_sum * num_samples)
        if weight.dtype == dtype:
            grad_weight.addmm_(unscaled_grad.T, scaled_x)
        else:
            unscaled_grad = buffer[: len(column)].copy_(unscaled_grad)  # `to` copied the logits out of the buffer
            grad_weight += unscaled_grad.T @ scaled_x.to(weight.dtype)
        torch.mm(unscaled_grad, weight, out=grad_features[rows])

    prediction = _global_argmax(max_plain, argmax_plain, shard)
    correct = local_target_logit >= max_logit
    if shard.group is not None:
        correct = shard.all_reduce_(correct.to(torch.int32)) > 0
    global_target_logit = shard.all_reduce_(_where_local(is_local, target_logit.detach(), 0.0))
    losses = sum_exp.log() + max_logit - global_target_logit
    if label_smoothing:
        losses += label_smoothing * (global_target_logit - shard.all_reduce_(sum_logit) / shard.num_classes)
    outputs = losses.sum() / num_samples, shard.local_rows(prediction), shard.local_rows(correct)
    if not needs_grad:
        return outputs

    target_probability = 1 - label_smoothing + label_smoothing / shard.num_classes
    grad_logit = ((local_target_logit - max_logit).exp() / sum_exp - target_probability) / num_samples
    grad_logit = _where_local(is_local, grad_logit, 0.0)
    grad_x, grad_target_weight = torch.autograd.grad(target_logit, (x, target_weight), grad_logit)
    grad_weight.index_add_(0, local_target, grad_target_weight)  # adds zeros where the class is in another shard
    grad_x.addcdiv_(grad_features, (sum_exp * num_samples).unsqueeze(1))
    grad_x = shard.local_rows(shard.all_reduce_(grad_x))
    if shard.group is not None:
        grad_x *= shard.world_size
    return *outputs, grad_x, grad_weight[:num_local]


def _margin_target_logit(x: Tensor, target_weight: Tensor, margin: int, lambda_: float | Tensor) -> Tensor:
    """Return the target logits with the margin, (N,), from features and the weights of their classes, (N, D) each."""
    plain = (x * target_weight).sum(dim=1)
    if margin == 1:
        return plain
    x_norm, weight_norm = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(target_weight, dim=1)
    return margin_target_logit(plain, x_norm, weight_norm, margin, lambda_)


def _local_target(target: Tensor, num_local: int, shard: ClassShard) -> tuple[Tensor, Tensor | None]:
    """Return the index of each target class in this shard, and whether it is in this shard; None if all are.

    The index of a class of another shard is clamped: its row is read, and its result masked.
    """
    if shard.group is None:
        return target, None
    local_target = target - shard.start
    return local_target.clamp(0, max(num_local, 1) - 1), is_in_range(local_target, num_local)


def chunk_length(features: Tensor, weight: Tensor) -> int:
    """Return the number of samples in a chunk: small enough to save memory, large enough to keep a device busy.

    Args:
        features: x, (N, D).
        weight: W, (C, D).
    """
    logits = CHUNK_LOGITS if features.device.type == "cpu" else CHUNK_LOGITS_ACCELERATOR
    return max(64, features.shape[1] // 2, logits // len(weight))


def _where_local(is_local: Tensor | None, value: Tensor, other: float) -> Tensor:
    """Return ``value`` where the class is in this shard, everywhere if ``is_local`` is None."""
    return value if is_local is None else torch.where(is_local, value, other)


def _set_column_(logits: Tensor, column: Tensor, is_local: Tensor | None, value: Tensor | float) -> None:
    """Set ``logits[i, column[i]] = value[i]`` in place, where the class is in this shard; columns and values (N, 1)."""
    if is_local is not None:
        value = torch.where(is_local, value, logits.gather(1, column))
    logits.scatter_(1, column, value)


def _global_argmax(max_plain: Tensor, argmax_plain: Tensor, shard: ClassShard) -> Tensor:
    """Return the class of the highest plain logit over all shards; of equal logits, the lowest class.

    Args:
        max_plain: Highest plain logit in this shard, (N,).
        argmax_plain: Its index in this shard, (N,).
        shard: The shard.
    """
    if shard.group is None:
        return argmax_plain
    is_highest = max_plain == shard.all_reduce_(max_plain.clone(), dist.ReduceOp.MAX)
    prediction = torch.where(is_highest, argmax_plain + shard.start, shard.num_classes)
    return shard.all_reduce_(prediction, dist.ReduceOp.MIN).clamp_max(shard.num_classes - 1)  # all logits may be NaN
