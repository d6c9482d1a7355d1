"""Split, batches, normalisation, and errors for invalid settings and damaged files."""

import gzip
import math
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lsoftmax_lightning.datamodules import DigitsDataModule, MNISTDataModule
from lsoftmax_lightning.datamodules.base import BatchDataModule, Images
from lsoftmax_lightning.datamodules.loader import GlobalBatchSampler
from lsoftmax_lightning.errors import DataError, InputError
from lsoftmax_lightning.transforms import RandomCropFlip

from ..helpers.formats import write_mnist
from ..helpers.training import BlobsDataModule, make_model, make_trainer


def test_digits_splits_are_stratified_and_disjoint() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    data.setup("test")
    sizes = [len(part.targets) for part in (data.train_data, data.val_data, data.test_data)]
    assert sizes == [1293, 144, 360]
    for part in (data.train_data, data.val_data, data.test_data):
        assert part.images.dtype == torch.uint8
        assert part.images.shape[1:] == data.image_shape
        counts = part.targets.bincount()
        assert counts.max() - counts.min() <= 0.06 * len(part.targets) / 10 + 2
    rows = [{tuple(image.flatten().tolist()) for image in part.images} for part in (data.train_data, data.test_data)]
    assert not rows[0] & rows[1]


def test_mean_and_std_equal_those_of_the_training_images() -> None:
    data = DigitsDataModule()
    images = data.load(train=True).images
    normalised = data.normalize(images)
    assert normalised.dtype == torch.float32
    assert abs(normalised.mean().item()) < 0.01
    assert normalised.std().item() == pytest.approx(1, abs=0.01)


def test_validation_split_follows_its_seed() -> None:
    splits = []
    for seed in (0, 0, 1):
        data = BlobsDataModule(split_seed=seed)
        data.setup("fit")
        assert data.val_data.targets.bincount().tolist() == [10] * 4
        splits.append(data.val_data.images)
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


def test_val_size_is_a_number_or_a_fraction() -> None:
    for val_size in (0.2, 40, 40.0):
        data = BlobsDataModule(val_size=val_size)
        data.setup("fit")
        assert (len(data.train_data.targets), len(data.val_data.targets)) == (160, 40)


def batches(**settings: Any) -> list[list[int]]:
    defaults: dict[str, Any] = {
        "num_samples": 10,
        "batch_size": 4,
        "shuffle": True,
        "drop_last": True,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
    }
    sampler = GlobalBatchSampler(**defaults | {k: v for k, v in settings.items() if k != "epoch"})
    sampler.set_epoch(settings.get("epoch", 0))
    found = [batch.tolist() for batch in sampler]
    assert len(found) == len(sampler)
    return found


