r"""Large-Margin Softmax as functions of tensors.

For a sample with feature :math:`x` and class :math:`y`, only the target logit changes:

.. math::
    z_y = w_y^\top x, \quad n = \|w_y\|\,\|x\|, \quad c = \cos\theta_y = z_y / n

    \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \quad \theta \in [k\pi/m, (k+1)\pi/m]

    f_y = \frac{\lambda z_y + n\,\psi(\theta_y)}{1 + \lambda}

Source: Liu, Wen, Yu, Yang, "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016 (arXiv
1612.02295). Section 3.2 defines psi.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

_MAX_MARGIN = 100


def check_margin(margin: int) -> int:
    """Return ``margin`` if it is an integer from 1 to 100.

    The rounding error of psi grows with m^2. In float32 its maximum is 5e-4 at m = 100, and above 1e-3 from about
    m = 150. The time to compute psi grows with m, too.

    Raises:
        InputError: If ``margin`` is anything else. cos(m theta) is a polynomial of cos(theta) for integers only.
    """
    if isinstance(margin, bool) or not isinstance(margin, int) or not 1 <= margin <= _MAX_MARGIN:
        raise InputError(
            f"margin: must be an integer from 1 to {_MAX_MARGIN}, got {margin!r}; use 1 for plain softmax, or 2 to 4 "
            "as in the paper."
        )
    return margin


def check_lambda(lambda_: float | Tensor) -> None:
    """Check that lambda is at least 0; a tensor is not checked, because reading it would synchronise the device.

    Raises:
        InputError: If it is negative or NaN.
    """
    if not isinstance(lambda_, Tensor) and not lambda_ >= 0:
        raise InputError(
            f"lambda_: must be at least 0, got {lambda_}; use 0 for the pure loss, or infinity for plain softmax."
        )


def cos_multiple(cosine: Tensor, m: int) -> Tensor:
    """Compute cos(m theta) from cos(theta) by the Chebyshev polynomial T_m.

    Its derivative is finite everywhere: m^2 at theta = 0, where ``acos`` gives NaN. The cosine is not clamped, because
    a clamp has no gradient. A cosine just outside [-1, 1], after a rounding error, is extrapolated.

    Args:
        cosine: cos(theta), any shape.
        m: The multiple, an integer >= 1.

    Returns:
        cos(m theta), shaped like ``cosine``.
    """
    if m == 1:
        return cosine
    half = cos_multiple(cosine, m // 2)
    if m % 2 == 0:
        return 2 * half.square() - 1
    return 2 * half * cos_multiple(cosine, m // 2 + 1) - cosine


def psi(cosine: Tensor, margin: int) -> Tensor:
    """Compute the paper's psi (section 3.2) from cos(theta).

    psi falls monotonically from 1 at theta = 0 to -(2m - 1) at theta = pi, with a continuous first derivative in
    ``cosine``. The second derivative jumps at the knots theta = j pi / m.

    Args:
        cosine: cos(theta), any shape, floating point.
        margin: m, an integer >= 1. With 1, psi is the cosine itself.

    Returns:
        psi, shaped like ``cosine``.

    Raises:
        InputError: If ``margin`` is out of range (:func:`check_margin`).

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.functional import psi
        >>> psi(torch.tensor([1.0, 0.0, -1.0]), margin=2)
        tensor([ 1., -1., -3.])
    """
    multiple = cos_multiple(cosine, check_margin(margin))
    if margin == 1:
        return multiple
    # Value and slope are continuous at the knots, so rounding to the neighbouring segment is harmless.
    k = (cosine.detach().clamp(-1, 1).arccos() * (margin / math.pi)).floor().clamp_max(margin - 1)
    return torch.addcmul(-2 * k, 1 - 2 * (k % 2), multiple)


def margin_target_logit(
    plain: Tensor, feature_norm: Tensor, weight_norm: Tensor, margin: int, lambda_: float | Tensor
) -> Tensor:
    """Compute the target logit with the margin, annealed by lambda.

    No (N, C) tensor is needed, so each rank of a sharded head can compute the target logits of its own classes.

    Args:
        plain: Plain target logit z_y, (N,), float32 or float64.
        feature_norm: ``|x|``, (N,).
        weight_norm: ``|w_y|``, (N,).
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.

    Returns:
        f_y, (N,).
    """
    norm = feature_norm * weight_norm
    # The bound, 1e-14 in float32, is far below norms in training and far above those whose squares underflow.
    cosine = plain / norm.clamp_min(torch.finfo(norm.dtype).eps ** 2)
    fraction = 1 / (1 + lambda_)
    return plain + fraction * (norm * psi(cosine, margin) - plain)


def gather_target_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check the target, and gather the logit of each sample's target class.

    Args:
        logits: Logits, (N, C).
        target: Class of each sample, (N,), an integer type.

    Returns:
        Target logits, (N,), and ``target`` as int64.

    Raises:
        InputError: If ``logits`` are not (N, C), or ``target`` is not (N,) of an integer type, or contains a class
            outside 0 .. C-1. On a GPU, where a check would need a synchronisation, an invalid class fails a device-side
            assertion instead. In a compiled graph the classes are not checked here.
    """
    target = check_target(target, len(logits))
    if logits.ndim != 2:
        raise InputError(
            f"features: must be (N, D), one row for each sample, got logits of shape {tuple(logits.shape)}; pool or "
            "flatten the features."
        )
    if torch.compiler.is_compiling():
        return logits.gather(1, target.unsqueeze(1)).squeeze(1), target
    try:
        return logits.gather(1, target.unsqueeze(1)).squeeze(1), target
    except (RuntimeError, IndexError) as error:
        if not is_in_range(target, logits.shape[1]).all():
            raise out_of_range_error(target, logits.shape[1]) from error
        raise


