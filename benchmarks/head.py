"""Forward and backward of the head with a margin, compared with a head without one and with other implementations.

All get the same features and classes, and each alternates with the floor: ``nn.Linear(bias=False)`` and
``F.cross_entropy``. "Autograd" is the plainest correct form of the paper's formula: gather, Chebyshev, scatter. Then a
whole training step of the paper's CIFAR10 network at m = 4 is compared with one at m = 1. Requires
pytorch-metric-learning.

Usage: python benchmarks/head.py [SECONDS_PER_COMPARISON]
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import machine, ratio, table, time_interleaved
from pytorch_metric_learning.losses import LargeMarginSoftmaxLoss
from torch import Tensor, nn

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear

SIZES = [(256, 256, 10), (256, 512, 100), (512, 512, 10_572), (256, 512, 85_742)]
LAMBDA = 5.0

Loss = Callable[[Tensor, Tensor], Tensor]


def autograd(x: Tensor, weight: Tensor, target: Tensor, m: int) -> Tensor:
    """Return the loss, differentiated by autograd."""
    logits = F.linear(x, weight)
    column = target.unsqueeze(1)
    target_logit = logits.gather(1, column).squeeze(1)
    norm = x.norm(dim=1) * weight[target].norm(dim=1)
    cosine = target_logit / norm
    multiple = 2 * cosine**2 - 1 if m == 2 else 8 * cosine**4 - 8 * cosine**2 + 1
    k = sum((cosine < math.cos(j * math.pi / m)).to(x.dtype) for j in range(1, m))
    target_logit = (LAMBDA * target_logit + norm * ((1 - 2 * (k % 2)) * multiple - 2 * k)) / (1 + LAMBDA)
    return F.cross_entropy(logits.scatter(1, column, target_logit.unsqueeze(1)), target)


def losses(width: int, classes: int, m: int) -> dict[str, tuple[Loss, nn.Module]]:
    """Return losses of features (N, D) and classes (N,) by name, each with the module of its weight."""
    head = LSoftmaxLinear(width, classes, m, LAMBDA)
    peer = LargeMarginSoftmaxLoss(classes, width, margin=m, scale=1)

    def floor(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head.weight), target)

    def logits(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(x, target), target)

    def ours(x: Tensor, target: Tensor) -> Tensor:
        return head.cross_entropy(x, target).loss if head.uses_chunked_loss else logits(x, target)

    def plain(x: Tensor, target: Tensor) -> Tensor:
        return autograd(x, head.weight, target, m)

    return {
        "floor": (floor, head),
        "floor, compiled": (torch.compile(floor), head),
        "ours": (ours, head),
        "ours, compiled": (torch.compile(logits), head),
        "autograd": (plain, head),
        "autograd, compiled": (torch.compile(plain), head),
        "pytorch-metric-learning": (peer, peer),
    }


def step(loss: Loss, owner: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    """Return a step: forward and backward."""

    def run() -> None:
        x.grad = None
        owner.zero_grad()
        loss(x, target).backward()

    return run


def heads(duration: float) -> list[list[str]]:
    """Return the rows of the first table."""
    rows = []
    for size, width, classes in SIZES:
        for m in (2, 4):
            torch.manual_seed(0)
            torch.compiler.reset()
            x, target = torch.randn(size, width, requires_grad=True), torch.randint(classes, (size,))
            steps = {name: step(*loss, x, target) for name, loss in losses(width, classes, m).items()}
            floor = steps.pop("floor")
            found, milliseconds = [], []
            for name, timed in steps.items():
                times = time_interleaved(
                    {"floor": floor, name: timed}, duration, min_rounds=9 if classes > 50_000 else 25
                )
                found.append(ratio(times[name], times["floor"]))
                milliseconds.append(statistics.median(times["floor"]) * 1e3)
            rows.append([f"({size}, {width}, {classes:,})", str(m), f"{statistics.median(milliseconds):.2f}", *found])
    return rows


def training_step(m: int, images: Tensor, target: Tensor) -> Callable[[], None]:
    """Return a training step of the paper's CIFAR10 network: forward, loss, backward, SGD."""
    torch.manual_seed(0)
    model = ClassificationModule(10, "cifar10", margin=m, image_shape=(3, 32, 32))
    model.head.lambda_ = LAMBDA
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        optimizer.zero_grad()
        loss, logits = model.margin_loss(model.forward_features(images), target)
        model.train_metrics.update(logits, target)
        loss.backward()
        optimizer.step()

    return run


def main(duration: float = 6) -> None:
    """Print the tables."""
    names = list(losses(2, 2, 2))[1:]
    print(f"{machine('pytorch-metric-learning')}.\n")
    print(table(["(N, D, C)", "m", "floor, ms", *names], heads(duration)))
    images, target = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    times = time_interleaved({str(m): training_step(m, images, target) for m in (1, 4)}, 20 * duration)
    print(
        f"A training step of the CIFAR10 network, 16 images, at m = 4 to one at m = 1: {ratio(times['4'], times['1'])}."
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
