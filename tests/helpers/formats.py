"""Small generated data in their original formats."""

import hashlib
import pickle
import string
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100


def write_mnist(root: Path, train: int = 400, test: int = 100, folder: str = "MNIST") -> None:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.numpy().tobytes())


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, reader: Any = CIFAR10) -> None:
    """Write pickles of CIFAR-10 or CIFAR-100, and patch their checksums in torchvision."""
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    classes = 100 if reader is CIFAR100 else 10

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for kind in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(reader, kind):
            count = 10 * classes if reader is CIFAR100 else 40
            batch = {
                "data": random.integers(256, size=(count, 3072), dtype=np.uint8),
                "fine_labels" if reader is CIFAR100 else "labels": [i % classes for i in range(count)],
            }
            files.append([name, write(name, batch)])
        monkeypatch.setattr(reader, kind, files)
    names = {reader.meta["key"]: [f"class {i}" for i in range(classes)]}
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": write(reader.meta["filename"], names)})


def write_image(path: Path, colour: tuple[int, ...] = (200, 100, 50), size: tuple[int, int] = (12, 10)) -> None:
    """Write an image of one colour and (width, height); the colour defines the number of channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new({1: "L", 3: "RGB", 4: "RGBA"}[len(colour)], size, colour if len(colour) > 1 else colour[0]).save(path)


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 10) -> None:
    """Write two classes of red and blue images."""
    for part in parts:
        for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
            for number in range(count):
                write_image(root / part / name / f"{number}.png", colour)


def pairs_text(folds: int = 3, count: int = 2) -> str:
    """Return a list of pairs in which each fold has its own people with two images each."""
    lines = [f"{folds}\t{count}"]
    for fold in range(folds):
        people = [f"Person_{fold}{letter}" for letter in string.ascii_uppercase[: 2 * count]]
        lines += [f"{person}\t1\t2" for person in people[:count]]
        lines += [f"{first}\t1\t{second}\t2" for first, second in zip(people[::2], people[1::2], strict=True)]
    return "\n".join(lines) + "\n"


def write_lfw(root: Path, folds: int = 3, count: int = 2) -> None:
    """Write two images of each person, all in one colour, and the list of pairs."""
    text = pairs_text(folds, count)
    people = sorted({field for line in text.splitlines() for field in line.split("\t") if field.startswith("Person")})
    for number, person in enumerate(people):
        for image in (1, 2):
            colour = (number * 20 % 256, number * 53 % 256, number * 91 % 256)
            write_image(root / "images" / person / f"{person}_{image:04d}.jpg", colour, (96, 112))
    (root / "pairs.txt").write_text(text)


class Call:
    """Payload of a malicious pickle: creates a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("called"),)
