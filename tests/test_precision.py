"""Half precision trains as well as single, and nothing makes NaN."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.cli import main

from .test_cli import QUIET

ACCELERATORS = [
    "cpu",
    pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def adversarial(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and classes, at which something may be divided by zero, rounded beyond 1 or overflow."""
    own = F.normalize(weight)  # of each class: along its weight, against it, and square to it
    square = F.normalize(own.roll(1, 1) - (own.roll(1, 1) * own).sum(1, keepdim=True) * own)
    directions = torch.cat([own, -own, square, own + 1e-4 * square])
    rows = torch.cat([0 * own, *(norm * directions for norm in (1e-4, 1.0, 1e4))])
    return rows, torch.arange(len(weight)).repeat(len(rows) // len(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", range(1, 7))
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_whole_margin_at_once_makes_no_nan(accelerator: str, m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    device = "cuda" if accelerator == "gpu" else "cpu"
    head = LSoftmaxLinear(16, 5, margin=m, lambda_=0.0, device=device)
    features, target = adversarial(head.weight.detach())
    x = nn.Parameter(features)
    optimizer = torch.optim.SGD([x, head.weight], lr=1e-5)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype is torch.float16)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(head(x, target), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        for value in (loss, x, x.grad, head.weight, head.weight.grad):
            assert value is not None
            assert value.isfinite().all()


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_half_precision_learns_as_single_does(
    accelerator: str, record_property: Callable[[str, object], None]
) -> None:
    accuracy = {}
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        # which Lightning, on a CPU, takes for bf16-mixed
        warned = pytest.warns(UserWarning, match="bf16-mixed") if (accelerator, precision) == ("cpu", "16-mixed") else None
        with warned or contextlib.nullcontext():
            cli = main(["fit", "--config=digits.yaml", *QUIET, f"--trainer.accelerator={accelerator}", f"--trainer.precision={precision}"])
        assert cli is not None
        accuracy[precision] = float(cli.trainer.callback_metrics["test/acc"])
        record_property(f"test/acc, {accelerator}, {precision}", accuracy[precision])
    assert accuracy["32-true"] > 0.98
    for other in accuracy.values():
        assert abs(other - accuracy["32-true"]) < 0.01  # 3 times the spread of seeds
