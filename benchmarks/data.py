"""Samples per second of our data path and of torchvision's usual one, on the same images in one run.

Both pad by 4, crop to 32x32, flip and normalise CIFAR-10-sized images in memory, in shuffled batches of 256. The usual
path is a DataLoader of a Dataset of PIL images with RandomCrop, RandomHorizontalFlip, ToTensor and Normalize. A second
table shows the fraction of a training step that our path takes, for the paper's CIFAR10 network and a small one.

Usage: python benchmarks/data.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
from common import machine, table
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.datamodules import CIFAR10DataModule
from lsoftmax_lightning.datamodules.base import Images

BATCH = 256


class Ours(CIFAR10DataModule):
    """Generated images instead of CIFAR-10."""

    def load(self, train: bool) -> Images:
        """Draw images for 50 batches, and a tenth more for validation."""
        generator = torch.Generator().manual_seed(0)
        count = 50 * BATCH * 10 // 9 + 1
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Images(images, torch.arange(count) % 10)

    def batches(self) -> Iterable[list[Tensor]]:
        """Yield the batches of an epoch, normalised."""
        return (self.on_after_batch_transfer(batch, 0) for batch in self.train_dataloader())


class Usual(Dataset[tuple[Tensor, int]]):
    """Dataset like torchvision's CIFAR10, with the transforms of its examples."""

    def __init__(self, data: Ours) -> None:
        images, self.targets = data.train_data
        self.images = images[torch.arange(len(images))].permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def rate(batches: Callable[[], Iterable[list[Tensor]]]) -> float:
    """Return the samples per second of an epoch, including the start of the workers."""
    start = time.perf_counter()
    count = sum(len(images) for images, _ in batches())
    return count / (time.perf_counter() - start)


def step_seconds(backbone: str, images: Tensor, targets: Tensor) -> float:
    """Return the seconds of a training step without its data: forward, margin loss, backward, SGD."""
    model = ClassificationModule(10, backbone, margin=4, image_shape=(3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        features = model.forward_features(images)
        model.criterion(model.head(features, targets), targets).backward()
        optimizer.step()

    step()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(rounds: int = 5) -> None:
    """Print the tables."""
    ours = Ours(batch_size=BATCH, crop_padding=4, flip=True)
    ours.setup("fit")
    usual = Usual(ours)

    def loader(num_workers: int) -> Callable[[], Iterable[list[Tensor]]]:
        return lambda: DataLoader(usual, BATCH, shuffle=True, drop_last=True, num_workers=num_workers)

    paths = {"ours": ours.batches, "usual, 0 workers": loader(0), "usual, 2 workers": loader(2)}
    rates: dict[str, list[float]] = {name: [] for name in paths}
    rate(ours.batches)
    for _ in range(rounds):  # interleaved
        for name, batches in paths.items():
            rates[name].append(rate(batches))
    print(f"{machine()}.\n")
    fastest = statistics.median(rates["ours"])
    rows = []
    for name, found in rates.items():
        median = statistics.median(found)
        rows.append([name, f"{median:,.0f}", f"{min(found):,.0f} .. {max(found):,.0f}", f"{fastest / median:.1f}x"])
    print(table(["path", f"samples/s, median of {rounds}", "least .. most", "ours to it"], rows))

    images, targets = next(iter(ours.batches()))
    rows = []
    for backbone in ("cifar10", "digits"):
        seconds, data_seconds = step_seconds(backbone, images, targets), BATCH / fastest
        rows.append([backbone, f"{seconds * 1e3:,.0f} ms", f"{data_seconds / (seconds + data_seconds):.2%}"])
    print(table(["network", f"training step, batch {BATCH}", "of which our data path would be"], rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
