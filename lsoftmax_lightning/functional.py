r"""The mathematics of Large-Margin Softmax on tensors: no modules, no state.

For a sample with feature :math:`x` and class :math:`y`, only the logit of its own class changes:

.. math::
    z_y = w_y^\top x, \quad n = \|w_y\|\,\|x\|, \quad c = \cos\theta_y = z_y / n

    \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \quad \theta \in [k\pi/m, (k+1)\pi/m]

    f_y = \frac{\lambda z_y + n\,\psi(\theta_y)}{1 + \lambda}

Source: Liu, Wen, Yu, Yang, "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016, sections 3.2
and 4 (arXiv 1612.02295).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .errors import InputError

_MAX_MARGIN = 100


def check_margin(margin: int) -> int:
    """Return ``margin`` if it is an integer from 1 to 100.

    Rounding errors of psi grow with m^2. At m = 100 the largest one in float32 is 5e-4; from about 150 on it exceeds
    1e-3. The time to compute psi grows with m.

    Raises:
        InputError: For anything else. Nothing is rounded: with 2.5 the paper's psi is not continuous.
    """
    if isinstance(margin, bool) or not isinstance(margin, int) or not 1 <= margin <= _MAX_MARGIN:
        raise InputError(
            f"margin: must be an integer >= 1 and <= {_MAX_MARGIN}, got {margin!r}; 1 is plain softmax and the paper "
            f"uses 2 to 4. Above {_MAX_MARGIN}, float32 is too inexact."
        )
    return margin


def cos_multiple(cosine: Tensor, m: int) -> Tensor:
    """Cosine of the m-fold angle from that of the angle, by the Chebyshev polynomial T_m.

    A polynomial has the true, finite derivative everywhere (m^2 at theta = 0), where ``acos`` gives NaN. It is not
    clamped: outside [-1, 1] by a rounding error it extrapolates, while a clamp would kill the gradient.

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
        return 2 * half * half - 1
    return 2 * half * cos_multiple(cosine, m // 2 + 1) - cosine


def psi(cosine: Tensor, margin: int) -> Tensor:
    """The paper's psi (section 3.2) as a function of cos(theta).

    It falls monotonically from 1 at theta = 0 to -(2m - 1) at theta = pi, with a continuous first derivative in
    ``cosine``. The second derivative jumps at the knots theta = j pi / m.

    Args:
        cosine: cos(theta), any shape, floating point.
        margin: m, an integer >= 1. With 1, psi is the cosine itself.

    Returns:
        psi, shaped like ``cosine``.

    Raises:
        InputError: If ``margin`` is not an integer >= 1.
    """
    multiple = cos_multiple(cosine, check_margin(margin))
    if margin == 1:
        return multiple
    # k counts the knots already passed. psi is C1, so a rounding that picks the neighbouring k does no harm.
    fixed = cosine.detach()
    k = sum((fixed < math.cos(j * math.pi / margin)).to(cosine.dtype) for j in range(1, margin))
    return (1 - 2 * (k % 2)) * multiple - 2 * k


def margin_target(
    target_logit: Tensor, feature_norm: Tensor, weight_norm: Tensor, margin: int, lambda_: float | Tensor
) -> Tensor:
    """The logit of a sample's own class under the margin, annealed by lambda (section 4).

    Row by row and free of any N x C tensor, so that a head sharded over processes can call it on its own rows.

    Args:
        target_logit: z_y, [N], float32 or float64.
        feature_norm: ``|x|``, [N].
        weight_norm: ``|w_y|``, [N].
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.

    Returns:
        f_y, [N].
    """
    norm = feature_norm * weight_norm
    # Far below any norm met in training, far above the square root of underflow, where the norm itself is wrong.
    cosine = target_logit / norm.clamp_min(torch.finfo(norm.dtype).eps ** 2)
    share = 1 / (1 + lambda_)
    return target_logit + share * (norm * psi(cosine, margin) - target_logit)


def own_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of each sample's own class, and the checked target.

    Args:
        logits: [N, C].
        target: Class of each sample, [N], an integer type.

    Returns:
        Logits, [N], and ``target`` as int64.

    Raises:
        InputError: If ``target`` is not [N] of an integer type, or holds a class outside 0 .. C-1. The latter is seen
            on the CPU outside ``torch.compile``; a GPU, which would have to be waited for, fails an assertion instead.
    """
    target = check_target(target, len(logits))
    if torch.compiler.is_compiling():
        return logits.gather(1, target.unsqueeze(1)).squeeze(1), target
    try:
        return logits.gather(1, target.unsqueeze(1)).squeeze(1), target
    except (RuntimeError, IndexError) as error:
        if "out of bounds" not in str(error):
            raise
        raise out_of_range(target, logits.shape[1]) from error


def check_target(target: Tensor, size: int) -> Tensor:
    """Returns ``target`` as int64.

    Args:
        target: Class of each sample, [N], an integer type.
        size: N.

    Raises:
        InputError: If ``target`` is not [N] of an integer type.
    """
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise InputError(f"target must hold class numbers of an integer type, got {target.dtype}; call target.long().")
    if target.shape != (size,):
        raise InputError(f"target must have one class for each of the {size} rows, got shape {tuple(target.shape)}.")
    return target.long()


def out_of_range(target: Tensor, num_classes: int) -> InputError:
    """The error for a target that holds a class outside 0 .. C-1."""
    return InputError(
        f"target must hold classes 0 to {num_classes - 1}, got {int(target.min())} to {int(target.max())}; "
        "check num_classes and the labels."
    )


def effective_margin(margin: int, lambda_: float) -> float:
    """The constant margin, seldom an integer, that the annealed loss amounts to for samples near their class.

    Around theta = 0 the annealed target (lambda cos(theta) + psi(theta)) / (1 + lambda) falls as cos(m' theta) does, to
    the second order, for m'^2 = (lambda + m^2) / (1 + lambda): 1 while lambda is high, m at lambda = 0.

    Args:
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, 0 to infinity.
    """
    return math.sqrt(1 + (margin**2 - 1) / (1 + lambda_))


def degrees(cosine: Tensor) -> Tensor:
    """Angles in degrees, 0 to 180, of cosines, which rounding may have put outside [-1, 1]; no use for training."""
    return cosine.clamp(-1, 1).arccos().rad2deg()


def target_angles(features: Tensor, weights: Tensor) -> Tensor:
    """theta_y: the angle of each sample to the weight of its class, in degrees.

    Args:
        features: x, [N, D].
        weights: w_y, the weight of each sample's class, [N, D].

    Returns:
        Angles, float32 [N].
    """
    return degrees(F.cosine_similarity(features.float(), weights.float()))


def evenly_spaced(num_classes: int) -> Tensor:
    """All classes or, of more than 10,000, evenly spaced ones: as many as a figure of their separation needs."""
    return torch.arange(0, num_classes, max(1, math.ceil(num_classes / 10_000)))


class Separation(NamedTuple):
    """Angles between directions, in degrees, 0-d; NaN where there are no two directions."""

    mean: Tensor
    """Between any two."""
    nearest: Tensor
    """From each to the one nearest to it, on average."""
    min: Tensor
    """Between the nearest two."""


def separation(directions: Tensor) -> Separation:
    """How far directions are apart, class weights for one. Of more than 10,000, :func:`evenly_spaced` ones are taken.

    Args:
        directions: [C, D], of any length but 0.
    """
    unit = F.normalize(directions[evenly_spaced(len(directions)).to(directions.device)].float())
    count = len(unit)
    if count < 2:
        return Separation(*unit.new_full((3,), math.nan))
    total, nearest = unit.new_zeros(()), []
    for start in range(0, count, 1024):  # so that the C x C angles are never held at once
        angles = degrees(unit[start : start + 1024] @ unit.T)
        own = angles.diagonal(start)  # of each direction to itself
        own.zero_()
        total += angles.sum()
        own.fill_(180.0)
        nearest.append(angles.amin(dim=1))
    least = torch.cat(nearest)
    return Separation(total / (count * (count - 1)), least.mean(), least.min())


def promote(*tensors: Tensor) -> list[Tensor]:
    """Converts tensors to float32, or to float64 if one of them is float64."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    # Exported graphs show every call of Tensor.to, also one that does nothing.
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def autocast_disabled(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast on the type of ``device``; a null context, which exported graphs do not show, if it is off."""
    kind = device.type
    enabled = _autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _autocast_available(kind: str) -> bool:
    """Return whether a type of device has autocast; some releases of ``torch.compile`` cannot trace the question."""
    return torch.amp.is_autocast_available(kind)


def plain_logits(features: Tensor, weight: Tensor) -> Tensor:
    """Logits without a margin, :func:`torch.nn.functional.linear` of features and weight.

    Computed in float32, with autocast disabled; in float64 if an input is float64.

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
    """Logits with the margin on each sample's own class: feed them to any cross-entropy.

    With a margin above 1 the result is computed in float32, or in float64 if an input is float64. The margin amplifies
    the rounding of the target logit by up to m^2. Logits of a lower precision than that therefore only supply the other
    classes, and the target logit is computed anew from ``features`` and ``weight``.

    Args:
        logits: Plain logits ``features @ weight.T``, [N, C].
        features: x, [N, D].
        weight: W, [C, D].
        target: Class of each sample, [N], an integer type.
        margin: m, an integer >= 1. With 1 the logits come back untouched.
        lambda_: Weight of the plain logit, 0 (the pure loss) to infinity (plain softmax); a number or a 0-d tensor.

    Returns:
        Logits, [N, C]; float32 for half-precision input when ``margin`` > 1.

    Raises:
        InputError: If ``margin`` is not an integer >= 1, or as :func:`own_logits`.
    """
    check_margin(margin)
    plain, target = own_logits(logits, target)
    if margin == 1:
        return logits
    rounded = logits
    logits, features, weight = promote(logits, features, weight)
    if rounded.dtype != logits.dtype:
        plain = (features * weight[target]).sum(dim=1)
    weight_norm = _own_norm(weight, target)
    feature_norm = torch.linalg.vector_norm(features, dim=1)
    own = margin_target(plain, feature_norm, weight_norm, margin, lambda_)
    return logits.scatter(1, target.unsqueeze(1), own.unsqueeze(1))


def margin_linear(
    features: Tensor, weight: Tensor, target: Tensor, margin: int, lambda_: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Logits with the margin, and without, from features and weight at once.

    As :func:`margin_logits` of :func:`torch.nn.functional.linear`, with the same gradients. Here these are written out,
    which of few classes, where every operation counts, saves a third of the time.

    Computed in float32, with autocast disabled; in float64 if an input is float64.

    Args:
        features: x, [N, D].
        weight: W, [C, D].
        target: Class of each sample, [N], an integer type.
        margin: m, an integer >= 1.
        lambda_: As in :func:`margin_logits`.

    Returns:
        Logits with the margin, and plain ones to predict and to measure with, [N, C] each.

    Raises:
        InputError: As :func:`margin_logits`.
    """
    check_margin(margin)
    features, weight = promote(features, weight)
    if margin > 1 and not torch.compiler.is_compiling():  # a compiler does better by itself
        target = check_target(target, len(features))
        try:
            with autocast_disabled(features.device):
                return _MarginLinear.apply(features, weight, target, margin, lambda_)  # type: ignore[no-any-return]
        except (RuntimeError, IndexError) as error:
            # let the other path name the classes; and transforms of functions are beyond what is written out
            if not any(said in str(error) for said in ("out of bounds", "out of range", "functorch transforms")):
                raise
    logits = plain_logits(features, weight)
    return margin_logits(logits, features, weight, target, margin, lambda_), logits


class _MarginLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, m: int, lambda_: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, at = F.linear(x, weight), target.unsqueeze(1)
        x_norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        w_norm = _own_norm(weight, target).unsqueeze(1)
        own, *slopes = margin_target_with_slopes(logits.gather(1, at), x_norm, w_norm, m, lambda_)
        ctx.save_for_backward(x, weight, target, *slopes)
        ctx.settings = target, m, lambda_
        ctx.mark_non_differentiable(logits)
        ctx.set_materialize_grads(False)
        return logits.scatter(1, at, own), logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        x, weight, target, of_z, of_x, of_w = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated in its turn, which is left to autograd
            logits = margin_logits(plain_logits(x, weight), x, weight, *ctx.settings)
            return *torch.autograd.grad(logits, (x, weight), gradient, create_graph=True), None, None, None
        at = target.unsqueeze(1)
        own = gradient.gather(1, at)
        gradient = gradient.scatter(1, at, own * of_z)
        of_rows = torch.zeros_like(weight[:, :1]).scatter_add(0, at, own * of_w)
        with autocast_disabled(x.device):  # backward may run where autocast is enabled
            of_x = torch.addmm(x * (own * of_x), gradient, weight)
            of_weight = torch.addmm(weight * of_rows, gradient.T, x)
        return of_x, of_weight, None, None, None


def _own_norm(weight: Tensor, target: Tensor) -> Tensor:
    """|w_y|, by the cheaper order: norms of all classes, or of the gathered rows."""
    norm: Tensor
    if len(weight) <= len(target):
        norm = torch.linalg.vector_norm(weight, dim=1)[target]
    else:
        norm = torch.linalg.vector_norm(weight[target], dim=1)
    return norm


def margin_target_with_slopes(
    target_logit: Tensor, feature_norm: Tensor, weight_norm: Tensor, margin: int, lambda_: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logit of :func:`margin_target` and its derivatives, without autograd.

    With n = ``|x| |w_y|``, df/dx = df/dz w_y + df/dn ``|w_y| / |x|`` x, and likewise for w_y.

    Args:
        target_logit: z_y, any shape.
        feature_norm: ``|x|``, shaped like ``target_logit``.
        weight_norm: ``|w_y|``, likewise.
        margin: m, an integer >= 2.
        lambda_: As in :func:`margin_target`.

    Returns:
        f_y, and the factors a, b and c in df/dx = a w_y + b x and df/dw_y = a x + c w_y; shaped like ``target_logit``.
    """
    tiny = torch.finfo(target_logit.dtype).eps ** 2
    x_norm, w_norm = feature_norm.clamp_min(tiny), weight_norm.clamp_min(tiny)
    norm = x_norm * w_norm
    cosine = target_logit / norm

    twice = 2 * cosine  # Chebyshev's polynomials of the second kind: T_m = c U_{m-1} - U_{m-2}, T_m' = m U_{m-1}
    u, u_below = twice, torch.ones_like(cosine)
    for _ in range(margin - 2):
        u, u_below = twice * u - u_below, u
    # a fake tensor, once in the cache, would meet real ones later
    segments = _segments.__wrapped__ if isinstance(cosine, FakeTensor) else _segments
    knots, signs = segments(margin, cosine.dtype, cosine.device)
    sign, slope, offset = signs[:, torch.bucketize(cosine, knots)]
    psi = torch.addcmul(offset, sign, cosine * u - u_below)
    slope = slope * u

    weight = 1 / (1 + float(lambda_))
    norm_slope, ratio = torch.addcmul(psi, cosine, slope, value=-1) * weight, w_norm / x_norm
    target_logit = target_logit.lerp(norm * psi, weight)
    return target_logit, slope * weight + (1 - weight), norm_slope * ratio, norm_slope / ratio


@lru_cache
def _segments(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines at the knots of psi, rising; for each segment between them (-1)^k, m (-1)^k and -2k."""
    k = torch.arange(m - 1, -1, -1, dtype=torch.float64)
    sign = 1 - 2 * (k % 2)
    knots = torch.cos(k[:-1] * math.pi / m)
    return knots.to(device, dtype), torch.stack([sign, m * sign, -2 * k]).to(device, dtype)