def test_training_batches_are_complete_and_shuffled_by_seed_and_epoch() -> None:
    first = batches()
    assert [len(batch) for batch in first] == [4, 4]
    assert len({index for batch in first for index in batch}) == 8
    assert first == batches()
    others = [batches(epoch=1), batches(seed=1), batches(seed=1, epoch=1)]
    assert all(a != b for i, a in enumerate([first, *others]) for b in others[i:])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_the_batches_of_one_rank(train: bool, world_size: int) -> None:
    kind = {"shuffle": train, "drop_last": train}
    alone = batches(**kind)
    by_rank = [batches(**kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index, whole in enumerate(alone):
        parts = [batches_of_rank[index] for batches_of_rank in by_rank if index < len(batches_of_rank)]
        assert sorted(sample for part in parts for sample in part) == sorted(whole)
    assert sum(len(batch) for batches_of_rank in by_rank for batch in batches_of_rank) == (8 if train else 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, r"divisible by the number of devices \(2\), got 5; use 4"),
        ({"batch_size": 1, "world_size": 2}, r"divisible by the number of devices \(2\), got 1; use 2"),
        ({"batch_size": 11}, "batch_size: must be at most the 10 samples, got 11"),
        ({"drop_last": False, "batch_size": 11, "world_size": 11}, "devices: must be at most the 10 samples, got 11"),
        (
            {"drop_last": False, "batch_size": 1, "world_size": 2},
            r"divisible by the number of devices \(2\), got 1; use 2",
        ),
    ],
)
def test_invalid_batch_sizes_are_rejected(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batches(**settings)


def test_images_are_normalised_on_the_device_and_reshuffled_each_epoch() -> None:
    seen = []

    class Spy(BlobsDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert batch[0].dtype == torch.uint8
            out = super().on_after_batch_transfer(batch, dataloader_idx)
            seen.append(out[0])
            return out

    make_trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(make_model(), Spy())
    assert len(seen) == 2
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_images_have_the_precision_of_the_weights(precision: Any) -> None:
    make_trainer(precision=precision, fast_dev_run=True).fit(make_model(), BlobsDataModule())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_crops_do_not_depend_on_precision(precision: Any) -> None:
    seen = []

    class Spy(RandomCropFlip):
        def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
            seen.append(super().__call__(images, draws))
            return seen[-1]

    data = BlobsDataModule()
    data.augment = Spy(padding=2, flip=True)
    make_trainer(precision=precision, max_epochs=3).fit(make_model(), data)
    assert len(seen) == 3 * 8
    data = BlobsDataModule()
    data.augment = RandomCropFlip(padding=2, flip=True)
    data.normalize = lambda images: images
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    assert all(
        torch.equal(data.on_after_batch_transfer(batch, 0)[0], images)
        for batch, images in zip(loader, seen[16:], strict=True)
    )


def test_augmentation_without_draws_is_applied_only_in_training() -> None:
    class Invert:
        num_draws = 0

        def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
            assert draws.shape == (len(images), 0)
            return 255 - images

    data = BlobsDataModule()
    data.augment = Invert()
    data.normalize = lambda images: images
    data.setup("fit")
    for loader, inverted in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
        batch = next(iter(loader))
        images, _ = data.on_after_batch_transfer(batch, 0)
        assert torch.equal(images, 255 - batch[0] if inverted else batch[0])


def test_overfit_batches_repeats_one_batch() -> None:
    seen = []

    class Spy(BlobsDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.trainer.training:
                seen.append(batch[0])
            return super().on_after_batch_transfer(batch, dataloader_idx)

    trainer = make_trainer(max_epochs=3, overfit_batches=1)
    with pytest.warns(UserWarning, match="overfit"):
        trainer.fit(make_model(), Spy())
    assert len(seen) == 3
    assert all(torch.equal(batch, seen[0]) for batch in seen)


def test_loaders_work_without_a_trainer() -> None:
    data = BlobsDataModule()
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (20, 1, 8, 8)
    assert targets.shape == (20,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"val_size": 0}, "val_size"),
        ({"val_size": 1.5}, "val_size"),
        ({"val_size": -3}, "val_size"),
        ({"val_size": 1.0}, r"val_size: must leave training images, got 1\.0, which leaves none; use 0\.1"),
        ({"split_seed": -1}, "split_seed: must be from 0 to 4294967295, got -1"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlobsDataModule(**settings).setup("fit")


@pytest.mark.parametrize(("mean", "std"), [((78.0,), (0.3,)), ((0.3,), (96.0,)), ((0.3,), (0.0,))])
def test_normalization_on_another_scale_is_rejected(
    mean: tuple[float], std: tuple[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlobsDataModule, "mean", mean)
    monkeypatch.setattr(BlobsDataModule, "std", std)
    with pytest.raises(InputError, match=r"mean and std: must be within 0 \.\. 1, with std above 0, got"):
        BlobsDataModule()


@pytest.mark.parametrize("values", [(0.3, 0.3), ()])
def test_normalization_of_other_channels_is_rejected(
    values: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlobsDataModule, "mean", values)
    with pytest.raises(InputError, match="mean and std: must have a value for each of the 1 channels, or one, got"):
        BlobsDataModule()


class OwnBatches(BatchDataModule):
    """Batches of given images."""

    class_names, image_shape, mean, std = ("a", "b"), (1, 8, 8), (0.5,), (0.5,)
    data = Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))

    def load_train_val(self) -> tuple[Images, Images]:
        return self.data, self.data

    def load_test(self) -> Images:
        return self.data


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_images_of_every_datamodule_are_checked(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    OwnBatches().setup(stage)
    monkeypatch.setattr(OwnBatches, "data", Images(torch.full((4, 1, 8, 8), 255.0), OwnBatches.data.targets))
    with pytest.raises(DataError, match="OwnBatches: images must be uint8, or floats from 0 to 1"):
        OwnBatches().setup(stage)


def test_labels_may_be_of_any_integer_type(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = BlobsDataModule().load(train=True)
    monkeypatch.setattr(BlobsDataModule, "load", lambda self, train: Images(images, targets.byte()))
    data = BlobsDataModule()
    data.train_size = 100
    data.setup("fit")
    assert len(data.train_data.targets) == 100
    assert data.train_data.targets.dtype == torch.int64


@pytest.mark.parametrize("val_size", [2, 198, 500])  # fewer than one of each class, on either side
def test_impossible_split_is_rejected(val_size: int) -> None:
    with pytest.raises(InputError, match=f"val_size: must leave .* of every class, got {val_size} for 200 images: "):
        BlobsDataModule(val_size=val_size).setup("fit")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Images(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 4])),
            "labels must be 0 to 3 for its 4 classes, got 0 to 4",
        ),
        (
            Images(torch.zeros(3, 1, 8, 8), torch.tensor([0, -1, 1])),
            "labels must be 0 to 3 for its 4 classes, got -1 to 1",
        ),
        (Images(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1, 2])), "2 images and 3 labels"),
        (Images(torch.zeros(0, 1, 8, 8), torch.zeros(0)), "0 images"),
        (
            Images(torch.zeros(2, 1, 8, 8), torch.zeros(2)),
            r"integers of shape \(N,\), got torch.float32 of shape \(2,\)",
        ),
        (Images(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1).long()), r"got torch.int64 of shape \(2, 1\)"),
        (Images(torch.zeros(2, 8, 8), torch.tensor([0, 1])), r"must have the shape \(1, 8, 8\), got \(8, 8\)"),
        (
            Images(torch.full((2, 1, 8, 8), 255), torch.tensor([0, 1])),
            "must be uint8, or floats from 0 to 1, got torch.int64",
        ),
        (
            Images(torch.full((2, 1, 8, 8), 255.0), torch.tensor([0, 1])),
            "must be uint8, or floats from 0 to 1, got torch.float32 from 255 to 255",
        ),
        (Images(torch.full((2, 1, 8, 8), math.nan), torch.tensor([0, 1])), "got torch.float32 from nan to nan"),
    ],
)
def test_invalid_images_and_labels_are_rejected(data: Images, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlobsDataModule, "load", lambda self, train: data)
    with pytest.raises(DataError, match=message):
        BlobsDataModule().setup("test")


