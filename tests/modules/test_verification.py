"""Verification module: each image is embedded once, and metrics are those of pairs of unseen people."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lsoftmax_lightning import VerificationModule
from lsoftmax_lightning.datamodules import LFWFoldDataModule
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.metrics import PairVerification

from ..helpers.formats import write_lfw
from ..helpers.training import BlobsDataModule, make_model, make_trainer

METRICS = {"acc", "acc_stderr", "auc", "eer", "tar_at_far_1e-2", "tar_at_far_1e-3"}


@pytest.fixture
def data(tmp_path: Path) -> LFWFoldDataModule:
    write_lfw(tmp_path, folds=4, count=4)
    return LFWFoldDataModule(str(tmp_path), 4, 3, image_size=8, batch_size=8, num_workers=0, flip=True)


def make(data: LFWFoldDataModule, **settings: Any) -> VerificationModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"backbone": "digits", "margin": 2}
    return VerificationModule(data.num_classes, image_shape=data.image_shape, **defaults | settings)


def test_training_logs_metrics_of_pairs(data: LFWFoldDataModule) -> None:
    trainer, model = make_trainer(max_epochs=2), make(data)
    trainer.fit(model, data)
    logged = set(trainer.callback_metrics)
    assert {"train/loss", "train/acc", "lambda"} | {f"val/{name}" for name in METRICS} <= logged
    (results,) = trainer.test(model, data, verbose=False)
    assert set(results) == {f"test/{name}" for name in METRICS}
    assert results["test/acc"] > 0.7  # both images of a person are equal except for JPEG
    (validated,) = trainer.validate(model, data, verbose=False)
    assert set(validated) == {f"val/{name}" for name in METRICS}


@pytest.mark.parametrize("settings", [{}, {"pca_components": 5, "mirror": True}])
def test_logged_metrics_equal_those_of_the_embeddings(settings: dict[str, Any], data: LFWFoldDataModule) -> None:
    model, trainer = make(data, **settings).eval(), make_trainer()
    (results,) = trainer.test(model, data, verbose=False)
    metric = PairVerification(data.test_pairs, settings.get("pca_components"))
    with torch.inference_mode():
        images = data.normalize(data.test_data.images[torch.arange(len(data.test_files.paths))])
        features = model.forward_features(images)
        if settings:
            features = features + model.forward_features(images.flip(-1))
    metric.update(features, torch.arange(len(features)))
    assert results == pytest.approx(
        {f"test/{name}": value.item() for name, value in metric.compute().items()}, abs=1e-5
    )


def test_each_image_is_embedded_once(data: LFWFoldDataModule) -> None:
    counted = 0

    class Counting(VerificationModule):
        def forward_features(self, x: Tensor) -> Tensor:
            nonlocal counted
            counted += len(x)
            return super().forward_features(x)

    model = Counting(data.num_classes, "digits", image_shape=data.image_shape)
    make_trainer().test(model, data, verbose=False)
    assert counted == len(data.test_files.paths) < 2 * len(data.test_pairs)


def test_a_partial_evaluation_gives_nan(data: LFWFoldDataModule) -> None:
    trainer = make_trainer(limit_test_batches=1)
    with pytest.warns(UserWarning, match="have missing or non-finite embeddings"):
        (results,) = trainer.test(make(data), data, verbose=False)
    assert all(math.isnan(value) for value in results.values())


def test_data_without_pairs_is_an_error() -> None:
    model = VerificationModule(4, "digits", image_shape=(1, 8, 8))
    with pytest.raises(InputError, match="with test_pairs, got BlobsDataModule; use"):
        make_trainer().test(model, BlobsDataModule())


def test_pairs_of_an_earlier_run_are_not_used(data: LFWFoldDataModule) -> None:
    trainer, model = make_trainer(), make(data)
    trainer.test(model, data, verbose=False)
    with pytest.raises(InputError, match="with test_pairs, got NoneType"):
        trainer.test(model, DataLoader(TensorDataset(torch.ones(4, *data.image_shape), torch.arange(4))))


def test_classification_module_rejects_pairs(data: LFWFoldDataModule) -> None:
    model = make_model(num_classes=data.num_classes, image_shape=data.image_shape)
    with pytest.raises(InputError, match="needs a VerificationModule"):
        make_trainer().fit(model, data)


@pytest.mark.parametrize("pca_components", [0, 65])
def test_more_pca_components_than_features_is_an_error(pca_components: int, data: LFWFoldDataModule) -> None:
    with pytest.raises(InputError, match=f"pca_components: must be from 1 to 64, .* got {pca_components};"):
        make(data, pca_components=pca_components)


def test_predict_gives_embeddings_in_order(data: LFWFoldDataModule) -> None:
    model = make(data).eval()
    batches = make_trainer().predict(model, data)
    assert batches is not None
    found = torch.cat([batch["embedding"] for batch in batches])
    with torch.inference_mode():
        images = data.test_data.images[torch.arange(len(data.test_files.paths))]
        torch.testing.assert_close(found, model.forward_features(data.normalize(images)))


def test_a_checkpoint_rebuilds_the_module(data: LFWFoldDataModule, tmp_path: Path) -> None:
    trainer, model = make_trainer(), make(data, pca_components=5, mirror=True)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = VerificationModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert (loaded.hparams["pca_components"], loaded.hparams["mirror"]) == (5, True)
    assert trainer.test(loaded, data, verbose=False) == trainer.test(model, data, verbose=False)
