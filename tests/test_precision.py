"""Training in half precision is as accurate as in single precision, and gives no NaN."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.functional import margin_logits

from .helpers.command_line import QUIET
from .helpers.training import BlobsDataModule, make_trainer


def adversarial(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and classes that can cause division by zero or cosines beyond 1."""
    unit = F.normalize(weight)  # features parallel, opposite and orthogonal to each class weight
    orthogonal = F.normalize(unit.roll(1, 1) - (unit.roll(1, 1) * unit).sum(1, keepdim=True) * unit)
    directions = torch.cat([unit, -unit, orthogonal, unit + 1e-4 * orthogonal])
    rows = torch.cat([0 * unit, *(norm * directions for norm in (1e-4, 1.0, 1e4))])
    return rows, torch.arange(len(weight)).repeat(len(rows) // len(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", range(1, 7))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_full_margin_from_the_first_step_gives_no_nan(device: str, m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = LSoftmaxLinear(16, 5, margin=m, lambda_=0.0, device=device)
    features, target = adversarial(head.weight.detach())
    x = nn.Parameter(features.clone())
    optimizer = torch.optim.SGD([x, head.weight], lr=1e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)  # skips its first steps, which overflow
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(head(x, target), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        for value in (loss, x, head.weight):
            assert value.isfinite().all()
    assert not torch.equal(x, features)
    for gradient in (x.grad, head.weight.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


def one_class_in_every_segment() -> tuple[Tensor, Tensor]:
    """Return samples of class 0 at all angles, and a weight.

    The features and the weight of class 0 have norm 8. The logits of the other classes are exactly 128 in any
    precision, so that only the target logit can cause errors.
    """
    torch.manual_seed(0)
    theta = torch.linspace(0.15, math.pi - 0.15, 48, dtype=torch.float64).unsqueeze(1)
    target_weight, other = torch.linalg.qr(torch.randn(15, 2, dtype=torch.float64)).Q.T
    rest = (63 / 64 - theta.cos() ** 2).sqrt() * other
    features = torch.cat([8 * (theta.cos() * target_weight + rest), torch.ones_like(theta)], dim=1)
    weight = torch.zeros(5, 16)
    weight[0, :15] = 8 * target_weight
    weight[1:, 15] = 128
    return features.float(), weight


@pytest.mark.parametrize("chunked", [False, True], ids=["dense", "chunked"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half inputs"])
@pytest.mark.parametrize("lambda_", [0.0, 5.0])
@pytest.mark.parametrize("m", range(1, 7))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("chunks")
def test_half_precision_does_not_round_the_target_logit(
    dtype: torch.dtype, m: int, lambda_: float, autocast: bool, chunked: bool
) -> None:
    x, weight = (each if autocast else each.to(dtype) for each in one_class_in_every_segment())
    x.requires_grad_()
    target = torch.zeros(len(x), dtype=torch.long)
    head = LSoftmaxLinear(16, 5, m, lambda_, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)

    def loss_of(rows: slice) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=autocast):
            if chunked:
                return head.cross_entropy(x[rows], target[rows]).loss
            return F.cross_entropy(head(x[rows], target[rows]), target[rows])

    exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, weight))
    plain = F.linear(exact_x, exact_weight)
    logits = margin_logits(plain, exact_x, exact_weight, target, m, lambda_)
    exact = F.cross_entropy(logits, target, reduction="none")
    losses = torch.stack([loss_of(slice(row, row + 1)) for row in range(len(x))])
    assert losses.dtype == torch.float32
    assert (losses - exact).abs().max() < 1e-3

    gradients = torch.autograd.grad(loss_of(slice(None)), (x, head.weight))
    exact_gradients = torch.autograd.grad(exact.mean(), (exact_x, exact_weight))
    tolerance = 1e-4 if autocast else torch.finfo(dtype).eps  # half-precision inputs have half-precision gradients
    for found, expected, rows in zip(gradients, exact_gradients, (len(x), 1), strict=True):
        found, expected = (each[:rows, :15] for each in (found, expected))  # the part through the target logit
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    ("accelerator", "precision"),
    [
        ("cpu", "bf16-mixed"),  # on CPUs, Lightning also uses it for 16-mixed
        *(pytest.param("gpu", precision, marks=pytest.mark.gpu) for precision in ("bf16-mixed", "16-mixed")),
    ],
)
def test_half_precision_is_as_accurate_as_single(
    accelerator: str, precision: str, record_property: Callable[[str, object], None]
) -> None:
    accuracy = {}
    for each in ("32-true", precision):
        settings = [f"--trainer.accelerator={accelerator}", f"--trainer.precision={each}", "--trainer.max_epochs=6"]
        cli = main(["fit", "--config=digits.yaml", *QUIET, *settings])
        assert cli is not None
        accuracy[each] = float(cli.trainer.callback_metrics["test/acc"])
        record_property(f"test/acc, {accelerator}, {each}", accuracy[each])
    assert accuracy["32-true"] > 0.97
    assert abs(accuracy[precision] - accuracy["32-true"]) < 0.02  # 7 of 360 images; seeds differ by up to 3


class Weighted(ClassificationModule):
    """Module whose criterion has a buffer and a trained parameter."""

    class Criterion(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.cross_entropy = nn.CrossEntropyLoss(weight)
            self.scale = nn.Parameter(torch.tensor(1.1))

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            assert logits.dtype == self.scale.dtype
            loss: Tensor = self.scale * self.cross_entropy(logits, target)
            return loss

    def configure_losses(self) -> None:
        self.criterion = self.Criterion(torch.tensor([0.1, 0.2, 0.3, 1.7]))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "32-true", "64-true"])
@pytest.mark.parametrize("init_module", [False, True])
def test_criterion_with_tensors_trains_in_every_precision(precision: Any, init_module: bool) -> None:
    trainer = make_trainer(precision=precision)
    settings = {"num_classes": 4, "backbone": "digits", "margin": 2, "image_shape": (1, 8, 8)}
    with trainer.init_module() if init_module else nullcontext():
        model = Weighted(**settings)
    trainer.fit(model, BlobsDataModule())
    expected = torch.float64 if precision == "64-true" else torch.float32
    weight = model.criterion.cross_entropy.weight
    assert weight.dtype == model.criterion.scale.dtype == expected
    tolerance = 1e-2 if init_module else 1e-7  # created in half precision
    assert weight.tolist() == pytest.approx([0.1, 0.2, 0.3, 1.7], rel=tolerance)
    assert model.criterion.scale.item() != pytest.approx(1.1, rel=1e-3)  # it was trained
    assert trainer.callback_metrics["val/loss"].isfinite()
    names = list(model.state_dict())
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert list(model.half().state_dict()) == names
    assert model.criterion.scale.dtype == torch.float32
