"""The loss against the trigonometric definition, and every way in which other implementations fail."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.functional import (
    _segments,
    cos_multiple,
    degrees,
    effective_margin,
    margin_linear,
    margin_logits,
    psi,
    separation,
    target_angles,
)
from lsoftmax_lightning.losses import lsoftmax_cross_entropy

MARGINS = range(1, 7)


def reference_psi(theta: Tensor, m: int) -> Tensor:
    k = (theta * m / math.pi).floor().clamp(max=m - 1)
    return (-1.0) ** k * torch.cos(m * theta) - 2 * k


def reference_logits(x: Tensor, weight: Tensor, target: Tensor, m: int, lambda_: float) -> Tensor:
    """Row by row, in float64, by the definition of the paper's section 3.2 and the annealing of section 4."""
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
def test_agrees_with_the_definition(m: int, lambda_: float) -> None:
    x, weight, target = batch(n=10_000, d=3, c=20)  # narrow features, so that every segment is met
    expected = reference_logits(x, weight, target, m, lambda_)
    scale = x.norm(dim=1, keepdim=True) * weight.norm(dim=1).max()
    assert ((logits_of(x, weight, target, m, lambda_) - expected).abs() / scale).max() < 1e-10
    single = logits_of(x.float(), weight.float(), target, m, lambda_)
    assert single.dtype == torch.float32
    assert ((single - expected).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("m", MARGINS)
def test_cos_multiple(m: int) -> None:
    theta = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    torch.testing.assert_close(cos_multiple(theta.cos(), m), (m * theta).cos(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("m", MARGINS)
def test_psi_derivative_is_right_at_the_knots_and_the_ends(m: int) -> None:
    knots = torch.tensor([math.cos(j * math.pi / m) for j in range(m + 1)], dtype=torch.float64)
    cosine = torch.cat([knots, knots + 1e-4, knots - 1e-4]).requires_grad_()
    # the one-sided second derivatives differ at a knot, by at most m^4: that times eps is the error allowed
    assert gradcheck(lambda c: psi(c, m), cosine, eps=1e-7, atol=1e-3)
    ends = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(psi(ends, m).sum(), ends)
    torch.testing.assert_close(slope, torch.full_like(ends, m**2))


@pytest.mark.parametrize("m", MARGINS)
def test_gradients(m: int) -> None:
    x, weight, target = batch()
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(lambda x, w: logits_of(x, w, target, m, 0.5), inputs)
    assert gradgradcheck(lambda x, w: logits_of(x, w, target, m, 0.5), inputs)


@pytest.mark.parametrize("beside", [0.0, 1e-9, -1e-9, 1e-3, -1e-3])
@pytest.mark.parametrize("m", MARGINS)
def test_gradients_at_and_around_every_knot(m: int, beside: float) -> None:
    """j = 0 and j = m are the collinear and the opposite feature."""
    weight = torch.tensor([[1.0, 0.0], [0.3, -0.8]], dtype=torch.float64, requires_grad=True)
    for theta in (j * math.pi / m + beside for j in range(m + 1)):
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
    own = target.unsqueeze(1)
    assert (larger.gather(1, own) <= smaller.gather(1, own) + 1e-9).all()
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
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    x, weight, target = batch()
    assert torch.equal(
        lsoftmax_cross_entropy(x, weight, target.to(dtype), 3), lsoftmax_cross_entropy(x, weight, target, 3)
    )


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.zeros(8), "float32"),
        (torch.zeros(8, dtype=torch.bool), "bool"),
        (torch.zeros(8, 1, dtype=torch.long), r"8 rows, got shape \(8, 1\)"),
        (torch.zeros(7, dtype=torch.long), r"8 rows, got shape \(7,\)"),
        (torch.tensor([0, 1, 2, 3, 0, 1, 2, -1]), "0 to 3, got -1 to 3"),
        (torch.tensor([0, 1, 2, 4, 0, 1, 2, 3]), "0 to 3, got 0 to 4"),
    ],
)
def test_bad_labels_are_refused(m: int, target: Tensor, said: str) -> None:
    x, weight, _ = batch()
    with pytest.raises(InputError, match=said):
        logits_of(x, weight, target, m)


@pytest.mark.parametrize("margin", [0, -1, 2.5, 2.0, True, "2", None, 101, 10**9])
def test_bad_margins_are_refused(margin: object) -> None:
    x, weight, target = batch()
    with pytest.raises(InputError, match="integer >= 1"):
        logits_of(x, weight, target, margin)  # type: ignore[arg-type]


def test_float32_is_accurate_up_to_the_largest_margin() -> None:
    theta = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    features = torch.stack([theta.cos(), theta.sin()], dim=1)
    expected = reference_psi(theta, 100)
    target = torch.zeros(len(theta), dtype=torch.long)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-11)):
        x, weight = features.to(dtype), torch.eye(2, dtype=dtype)
        for logits in (margin_linear(x, weight, target, 100)[0], logits_of(x, weight, target, 100)):
            assert (logits[:, 0] - expected).abs().max() < tolerance


