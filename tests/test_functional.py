"""Loss compared with the trigonometric definition, and known failures of other implementations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lsoftmax_lightning.chunked_loss import lsoftmax_cross_entropy
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.functional import cos_multiple, margin_logits, psi

MARGINS = range(1, 7)


def reference_psi(theta: Tensor, m: int) -> Tensor:
    k = (theta * m / math.pi).floor().clamp(max=m - 1)
    return (-1.0) ** k * torch.cos(m * theta) - 2 * k


def reference_logits(x: Tensor, weight: Tensor, target: Tensor, m: int, lambda_: float) -> Tensor:
    """Compute logits row by row in float64, by the definition in section 3.2 and the annealing of the paper."""
    x, weight = x.double(), weight.double()
    logits = x @ weight.T
    for row, label in enumerate(target.tolist()):
        norm = x[row].norm() * weight[label].norm()
        theta = torch.arccos((logits[row, label] / norm).clamp(-1, 1))
        logits[row, label] = (lambda_ * logits[row, label] + norm * reference_psi(theta, m)) / (1 + lambda_)
    return logits


def batch(n: int = 8, d: int = 5, c: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + d + c)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    weight = torch.randn(c, d, generator=generator, dtype=dtype)
    return x, weight, torch.randint(c, (n,), generator=generator)


def logits_of(x: Tensor, weight: Tensor, target: Tensor, m: int, lambda_: float | Tensor = 0.0) -> Tensor:
    return margin_logits(F.linear(x, weight), x, weight, target, m, lambda_)


@pytest.mark.parametrize("lambda_", [0.0, 3.0])
@pytest.mark.parametrize("m", MARGINS)
def test_logits_equal_the_definition(m: int, lambda_: float) -> None:
    x, weight, target = batch(n=10_000, d=3, c=20)  # narrow features, so that every segment has samples
    expected = reference_logits(x, weight, target, m, lambda_)
    scale = x.norm(dim=1, keepdim=True) * weight.norm(dim=1).max()
    assert ((logits_of(x, weight, target, m, lambda_) - expected).abs() / scale).max() < 1e-10
    single = logits_of(x.float(), weight.float(), target, m, lambda_)
    assert single.dtype == torch.float32
    assert ((single - expected).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("m", MARGINS)
def test_cos_multiple_equals_the_cosine_of_the_multiple_angle(m: int) -> None:
    theta = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    torch.testing.assert_close(cos_multiple(theta.cos(), m), (m * theta).cos(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("m", MARGINS)
def test_psi_derivative_is_exact_at_knots_and_ends(m: int) -> None:
    knots = torch.tensor([math.cos(j * math.pi / m) for j in range(m + 1)], dtype=torch.float64)
    cosine = torch.cat([knots, knots + 1e-4, knots - 1e-4]).requires_grad_()
    # one-sided second derivatives differ at a knot by at most m^4, which times eps bounds the error
    assert gradcheck(lambda c: psi(c, m), cosine, eps=1e-7, atol=1e-3)
    ends = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(psi(ends, m).sum(), ends)
    torch.testing.assert_close(slope, torch.full_like(ends, m**2))


@pytest.mark.parametrize("m", MARGINS)
def test_first_and_second_derivatives_pass_gradcheck(m: int) -> None:
    x, weight, target = batch()
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(lambda x, w: logits_of(x, w, target, m, 0.5), inputs)
    assert gradgradcheck(lambda x, w: logits_of(x, w, target, m, 0.5), inputs)


@pytest.mark.parametrize("offset", [0.0, 1e-9, -1e-9, 1e-3, -1e-3])
@pytest.mark.parametrize("m", MARGINS)
def test_gradients_at_and_around_every_knot(m: int, offset: float) -> None:
    """At j = 0 the feature is parallel to the weight, at j = m opposite."""
    weight = torch.tensor([[1.0, 0.0], [0.3, -0.8]], dtype=torch.float64, requires_grad=True)
    for theta in (j * math.pi / m + offset for j in range(m + 1)):
        x = torch.tensor([[2 * math.cos(theta), 2 * math.sin(theta)]], dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x, w: logits_of(x, w, torch.tensor([0]), m), (x, weight), eps=1e-7, atol=1e-4)


@given(
    m=st.integers(1, 8),
    angles=st.tuples(st.floats(0, math.pi), st.floats(0, math.pi)),
)
def test_psi_falls_in_theta_and_is_bounded(m: int, angles: tuple[float, float]) -> None:
    near, far = sorted(angles)
    above, below = psi(torch.tensor([near, far], dtype=torch.float64).cos(), m).tolist()
    assert above >= below - 1e-12
    assert -(2 * m - 1) - 1e-12 <= below <= above + 1e-12 <= 1 + 2e-12


@given(m=st.integers(2, 8), data=st.data())
def test_psi_and_its_derivative_are_continuous_at_the_knots(m: int, data: st.DataObject) -> None:
    j = data.draw(st.integers(1, m - 1))
    step = data.draw(st.floats(1e-12, 1e-7))
    cosine = math.cos(j * math.pi / m) + torch.tensor([-step, step], dtype=torch.float64)
    cosine.requires_grad_()
    values = psi(cosine, m)
    (slopes,) = torch.autograd.grad(values.sum(), cosine)
    assert abs(values[0] - values[1]).item() <= 4 * m**2 * step + 1e-12
    assert abs(slopes[0] - slopes[1]).item() <= 4 * m**4 * step + 1e-9


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 7), lambda_=st.floats(0, 100))
def test_the_loss_grows_with_the_margin(seed: int, m: int, lambda_: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (6,), generator=generator)
    smaller, larger = (logits_of(x, weight, target, margin, lambda_) for margin in (m, m + 1))
    column = target.unsqueeze(1)
    assert (larger.gather(1, column) <= smaller.gather(1, column) + 1e-9).all()
    losses = [lsoftmax_cross_entropy(x, weight, target, margin, lambda_) for margin in (m, m + 1)]
    assert losses[0] <= losses[1] + 1e-9


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 6))
def test_infinite_lambda_and_margin_one_are_softmax_to_the_bit(seed: int, m: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    target = torch.randint(3, (6,), generator=generator)
    plain = F.linear(x, weight)
    for lambda_ in (math.inf, torch.tensor(math.inf)):
        assert torch.equal(logits_of(x, weight, target, m, lambda_), plain)
    assert torch.equal(logits_of(x, weight, target, 1), plain)
    assert torch.equal(lsoftmax_cross_entropy(x, weight, target, 1), F.cross_entropy(plain, target))


@pytest.mark.parametrize("m", MARGINS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-19, 1e-4, 1e4])
def test_zero_tiny_and_huge_rows_stay_finite(m: int, scale: float) -> None:
    x, weight, target = batch(dtype=torch.float32)
    x, weight = (x * scale).requires_grad_(), weight.clone()
    weight[target[0]] = 0
    weight.requires_grad_()
    logits = logits_of(x, weight, target, m)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    assert logits.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_and_large_features_keep_their_angle(scale: float) -> None:
    x, weight, target = batch(dtype=torch.float32)
    torch.testing.assert_close(
        logits_of(x * scale, weight, target, 4), scale * logits_of(x, weight, target, 4), rtol=1e-4, atol=1e-5 * scale
    )


@pytest.mark.parametrize("m", [1, 3])
def test_an_empty_batch_has_loss_zero_and_a_gradient(m: int) -> None:
    x = torch.empty(0, 5, requires_grad=True)
    weight = torch.randn(4, 5, requires_grad=True)
    loss = lsoftmax_cross_entropy(x, weight, torch.empty(0, dtype=torch.long), m)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_accepted(dtype: torch.dtype) -> None:
    x, weight, target = batch()
    assert torch.equal(
        lsoftmax_cross_entropy(x, weight, target.to(dtype), 3), lsoftmax_cross_entropy(x, weight, target, 3)
    )


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(8), "float32"),
        (torch.zeros(8, dtype=torch.bool), "bool"),
        (torch.zeros(8, 1, dtype=torch.long), r"must have shape \(8,\), got \(8, 1\)"),
        (torch.zeros(7, dtype=torch.long), r"must have shape \(8,\), got \(7,\)"),
        (torch.tensor([0, 1, 2, 3, 0, 1, 2, -1]), "0 to 3, got -1 to 3"),
        (torch.tensor([0, 1, 2, 4, 0, 1, 2, 3]), "0 to 3, got 0 to 4"),
    ],
)
def test_invalid_labels_are_rejected(m: int, target: Tensor, message: str) -> None:
    x, weight, _ = batch()
    with pytest.raises(InputError, match=message):
        logits_of(x, weight, target, m)


@pytest.mark.parametrize("margin", [0, -1, 2.5, 2.0, True, "2", None, 101, 10**9])
def test_invalid_margins_are_rejected(margin: object) -> None:
    x, weight, target = batch()
    with pytest.raises(InputError, match="integer from 1 to 100"):
        logits_of(x, weight, target, margin)  # type: ignore[arg-type]


def test_float32_is_accurate_up_to_the_largest_margin() -> None:
    theta = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    features = torch.stack([theta.cos(), theta.sin()], dim=1)
    expected = reference_psi(theta, 100)
    target = torch.zeros(len(theta), dtype=torch.long)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-11)):
        x, weight = features.to(dtype), torch.eye(2, dtype=dtype)
        logits = logits_of(x, weight, target, 100)
        assert (logits[:, 0] - expected).abs().max() < tolerance


@pytest.mark.parametrize("n", [2, 8])  # with fewer and more rows than classes, norms are computed in a different order
def test_both_orders_of_the_norms_agree(n: int) -> None:
    x, weight, target = batch(n=n)
    torch.testing.assert_close(logits_of(x, weight, target, 4), reference_logits(x, weight, target, 4, 0.0))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_vmap_and_grad_give_per_sample_gradients(m: int) -> None:
    x, weight, target = batch()

    def loss(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return lsoftmax_cross_entropy(x[None], weight, target[None], m, 0.5)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, target)
    for row in range(len(x)):
        single = weight.clone().requires_grad_()
        loss(single, x[row], target[row]).backward()
        torch.testing.assert_close(each[row], single.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_single(dtype: torch.dtype) -> None:
    x, weight, target = (t.to(dtype) if t.is_floating_point() else t for t in batch())
    logits = logits_of(x, weight, target, 4)
    assert logits.dtype == torch.float32
    error = (logits - reference_logits(x, weight, target, 4, 0.0)).abs()
    scale = x.double().norm(dim=1).max() * weight.double().norm(dim=1).max()
    assert error.max() < torch.finfo(dtype).eps * scale  # other logits have the rounding of the product
    assert error.gather(1, target[:, None]).max() < 1e-5 * scale


def test_label_smoothing_equals_torch() -> None:
    x, weight, target = batch()
    expected = F.cross_entropy(logits_of(x, weight, target, 2), target, label_smoothing=0.1)
    assert torch.equal(lsoftmax_cross_entropy(x, weight, target, 2, label_smoothing=0.1), expected)


@pytest.mark.parametrize("m", MARGINS)
def test_gradients_are_finite_for_zero_vectors(m: int) -> None:
    x, weight = (
        torch.eye(4)[:, :3].clone().requires_grad_(),
        torch.eye(3)[[0, 1, 1]].mul(torch.tensor([1, 0, 1])[:, None]),
    )
    weight.requires_grad_()
    logits = logits_of(x, weight, torch.tensor([0, 1, 1, 2]), m)
    assert logits.isfinite().all()
    for gradient in torch.autograd.grad(logits.sum(), (x, weight)):
        assert gradient.isfinite().all()
