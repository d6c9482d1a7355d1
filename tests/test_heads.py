"""L-Softmax head: a linear layer in inference and a margin in training, under copies, casts, compilation and export."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.nn.utils.prune import l1_unstructured

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.errors import InputError


@pytest.fixture
def head() -> LSoftmaxLinear:
    torch.manual_seed(0)
    return LSoftmaxLinear(in_features=6, num_classes=4, margin=3, lambda_=2.0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target() -> Tensor:
    return torch.arange(8) % 4


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_head_without_target_is_a_linear_layer(head: LSoftmaxLinear, x: Tensor) -> None:
    assert torch.equal(head(x), F.linear(x, head.weight))
    assert list(head.state_dict()) == ["weight"]
    linear = nn.Linear(6, 4, bias=False)
    linear.load_state_dict(head.state_dict())
    assert torch.equal(linear(x), head(x))


def test_margin_changes_only_the_target_logit(head: LSoftmaxLinear, x: Tensor, target: Tensor) -> None:
    plain, margin = head(x), head(x, target)
    is_target = F.one_hot(target, 4).bool()
    assert torch.equal(plain[~is_target], margin[~is_target])
    assert (margin[is_target] < plain[is_target]).all()
    torch.testing.assert_close(head.apply_margin(plain, x, target), margin)
    both = head.margin_and_plain_logits(x, target)
    assert torch.equal(both[0], margin)
    assert torch.equal(both[1], plain)


def test_weight_has_msra_initialisation() -> None:
    torch.manual_seed(0)
    weight = LSoftmaxLinear(512, 1000, margin=4).weight
    assert abs(weight.mean().item()) < 1e-3
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_features": 0}, "in_features"),
        ({"num_classes": 1}, "num_classes: must be an integer of at least 2, got 1; raise it"),
        ({"num_classes": np.int64(4)}, "num_classes: must be an integer .* pass an int instead of int64"),
        ({"margin": 0}, "margin"),
        ({"margin": 2.5}, "margin"),
        ({"lambda_": -1.0}, "lambda"),
        ({"lambda_": math.nan}, "lambda"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LSoftmaxLinear(**{"in_features": 6, "num_classes": 4, "margin": 3} | settings)  # type: ignore[arg-type]


def test_copies_keep_lambda_and_are_independent(head: LSoftmaxLinear, x: Tensor, target: Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(buffer, weights_only=False)]
    before = head(x, target)
    for other in copies:
        assert torch.equal(other(x, target), before)
        other.lambda_ = 50.0
    assert head.lambda_ == 2.0
    assert torch.equal(head(x, target), before)


def test_lambda_survives_casts_averaging_and_the_meta_device(head: LSoftmaxLinear) -> None:
    head.lambda_ = 1e5  # beyond float16
    assert head.half().lambda_ == 1e5
    average = torch.optim.swa_utils.AveragedModel(head, use_buffers=True)
    head.lambda_ = 0.0
    average.update_parameters(head)
    average.update_parameters(head)
    assert average.module.lambda_ == 1e5
    with torch.device("meta"):
        made = LSoftmaxLinear(6, 4, margin=3, lambda_=2.0)
    assert made.weight.is_meta
    assert made.to_empty(device="cpu").lambda_ == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(dtype: torch.dtype, head: LSoftmaxLinear, x: Tensor, target: Tensor) -> None:
    x.requires_grad_()

    def outputs() -> list[Tensor]:
        margin, plain = head.margin_and_plain_logits(x, target)
        return [head(x), head.apply_margin(head(x), x, target), margin, plain, F.cross_entropy(margin, target)]

    expected = outputs()
    with torch.autocast("cpu", dtype):
        found = outputs()
    for each in (found, expected):  # backward outside of autocast, as PyTorch recommends
        each += torch.autograd.grad(each[-1], (x, head.weight))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_margin_one_gives_the_plain_logits(x: Tensor, target: Tensor) -> None:
    head = LSoftmaxLinear(6, 4, margin=1)
    plain = F.linear(x, head.weight)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(head(x, target), plain)
            assert torch.equal(head(x), plain)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_single_or_double_precision(
    dtype: torch.dtype, weight_dtype: torch.dtype, x: Tensor, target: Tensor
) -> None:
    head = LSoftmaxLinear(6, 4, margin=4, lambda_=0.0, dtype=weight_dtype)
    expected = torch.float64 if torch.float64 in (dtype, weight_dtype) else torch.float32
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = head(x.to(dtype), target)
            assert logits.dtype == head(x.to(dtype)).dtype == expected
            (gradient,) = torch.autograd.grad(logits.sum(), head.weight)
            assert gradient.dtype == weight_dtype


@pytest.mark.parametrize("margin", [1, 2, 4])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_without_graph_breaks_or_recompilation_for_lambda(margin: int, x: Tensor, target: Tensor) -> None:
    head = LSoftmaxLinear(6, 4, margin)
    compiled = torch.compile(lambda x, t: F.cross_entropy(head(x, t), t), fullgraph=True, backend="aot_eager")
    compiled(x, target)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lambda_ in (1000.0, 5.0, 0.3, 0.0, math.inf):
            head.lambda_ = lambda_
            torch.testing.assert_close(compiled(x, target), F.cross_entropy(head(x, target), target))


@pytest.mark.parametrize("margin", [1, 4])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_without_graph_breaks_under_autocast(margin: int, x: Tensor, target: Tensor) -> None:
    head = LSoftmaxLinear(6, 4, margin, lambda_=0.3)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, target), head(x, target))


TRAINING_STEPS: dict[str, Callable[[LSoftmaxLinear, Tensor, Tensor], object]] = {
    "call": lambda head, x, target: head(x, target),
    "apply_margin": lambda head, x, target: head.apply_margin(head(x), x, target),
    "cross_entropy": lambda head, x, target: head.cross_entropy(x, target),
}


@pytest.mark.parametrize("step", TRAINING_STEPS.values(), ids=TRAINING_STEPS)
def test_training_without_lambda_warns_once(
    step: Callable[[LSoftmaxLinear, Tensor, Tensor], object], x: Tensor, target: Tensor
) -> None:
    unset = LSoftmaxLinear(6, 4, margin=3)
    for head in (copy.deepcopy(unset), pickle.loads(pickle.dumps(unset)), unset):
        assert head.lambda_ == 0.0
        with pytest.warns(UserWarning, match=r"LambdaAnnealing\(\).* head\.lambda_ .*lambda_=0\.0") as caught:
            step(head, x, target)
        assert [warning.filename for warning in caught] == [__file__]
        step(head, x, target)  # another warning would be an error
        step(copy.deepcopy(head), x, target)


@pytest.mark.parametrize("step", TRAINING_STEPS.values(), ids=TRAINING_STEPS)
def test_no_warning_when_lambda_is_set_or_not_needed(
    step: Callable[[LSoftmaxLinear, Tensor, Tensor], object], x: Tensor, target: Tensor
) -> None:
    step(LSoftmaxLinear(6, 4, margin=3, lambda_=0.0), x, target)
    step(LSoftmaxLinear(6, 4, margin=1), x, target)
    head = LSoftmaxLinear(6, 4, margin=3)
    head(x)
    step(head.eval(), x, target)
    with torch.no_grad():
        step(head.train(), x, target)
    head.lambda_ = 0.0
    step(head, x, target)


def test_exports_without_the_margin(head: LSoftmaxLinear, x: Tensor) -> None:
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:3]), head(x[:3]))


def test_repr_shows_the_settings(head: LSoftmaxLinear) -> None:
    assert repr(head) == "LSoftmaxLinear(in_features=6, num_classes=4, margin=3, lambda_=2)"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_class_weights_take_any_integer_type(dtype: torch.dtype, head: LSoftmaxLinear) -> None:
    target = torch.tensor([1, 0, 3, 1])
    assert torch.equal(head.class_weights(target.to(dtype)), head.weight[target])


@pytest.mark.parametrize("loss", ["logits", "cross_entropy"])
@pytest.mark.parametrize("compute", [partial(l1_unstructured, amount=0.3), weight_norm], ids=["pruned", "normalised"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_that_hooks_compute_is_trained(
    loss: str, compute: Callable[..., object], head: LSoftmaxLinear, x: Tensor, target: Tensor
) -> None:
    compute(head, name="weight")
    for _ in range(2):  # a second step would fail on the graph of the first
        if loss == "logits":
            F.cross_entropy(head.margin_and_plain_logits(x, target)[0], target).backward()
        else:
            head.cross_entropy(x, target).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("shape", [(8, 5), (8, 6, 1, 1)])
def test_features_of_another_width_are_rejected(shape: tuple[int, ...], head: LSoftmaxLinear, target: Tensor) -> None:
    for call in (head, partial(head, target=target), partial(head.cross_entropy, target=target)):
        with pytest.raises(InputError, match=r"features: must be \(N, 6\), got \(8, "):
            call(torch.randn(shape))


def test_features_of_several_rows_for_each_sample_are_rejected(head: LSoftmaxLinear, target: Tensor) -> None:
    with pytest.raises(InputError, match=r"features: must be \(N, D\), .* got logits of shape \(8, 3, 4\); pool"):
        head(torch.randn(8, 3, 6), target)


def test_head_learns_in_a_plain_loop(x: Tensor, target: Tensor) -> None:
    torch.manual_seed(0)
    head = LSoftmaxLinear(6, 4, margin=2)
    features = torch.eye(4, 6)[target] + 0.1 * x
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for step in range(100):
        head.lambda_ = 100 / (1 + step)
        loss = F.cross_entropy(head(features, target), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head(features).argmax(1) == target).all()