@pytest.mark.parametrize("n", [2, 8])  # fewer and more rows than classes: the norms are taken in another order
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
        own = weight.clone().requires_grad_()
        loss(own, x[row], target[row]).backward()
        torch.testing.assert_close(each[row], own.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_single(dtype: torch.dtype) -> None:
    x, weight, target = (t.to(dtype) if t.is_floating_point() else t for t in batch())
    logits = logits_of(x, weight, target, 4)
    assert logits.dtype == torch.float32
    error = (logits - reference_logits(x, weight, target, 4, 0.0)).abs()
    scale = x.double().norm(dim=1).max() * weight.double().norm(dim=1).max()
    assert error.max() < torch.finfo(dtype).eps * scale  # the other classes keep the rounding of the product
    assert error.gather(1, target[:, None]).max() < 1e-5 * scale


def test_label_smoothing_is_that_of_torch() -> None:
    x, weight, target = batch()
    expected = F.cross_entropy(margin_linear(x, weight, target, 2)[0], target, label_smoothing=0.1)
    assert torch.equal(lsoftmax_cross_entropy(x, weight, target, 2, label_smoothing=0.1), expected)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 5.0, 1000.0])
@pytest.mark.parametrize("m", MARGINS)
def test_the_effective_margin_is_that_of_the_annealed_loss_near_a_class(m: int, lambda_: float) -> None:
    theta = torch.tensor(1e-3, dtype=torch.float64)
    annealed = (lambda_ * torch.cos(theta) + psi(torch.cos(theta), m)) / (1 + lambda_)
    assert effective_margin(m, lambda_) == pytest.approx(float(torch.arccos(annealed) / theta), rel=1e-5)
    assert effective_margin(m, 0.0) == m
    assert effective_margin(m, math.inf) == 1


def test_angles_of_samples_to_their_class() -> None:
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    features = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, -7.0]], dtype=torch.bfloat16)
    angles = target_angles(features, weight[[0, 1, 0, 1]])
    torch.testing.assert_close(angles, torch.tensor([0.0, 45.0, 180.0, 180.0]))
    assert degrees(torch.tensor([1 + 1e-6, -1 - 1e-6])).tolist() == [0, 180]


@pytest.mark.parametrize("count", [2, 7, 1024, 1500])  # within one block of rows, at its edge and beyond
def test_separation_is_that_of_all_pairs(count: int) -> None:
    directions = (
        torch.randn(count, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, count)[:, None]
    )
    unit = F.normalize(directions.double())
    angles = torch.rad2deg(torch.arccos((unit @ unit.T).clamp(-1, 1)))
    others = angles[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    found = separation(directions)
    expected = (others.mean(), others.min(1).values.mean(), others.min())
    assert [float(angle) for angle in found] == pytest.approx([float(angle) for angle in expected], rel=1e-3)


def test_one_direction_is_apart_from_nothing() -> None:
    assert all(math.isnan(angle) for angle in separation(torch.ones(1, 3)))


def test_of_very_many_directions_some_are_taken() -> None:
    directions = torch.eye(2).repeat(6000, 1)  # every second one, all the same way
    assert separation(directions).mean == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("num_classes", [3, 50])  # fewer than samples, and more
@pytest.mark.parametrize("m", MARGINS)
def test_written_out_gradients_are_those_of_autograd(m: int, num_classes: int) -> None:
    torch.manual_seed(m)
    x, weight = (torch.randn(n, 5, dtype=torch.float64) for n in (20, num_classes))
    target = torch.randint(num_classes, (20,))
    x[0], x[1] = weight[target[0]], -3 * weight[target[1]]  # the least angle, and the greatest
    x.requires_grad_()
    weight.requires_grad_()
    plain = F.linear(x, weight)
    expected = margin_logits(plain, x, weight, target, m, 0.3)
    for lambda_ in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        logits, also_plain = margin_linear(x, weight, target, m, lambda_)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
        assert torch.equal(also_plain, plain)
        gradient = torch.randn(logits.shape, dtype=torch.float64)
        for found, right in zip(
            torch.autograd.grad(logits, (x, weight), gradient, retain_graph=True),
            torch.autograd.grad(expected, (x, weight), gradient, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("m", MARGINS)
def test_written_out_gradients_are_finite_where_there_is_no_angle(m: int) -> None:
    x, weight = (
        torch.eye(4)[:, :3].clone().requires_grad_(),
        torch.eye(3)[[0, 1, 1]].mul(torch.tensor([1, 0, 1])[:, None]),
    )
    weight.requires_grad_()
    logits, _ = margin_linear(x, weight, torch.tensor([0, 1, 1, 2]), m)
    assert logits.isfinite().all()
    for gradient in torch.autograd.grad(logits.sum(), (x, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("m", [2, 3, 4])
def test_written_out_gradients_have_derivatives_and_transforms(m: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 3))
    target = torch.randint(3, (6,))

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(margin_linear(x, weight, target, m, 0.5)[0], target)

    assert gradcheck(lambda x, weight: loss(x, weight, target), (x, weight))
    assert gradgradcheck(lambda x, weight: loss(x, weight, target), (x, weight))

    def of_one(x: Tensor, target: Tensor) -> Tensor:
        return loss(x[None], weight.detach(), target[None])

    each = torch.func.vmap(torch.func.grad(of_one))(x.detach(), target)
    torch.testing.assert_close(each / 6, torch.autograd.grad(loss(x, weight, target), x)[0])


@pytest.mark.parametrize("wrong", [-1, 3])
def test_margin_linear_names_a_class_that_is_not_there(wrong: int) -> None:
    with pytest.raises(InputError, match="target must hold classes 0 to 2"):
        margin_linear(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, wrong]), 3)


def test_a_call_on_fake_tensors_leaves_real_ones_alone() -> None:
    _segments.cache_clear()
    with FakeTensorMode():
        margin_linear(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64), margin=3)
    logits, _ = margin_linear(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4]), margin=3)
    assert logits.isfinite().all()
