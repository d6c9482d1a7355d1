"""Fewer training images and noisy labels, for every datamodule."""

import logging
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from lsoftmax_lightning.cli import main
from lsoftmax_lightning.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    LFWDataModule,
    LFWFoldDataModule,
    MNISTDataModule,
)
from lsoftmax_lightning.datamodules.base import BatchDataModule, Images
from lsoftmax_lightning.datamodules.images import ImageFiles, ImageSubset, select
from lsoftmax_lightning.datamodules.subsets import random_labels, stratified_subset
from lsoftmax_lightning.errors import InputError

from ..helpers.command_line import QUIET
from ..helpers.forked import run_on
from ..helpers.formats import write_cifar, write_folder, write_image, write_lfw, write_mnist
from ..helpers.training import BlobsDataModule, make_model, make_trainer


class ManyDataModule(BlobsDataModule):
    """2,000 training images of four classes, 400 of them for validation; each image holds its index."""

    def __init__(self, **kwargs: Any) -> None:
        super(BlobsDataModule, self).__init__(20, 0.2, 0, **kwargs)

    def load(self, train: bool) -> Images:
        index = torch.arange(2000 if train else 40)
        images = torch.stack([index // 256, index % 256], dim=1).to(torch.uint8)
        return Images(images.repeat(1, 32).view(-1, 1, 8, 8), index % 4)


def indices(images: Any) -> Tensor:
    pixels = images[torch.arange(len(images))].flatten(1).long()
    return 256 * pixels[:, 0] + pixels[:, 1]


def draw(**settings: Any) -> tuple[list[int], Tensor]:
    """Return indices and labels of the training images."""
    data = ManyDataModule(**settings)
    data.setup("fit")
    return indices(data.train_data.images).tolist(), data.train_data.targets


@pytest.mark.parametrize("train_size", [400, 0.25])
def test_subset_keeps_class_proportions(train_size: float) -> None:
    index, targets = draw(train_size=train_size)
    assert len(set(index)) == 400
    assert targets.bincount().tolist() == [100] * 4
    assert targets.tolist() == [i % 4 for i in index]


def test_subset_of_uneven_classes_keeps_proportions_and_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1000, 600, 398, 2]
    targets = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    images = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(
        ManyDataModule, "load_train_val", lambda self: (Images(images, targets), Images(images, targets))
    )
    _, kept = draw(train_size=100)
    assert kept.bincount().tolist() == [pytest.approx(count, abs=1) for count in (50, 30, 19, 1)]
    _, kept = draw(train_size=4)
    assert kept.bincount().tolist() == [1] * 4


def test_indices_ascend_and_labels_are_not_changed_in_place() -> None:
    targets = torch.arange(100) % 4
    index = stratified_subset(targets, 20, torch.Generator())
    assert torch.equal(index, index.sort().values)
    assert not torch.equal(random_labels(targets, 100, 4, torch.Generator()), targets)
    assert torch.equal(targets, torch.arange(100) % 4)


def test_subsets_are_nested_by_seed() -> None:
    small, large, other = (
        draw(**settings)[0]
        for settings in (
            {"train_size": 100, "train_seed": 5},
            {"train_size": 800, "train_seed": 5},
            {"train_size": 800, "train_seed": 6},
        )
    )
    assert set(small) < set(large)
    assert set(large) != set(other)


def test_train_seed_defaults_to_seed_everything() -> None:
    settings = {"train_size": 400, "label_noise": 0.5}
    found = []
    for seed, given in ((1, None), (1, None), (2, None), (1, 3), (2, 3)):
        seed_everything(seed)
        index, targets = draw(**settings, train_seed=given)
        found.append((index, targets.tolist()))
    assert found[0] == found[1]
    assert found[3] == found[4]
    for one, other in ((0, 2), (0, 3)):
        assert found[one][0] != found[other][0]
        assert found[one][1] != found[other][1]


def test_drawing_a_subset_keeps_split_and_random_state() -> None:
    torch.manual_seed(0)
    plain, drawn = ManyDataModule(), ManyDataModule(train_size=100, label_noise=0.3)
    state = torch.get_rng_state()
    for data in (plain, drawn):
        data.setup("fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(indices(plain.val_data.images), indices(drawn.val_data.images))
    assert set(indices(drawn.train_data.images).tolist()) < set(indices(plain.train_data.images).tolist())


def test_subset_and_noise_follow_the_seed_of_each_training() -> None:
    reused = ManyDataModule()
    for seed, size, noise in ((0, 100, 0.5), (1, 100, 0.5), (1, 200, 0.0), (2, None, 0.0)):
        seed_everything(seed)
        new = ManyDataModule()
        for data in (reused, new):
            data.train_size, data.label_noise = size, noise
            data.setup("fit")
        assert torch.equal(reused.train_data.targets, new.train_data.targets)
        assert torch.equal(indices(reused.train_data.images), indices(new.train_data.images))


def test_default_uses_all_images_and_true_labels() -> None:
    index, targets = draw()
    assert len(index) == 1600
    assert targets.tolist() == [i % 4 for i in index]
    data = ManyDataModule()
    train_data = data.load_train_val()[0]
    data.load_train_val = lambda: (train_data, train_data)  # type: ignore[method-assign]
    data.setup("fit")
    assert all(one is other for one, other in zip(data.train_data, train_data, strict=True))


def test_shuffle_of_a_seed_is_stable_between_releases() -> None:
    seed_everything(3)
    data = ManyDataModule()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    generator = torch.Generator().manual_seed(random.Random("3 1").getrandbits(32))
    order = torch.randperm(1600, generator=generator)
    assert torch.equal(torch.cat([targets for _, targets in loader]), data.train_data.targets[order])


def test_label_noise_is_uniform_and_only_in_training() -> None:
    data = ManyDataModule(label_noise=0.4)
    data.setup("fit")
    data.setup("test")
    true = indices(data.train_data.images) % 4
    wrong = (data.train_data.targets != true).sum().item()
    assert wrong == pytest.approx(
        0.75 * 640, abs=5 * (640 * 0.75 * 0.25) ** 0.5
    )  # a quarter of the draws gives the true class
    counts = data.train_data.targets[data.train_data.targets != true].bincount(minlength=4)
    assert counts.min() > 0.7 * counts.max()
    for part in (data.val_data, data.test_data):
        assert torch.equal(part.targets, indices(part.images) % 4)


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 2), (0.2, 320), (0.9999, 1600), (1, 1600)])
def test_label_noise_draws_exactly_the_stated_fraction(
    fraction: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ManyDataModule, "num_classes", 2**40)  # no drawn label equals the one it replaces
    index, targets = draw(label_noise=fraction)
    assert sum(int(target) != i % 4 for i, target in zip(index, targets, strict=True)) == count


