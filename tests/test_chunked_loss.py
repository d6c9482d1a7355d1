"""Chunked loss compared with the loss of dense logits."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.chunked_loss import (
    CHUNKED_FROM,
    chunked_cross_entropy,
    is_plain_cross_entropy,
    lsoftmax_cross_entropy,
)
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.functional import margin_logits

from .helpers.training import make_model

pytestmark = pytest.mark.usefixtures("chunks")


def batch(size: int, width: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(size + classes)
    x, weight = (torch.randn(n, width, dtype=dtype, requires_grad=True) for n in (size, classes))
    return x, weight, torch.randint(classes, (size,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 64, 150])  # less than a chunk, one chunk, and more
def test_loss_and_gradients_equal_those_of_the_dense_logits(m: int, size: int, smoothing: float) -> None:
    x, weight, target = batch(size, 16, 37)
    plain = F.linear(x, weight)
    logits = margin_logits(plain, x, weight, target, m, 0.3)
    loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
    found = chunked_cross_entropy(x, weight, target.int(), m, 0.3, smoothing)
    torch.testing.assert_close(found.loss, loss, rtol=0, atol=1e-12)
    assert torch.equal(found.prediction, plain.argmax(1))
    assert torch.equal(found.correct, logits.argmax(1) == target)
    whole, chunked = (torch.autograd.grad(2.5 * each, (x, weight)) for each in (loss, found.loss))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", [0, 1])
def test_gradient_of_only_one_input(asked: int) -> None:
    x, weight, target = batch(70, 16, 5)
    whole = torch.autograd.grad(chunked_cross_entropy(x, weight, target, 3).loss, (x, weight))[asked]
    inputs = [tensor.detach().requires_grad_(index == asked) for index, tensor in enumerate((x, weight))]
    (alone,) = torch.autograd.grad(chunked_cross_entropy(*inputs, target, 3).loss, inputs[asked])
    assert torch.equal(alone, whole)
    assert not chunked_cross_entropy(x.detach(), weight.detach(), target, 3).loss.requires_grad


def test_backward_runs_only_once() -> None:
    x, weight, target = batch(70, 16, 5)
    loss = chunked_cross_entropy(x, weight, target, 3).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run only once"):
        loss.backward()
    loss = chunked_cross_entropy(x, weight, target, 3).loss
    with pytest.raises(RuntimeError, match="no second derivatives"):  # would be silently ignored
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradients_are_computed_without_grad_mode(context: Callable[[], AbstractContextManager[None]]) -> None:
    x, _, target = batch(70, 16, CHUNKED_FROM, torch.float32)
    head = LSoftmaxLinear(16, CHUNKED_FROM, margin=3, lambda_=0.3)
    expected = chunked_cross_entropy(x, head.weight, target, 3, 0.3)
    with context(), torch.profiler.profile() as profile:
        found = head.cross_entropy(x, target)
        plain = head.plain_cross_entropy(x, target)
    assert torch.equal(found.loss, expected.loss.detach())
    assert torch.equal(found.prediction, expected.prediction)
    assert not found.loss.requires_grad
    torch.testing.assert_close(plain, F.cross_entropy(F.linear(x, head.weight), target).detach())
    assert not {"aten::addmm_", "aten::index_add_"} & {event.name for event in profile.events()}


def test_criterion_with_weight_or_ignore_index_is_not_replaced() -> None:
    assert is_plain_cross_entropy(nn.CrossEntropyLoss(label_smoothing=0.1))
    for settings in ({"weight": torch.ones(4)}, {"reduction": "sum"}, {"ignore_index": 0}):
        assert not is_plain_cross_entropy(nn.CrossEntropyLoss(**settings))  # type: ignore[arg-type]


def test_unsupported_settings_are_rejected() -> None:
    x, weight, target = batch(4, 16, 5)
    with pytest.raises(InputError, match="lambda_: must not require gradients"):
        chunked_cross_entropy(x, weight, target, 3, torch.tensor(1.0, requires_grad=True))
    for compute in (chunked_cross_entropy, lsoftmax_cross_entropy):
        with pytest.raises(InputError, match=r"lambda_: must be at least 0, got -1\.0"):
            compute(x, weight, target, 3, -1.0)
    with pytest.raises(InputError, match="label_smoothing: must be from 0 to 1, got 2"):
        chunked_cross_entropy(x, weight, target, 3, label_smoothing=2.0)


def test_distant_logits_stay_finite() -> None:
    x, weight, target = batch(70, 16, 5, torch.float32)
    with torch.no_grad():
        x *= 1e3  # exp of a logit overflows, and the margin moves the target logit far below the others
        target = F.linear(x, weight).argmin(1)
    loss = F.cross_entropy(margin_logits(F.linear(x, weight), x, weight, target, 4), target)
    found = chunked_cross_entropy(x, weight, target, 4).loss
    torch.testing.assert_close(found, loss)
    whole, chunked = (torch.autograd.grad(each, (x, weight)) for each in (loss, found))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-4)


def test_nan_gives_nan_loss_and_a_valid_prediction() -> None:
    x, weight, target = batch(70, 16, 5)
    loss, prediction, correct = chunked_cross_entropy(x * torch.nan, weight, target, 4)
    assert loss.isnan()
    assert ((prediction >= 0) & (prediction < 5)).all()
    assert not correct.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_equals_single_within_rounding(dtype: torch.dtype, autocast: bool) -> None:
    """float16 cannot represent the gradient of a logit among 2,000; it is computed in float32."""
    x, weight, target = batch(70, 32, 2000, torch.float32)
    whole = torch.autograd.grad(chunked_cross_entropy(x, weight, target, 4, 1.0).loss, (x, weight))
    parts = (x, weight) if autocast else [part.detach().to(dtype).requires_grad_() for part in (x, weight)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = chunked_cross_entropy(*parts, target, 4, 1.0).loss
    assert loss.dtype == torch.float32
    for gradient, part, exact in zip(torch.autograd.grad(loss * 1024, parts), parts, whole, strict=True):
        assert gradient.dtype == part.dtype
        assert (gradient.float() / 1024 - exact).norm() < 0.02 * exact.norm()


def test_empty_batch_has_loss_zero() -> None:
    x, weight, target = batch(0, 16, 5)
    loss, prediction, correct = chunked_cross_entropy(x, weight, target, 3)
    loss.backward()
    assert loss == 0
    assert prediction.shape == correct.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("wrong", [-1, 5, -100])
def test_class_out_of_range_is_an_error(wrong: int) -> None:
    x, weight, target = batch(4, 16, 5)
    target[2] = wrong
    with pytest.raises(InputError, match="target: must contain classes 0 to 4, got"):
        chunked_cross_entropy(x, weight, target, 3)


def test_chunked_loss_is_the_default_for_many_classes() -> None:
    for classes in (CHUNKED_FROM - 1, CHUNKED_FROM):
        x, weight, target = batch(70, 16, classes, torch.float32)
        loss = lsoftmax_cross_entropy(x, weight, target, 3, 1.0, 0.1)
        assert ("Chunked" in str(loss.grad_fn)) == (classes == CHUNKED_FROM)
        assert LSoftmaxLinear(16, classes, 3).uses_chunked_loss == (classes == CHUNKED_FROM)


def test_module_with_many_classes_uses_the_chunked_loss() -> None:
    model = make_model(num_classes=CHUNKED_FROM, label_smoothing=0.1)
    x, target = torch.randn(70, 64), torch.randint(CHUNKED_FROM, (70,))
    model.head.lambda_ = 0.0
    loss, prediction = model.margin_loss(x, target)
    logits = model.head(x)
    torch.testing.assert_close(loss, model.criterion(model.head.apply_margin(logits, x, target), target))
    assert torch.equal(prediction, logits.argmax(1))

    model.criterion = torch.nn.MultiMarginLoss()  # needs dense logits
    assert torch.equal(model.margin_loss(x, target)[1], logits)


def test_chunked_loss_uses_a_fraction_of_the_memory() -> None:
    """Only one chunk of logits is in memory at a time."""
    x, weight, target = batch(4096, 64, 20_000, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked_cross_entropy(x, weight, target, 4).loss.backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 64 * 20_000 * 4  # bytes: 64 samples, or the gradient of the weight
