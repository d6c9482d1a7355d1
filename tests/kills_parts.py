"""Small network and images for the commands of `kills.py`."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn


class Tiny(nn.Sequential):
    """Backbone with dropout and batch statistics, which a resumed run must restore."""

    num_features = 8

    def __init__(self, pixels: int = 64) -> None:
        super().__init__(nn.Flatten(), nn.Linear(pixels, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())


def write_images(root: Path) -> None:
    """Write three noisy classes as PNG files, 32 to train and 12 to test each."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 32), ("test", 12)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(160, size=(8, 8, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 60
                Image.fromarray(pixels).save(folder / f"{index}.png")