def test_full_label_noise_draws_every_label() -> None:
    index, targets = draw(label_noise=1.0)
    correct = sum(int(target) == i % 4 for i, target in zip(index, targets, strict=True)) / len(index)
    assert correct == pytest.approx(0.25, abs=0.05)


def test_subset_does_not_depend_on_label_noise() -> None:
    assert draw(train_size=400, label_noise=0.2)[0] == draw(train_size=400)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 0}, "train_size: must be a number of images or a fraction between 0 and 1, got 0"),
        ({"train_size": -5}, "got -5"),
        ({"train_size": 1.5}, r"got 1\.5"),
        ({"train_size": float("nan")}, "got nan"),
        ({"label_noise": -0.1}, r"label_noise: must be a fraction from 0 to 1, got -0\.1"),
        ({"label_noise": 20}, "got 20"),
        ({"label_noise": float("nan")}, "got nan"),
        ({"train_size": 1601}, "train_size: must be at most the 1600 training images .* got 1601; lower it"),
        ({"train_size": 1}, "each of the 4 classes, got 1 .1 images."),
        ({"train_size": 3}, "each of the 4 classes, got 3 .*; use at least 4"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(**settings)


@pytest.mark.parametrize(("text", "length"), [("1.0", 1293), ("0.5", 646), ("1000", 1000), ("1000.0", 1000), ("1", 1)])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_float_is_a_fraction_and_an_integer_is_a_number(text: str, length: int, in_file: bool) -> None:
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    Path("config.yaml").write_text(f"data: {{class_path: DigitsDataModule, init_args: {{train_size: {text}}}}}")
    arguments = ["--config=config.yaml"] if in_file else ["--data=DigitsDataModule", f"--data.train_size={text}"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    if length == 1:
        with pytest.raises(InputError, match=r"must keep an image of each of the 10 classes, got 1 \(1 images\)"):
            data.setup("fit")
    else:
        data.setup("fit")
        assert len(data.train_data.targets) == length


def test_a_batch_size_set_after_reading_is_lowered_with_a_warning() -> None:
    data = ManyDataModule(train_size=400)
    data.setup("fit")
    with pytest.warns(UserWarning, match="The batch size is lowered from 500 to 400, the number of training images"):
        data.batch_size = 500
    assert data.batch_size == 400


def test_a_batch_larger_than_the_subset_is_rejected() -> None:
    data = ManyDataModule(train_size=16)
    with pytest.raises(InputError, match="batch_size: must be at most the 16 samples, got 20"):
        make_trainer().fit(make_model(), data)


@pytest.mark.parametrize("kind", ["tensor", "subset", "files", "custom"])
def test_images_and_labels_stay_paired_in_every_store(kind: str, tmp_path: Path) -> None:
    class CustomStore:
        """Store of a user, which supports only indexing."""

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: Tensor) -> Tensor:
            return pixels[index]

    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4) * 40
    stores: dict[str, Any] = {
        "tensor": pixels,
        "subset": ImageSubset(pixels.flip(0), torch.arange(5, -1, -1), [f"{i}" for i in range(6)]),
        "custom": CustomStore(),
    }
    if kind == "files":
        for i in range(6):
            write_image(tmp_path / f"{i}.png", (40 * i,) * 3, (4, 4))
        stores["files"] = ImageFiles([tmp_path / f"{i}.png" for i in range(6)], (3, 4, 4))
    chosen = select(select(stores[kind], torch.tensor([0, 2, 3, 5])), torch.tensor([1, 3]))
    assert torch.equal(chosen[torch.arange(2)], pixels[[2, 5]])
    if kind in ("subset", "files"):
        assert [Path(path).stem for path in chosen.paths] == ["2", "5"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "kind",
    [
        DigitsDataModule,
        MNISTDataModule,
        FashionMNISTDataModule,
        CIFAR10DataModule,
        CIFAR100DataModule,
        ImageFolderDataModule,
        LFWDataModule,
        LFWFoldDataModule,
    ],
)
def test_every_datamodule_accepts_subset_arguments(
    kind: type[BatchDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {} if kind is DigitsDataModule else {"root": str(tmp_path)}
    if kind in (MNISTDataModule, FashionMNISTDataModule):
        write_mnist(tmp_path, folder=kind.__name__.removesuffix("DataModule"))
    elif kind in (CIFAR10DataModule, CIFAR100DataModule):
        write_cifar(tmp_path, monkeypatch, CIFAR10 if kind is CIFAR10DataModule else CIFAR100)
    elif kind is not DigitsDataModule:
        settings["image_size"] = 12
        write_folder(tmp_path) if kind is ImageFolderDataModule else write_lfw(tmp_path, folds=10)
    if kind is LFWDataModule:
        write_folder(tmp_path / "faces", ("train",))
        settings["train_root"] = str(tmp_path / "faces" / "train")
    whole = kind(**settings)
    half, noisy = (
        from_command_line(kind, **settings, train_size=0.5, train_seed=1, label_noise=noise) for noise in (0, 0.5)
    )
    for data in (whole, half, noisy):
        data.setup("fit")
    samples = labelled(whole.train_data)
    assert len(half.train_data.targets) == round(len(samples) / 2)
    assert not Counter(labelled(half.train_data)) - Counter(samples)
    images, labels = zip(*labelled(half.train_data), strict=True)
    noisy_images, noisy_labels = zip(*labelled(noisy.train_data), strict=True)
    assert noisy_images == images
    assert noisy_labels != labels
    assert labelled(noisy.val_data) == labelled(whole.val_data)


def test_files_and_memory_give_the_same_subset(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        write_image(path, (number * 10, 5, 5))
    found = []
    for memory_gib in (1, 0):
        settings: dict[str, Any] = {"memory_gib": memory_gib, "num_workers": 0, "train_size": 8, "label_noise": 0.5}
        data = ImageFolderDataModule(str(tmp_path), image_size=8, batch_size=4, **settings)
        data.setup("fit")
        assert isinstance(data.train_data.images, ImageSubset) == bool(memory_gib)
        found.append([(images.tolist(), targets.tolist()) for images, targets in data.train_dataloader()])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def from_command_line(kind: type[BatchDataModule], **settings: Any) -> BatchDataModule:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    config = parser.parse_args([f"--data={kind.__name__}", *(f"--data.{key}={settings[key]}" for key in settings)])
    data = parser.instantiate_classes(config).data
    assert isinstance(data, kind)
    return data


def labelled(data: Images) -> list[tuple[bytes, int]]:
    """Return each image as bytes, with its label."""
    images = data.images[torch.arange(len(data.images))]
    return [(image.numpy().tobytes(), int(target)) for image, target in zip(images, data.targets, strict=True)]


def test_fashion_mnist_states_its_classes(tmp_path: Path) -> None:
    write_mnist(tmp_path, folder="FashionMNIST")
    data = FashionMNISTDataModule(root=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert data.train_data.images.shape == (360, 1, 28, 28)
    assert (data.num_classes, data.class_names[0], data.class_names[9]) == (10, "T-shirt/top", "Ankle boot")


def test_fit_reports_train_size_and_label_noise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = ManyDataModule(train_size=100, label_noise=0.2, train_seed=3)
        make_trainer().fit(make_model(), data)
    message = "Training on 100 of 1,600 images; 20 of 100 training labels drawn at random (label_noise 0.2); seed 3."
    assert caplog.messages.count(message) == 1


def test_command_line_accepts_subset_arguments() -> None:
    settings = ["--data.train_size=200", "--data.label_noise=0.1", "--data.train_seed=4"]
    cli = main(["fit", "--config=digits.yaml", *QUIET, "--trainer.fast_dev_run=true", *settings])
    assert cli is not None
    assert len(cli.datamodule.train_data.targets) == 200


def print_labels() -> None:
    data = ManyDataModule(train_size=80, label_noise=0.5)
    make_trainer(devices=2, strategy="ddp", fast_dev_run=True).fit(make_model(), data)
    print("labels", *indices(data.train_data.images).tolist(), *data.train_data.targets.tolist())


def test_every_rank_draws_the_same_subset() -> None:
    done = run_on(2, partial(print_labels))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("labels")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