def test_mnist_reads_its_format(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = MNISTDataModule(str(tmp_path), batch_size=32)
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(make_model(num_classes=10, image_shape=data.image_shape, backbone="mnist_2d"), data)
    assert (len(data.train_data.targets), len(data.val_data.targets)) == (360, 40)
    assert data.train_data.images.shape[1:] == (1, 28, 28)


def test_mnist_downloads_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "source")

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        packed = (tmp_path / "source" / "MNIST" / "raw" / filename.removesuffix(".gz")).read_bytes()
        Path(root, filename).write_bytes(gzip.compress(packed))
        assert md5

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    data = MNISTDataModule(str(tmp_path / "new"))
    data.prepare_data()
    data.setup("test")
    assert len(data.test_data.targets) == 100


def test_missing_data_without_network_raises_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    with pytest.raises(DataError) as caught:
        MNISTDataModule(str(tmp_path / "new")).prepare_data()
    for part in (str(tmp_path / "new"), "four *-ubyte files", "MNIST/raw", "no network", "--data.root"):
        assert part in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "labels missing", "other magic"])
def test_damaged_mnist_raises_data_error(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-5])
    elif damage == "empty":
        images.write_bytes(b"")
    elif damage == "other magic":
        images.write_bytes(b"\x1f\x8b" + images.read_bytes()[2:])
    else:
        (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").unlink()
    data = MNISTDataModule(str(tmp_path))
    with pytest.raises(DataError, match="cannot read MNIST"):
        data.setup("fit")


def test_the_shuffle_follows_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for seed in ("0", "0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        data = BlobsDataModule()
        data.setup("fit")
        orders.append(next(iter(data.train_dataloader()))[0])
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 0.5}, {"limit_train_batches": 5}])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_run_resumed_at_any_step_sees_the_remaining_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.batches: list[Any] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.batches.append((trainer.current_epoch, batch_idx, batch[0].double().sum().item()))

    def train(folder: Path, ckpt_path: Path | None = None) -> tuple[list[Any], Tensor]:
        seen, model = Seen(), make_model()
        every_step = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(max_epochs=2, callbacks=[seen, every_step], enable_checkpointing=True, **settings)
        trainer.fit(model, BlobsDataModule(), ckpt_path=ckpt_path)
        return seen.batches, model.head.weight

    batches, weight = train(tmp_path)
    for step in range(1, len(batches) + 1):
        left, resumed = train(tmp_path / f"from_{step}", tmp_path / f"step={step}.ckpt")
        assert left == batches[step:]
        assert torch.equal(resumed, weight)


def test_resume_within_an_epoch_rejects_another_batch_size(tmp_path: Path) -> None:
    def train(batch_size: int, ckpt_path: Path | None = None) -> None:
        within = ModelCheckpoint(tmp_path, filename="within", every_n_train_steps=3)
        trainer = make_trainer(callbacks=[within], enable_checkpointing=True, max_epochs=2)
        trainer.fit(make_model(), BlobsDataModule(batch_size), ckpt_path=ckpt_path)

    train(32)  # five batches an epoch
    with (
        pytest.warns(UserWarning, match="not empty"),
        pytest.raises(InputError, match="batch_size: must be 32 to resume this run within an epoch, got 20"),
    ):
        train(20, tmp_path / "within.ckpt")
