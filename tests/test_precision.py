"""Half precision trains as well as single, and nothing makes NaN."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.cli import main

from .test_cli import QUIET

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def adversarial(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and classes, at which something may be divided by zero or rounded beyond 1."""
    own = F.normalize(weight)  # of each class: along its weight, against it, and square to it
    square = F.normalize(own.roll(1, 1) - (own.roll(1, 1) * own).sum(1, keepdim=True) * own)
    directions = torch.cat([own, -own, square, own + 1e-4 * square])
    rows = torch.cat([0 * own, *(norm * directions for norm in (1e-4, 1.0, 1e4))])
    return rows, torch.arange(len(weight)).repeat(len(rows) // len(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", range(1, 7))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_whole_margin_at_once_makes_no_nan(device: str, m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = LSoftmaxLinear(16, 5, margin=m, lambda_=0.0, device=device)
    features, target = adversarial(head.weight.detach())
    x = nn.Parameter(features.clone())
    optimizer = torch.optim.SGD([x, head.weight], lr=1e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)  # its first steps are too large, and left out
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


@pytest.mark.parametrize(
    ("accelerator", "precision"),
    [
        ("cpu", "bf16-mixed"),  # which Lightning takes, on a CPU, for 16-mixed too
        *(pytest.param("gpu", precision, marks=NEEDS_GPU) for precision in ("bf16-mixed", "16-mixed")),
    ],
)
def test_half_precision_learns_as_single_does(
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
    assert abs(accuracy[precision] - accuracy["32-true"]) < 0.01  # 3 times the spread of seeds