def check_target(target: Tensor, size: int) -> Tensor:
    """Check the dtype and shape of ``target``, and return it as int64.

    Args:
        target: Class of each sample, (N,), an integer type.
        size: N.

    Raises:
        InputError: If ``target`` is not (N,) of an integer type.
    """
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise InputError(f"target: must have an integer dtype, got {target.dtype}; call target.long().")
    if target.shape != (size,):
        raise InputError(f"target: must have shape ({size},), got {tuple(target.shape)}; pass one class per sample.")
    return target.long()


def is_in_range(target: Tensor, num_classes: int) -> Tensor:
    """Return whether each class in ``target`` is one of 0 .. C-1, bool (N,)."""
    return (target >= 0) & (target < num_classes)


def out_of_range_error(target: Tensor, num_classes: int) -> InputError:
    """Return the error for a target with a class outside 0 .. C-1."""
    return InputError(
        f"target: must contain classes 0 to {num_classes - 1}, got {int(target.min())} to {int(target.max())}; "
        "check num_classes and the labels."
    )


def promote(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to float32, or to float64 if one of them is float64."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    # An exported graph contains every call of Tensor.to, even one that does nothing.
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def autocast_disabled(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast on the type of ``device``; a null context, absent from exported graphs, if it is disabled."""
    device_type = device.type
    enabled = _autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _autocast_available(device_type: str) -> bool:
    """Return whether a device type supports autocast; some releases of ``torch.compile`` cannot trace this call."""
    return torch.amp.is_autocast_available(device_type)


def plain_logits(features: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits without a margin, by :func:`torch.nn.functional.linear`.

    They are computed in float32, with autocast disabled, or in float64 if an input is float64.

    Args:
        features: x, (N, D).
        weight: W, (C, D).

    Returns:
        Logits, (N, C).
    """
    with autocast_disabled(features.device):
        return F.linear(*promote(features, weight))


def margin_logits(
    logits: Tensor, features: Tensor, weight: Tensor, target: Tensor, margin: int, lambda_: float | Tensor = 0.0
) -> Tensor:
    """Put the margin on the target logit of each sample, for any cross-entropy.

    With a margin above 1 the result is computed in float32, or in float64 if an input is float64. The margin amplifies
    the rounding error of the target logit by up to m^2. If ``logits`` have a lower precision, the target logits are
    therefore computed again from ``features`` and ``weight``.

    Args:
        logits: Plain logits ``features @ weight.T``, (N, C).
        features: x, (N, D).
        weight: W, (C, D).
        target: Class of each sample, (N,), an integer type.
        margin: m, an integer >= 1. With 1, ``logits`` are returned unchanged.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.

    Returns:
        Logits, (N, C); float32 for half-precision input when ``margin`` > 1.

    Raises:
        InputError: If ``margin`` or a number ``lambda_`` is out of range, or ``target`` is invalid
            (:func:`gather_target_logits`).

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.functional import margin_logits
        >>> x, weight = torch.tensor([[0.0, 1.0]]), torch.eye(2)
        >>> margin_logits(x @ weight.T, x, weight, torch.tensor([0]), margin=2)
        tensor([[-1.,  1.]])
    """
    check_margin(margin)
    check_lambda(lambda_)
    plain, target = gather_target_logits(logits, target)
    if margin == 1:
        return logits
    logits, features, weight = promote(logits, features, weight)
    if plain.dtype != logits.dtype:  # not precise enough for the margin
        plain = (features * weight[target]).sum(dim=1)
    feature_norm = torch.linalg.vector_norm(features, dim=1)
    if len(weight) <= len(target):  # norms of all C rows, or of the N gathered ones, whichever are fewer
        weight_norm = torch.linalg.vector_norm(weight, dim=1)[target]
    else:
        weight_norm = torch.linalg.vector_norm(weight[target], dim=1)
    target_logit = margin_target_logit(plain, feature_norm, weight_norm, margin, lambda_)
    return logits.scatter(1, target.unsqueeze(1), target_logit.unsqueeze(1))
