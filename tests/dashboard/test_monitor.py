"""Scalars of a training with a margin, on any logger, and their charts on TensorBoard."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn

from lsoftmax_lightning import ClassificationModule, VerificationModule
from lsoftmax_lightning.callbacks import LambdaAnnealing, MarginMonitor
from lsoftmax_lightning.datamodules import LFWFoldDataModule
from lsoftmax_lightning.functional import margin_logits
from lsoftmax_lightning.geometry import effective_margin
from lsoftmax_lightning.metrics import ANGLE_COUNTS
from lsoftmax_lightning.schedules import AccuracyFeedback, Constant, PowerLaw

from ..helpers.formats import write_lfw
from ..helpers.training import BlobsDataModule, make_model, make_trainer, num_hooks

METRICS = {"angle", "feature_norm", "segment_0", "segment_1"}
SEPARATION = {f"{kind}_angle_{what}" for kind in ("weight", "centre") for what in ("mean", "nearest", "min")}


def fit(model: Any, data: Any = None, callbacks: Any = (), **settings: Any) -> tuple[Any, EventAccumulator]:
    logger = TensorBoardLogger(".", name="run")
    trainer = make_trainer(logger=logger, log_every_n_steps=4, callbacks=[MarginMonitor(), *callbacks], **settings)
    trainer.fit(model, data or BlobsDataModule())
    return trainer, EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()


def steps(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


def test_monitor_logs_angles_norms_and_segments() -> None:
    trainer, events = fit(make_model(margin=2), max_epochs=2)  # epochs of 8 steps
    tags = set(events.Tags()["scalars"])
    assert {f"val/{name}" for name in METRICS | SEPARATION | {"margin_loss", "loss", "acc"}} <= tags
    assert {f"train/{name}" for name in METRICS | {"cross_entropy", "loss", "acc"}} <= tags
    assert {"lambda", "effective_margin", "lr", "images_per_second"} <= tags
    for tag in ("train/loss", "train/angle", "effective_margin", "lr", "images_per_second"):
        assert steps(events, tag) == [3, 7, 11, 15], tag
    for tag in ("val/loss", "val/angle", "val/margin_loss"):
        assert steps(events, tag) == [7, 15], tag  # not in the sanity check
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))
    assert not {"val/angle", "val/margin_loss"} - set(trainer.callback_metrics)


def test_metrics_equal_those_computed_from_the_images() -> None:
    model, data = make_model(margin=3, lambda_schedule=Constant(2.0)), BlobsDataModule()
    _, events = fit(model, data)
    found = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    images, target = data.val_data
    with torch.inference_mode():
        features, weight = model.eval().forward_features(data.normalize(images)), model.head.weight
        theta = torch.arccos(torch.cosine_similarity(features, weight[target]))
        loss = F.cross_entropy(margin_logits(features @ weight.T, features, weight, target, 3, 2.0), target)
    assert found["val/angle"] == pytest.approx(torch.rad2deg(theta).mean().item(), rel=1e-4)
    assert found["val/feature_norm"] == pytest.approx(features.norm(dim=1).mean().item(), rel=1e-4)
    assert found["val/margin_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["val/margin_loss"] > found["val/loss"]
    assert found["effective_margin"] == pytest.approx(effective_margin(3, 2.0))
    assert found["lr"] == pytest.approx(0.1)


def test_training_scalars_are_logged_with_several_optimizers() -> None:
    class Two(ClassificationModule):
        def __init__(self) -> None:
            super().__init__(4, "digits", image_shape=(1, 8, 8))
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))  # type: ignore[arg-type]
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.backbone, self.head)]

    _, events = fit(Two(), max_epochs=2)  # epochs of 8 batches
    assert steps(events, "train/angle") == steps(events, "train/loss") == [3, 7, 11, 15]  # batches, not optimizer steps


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_margin_loss_equals_the_plain_loss_without_a_margin(smoothing: float) -> None:
    trainer, _ = fit(make_model(margin=1, label_smoothing=smoothing))
    metrics = trainer.callback_metrics
    assert metrics["val/margin_loss"] == pytest.approx(metrics["val/loss"].item())


def test_checkpoint_has_no_angles_of_another_training() -> None:
    monitor = MarginMonitor()
    for index, batches in enumerate((1.0, 0)):
        trainer = make_trainer(callbacks=[monitor], limit_val_batches=batches)
        trainer.fit(make_model(), BlobsDataModule())
        trainer.save_checkpoint(f"{index}.ckpt")
    found = [ANGLE_COUNTS in torch.load(f"{index}.ckpt", weights_only=True) for index in range(2)]
    assert found == [True, False]


def test_checkpoint_has_no_angles_of_an_earlier_step() -> None:
    trainer = make_trainer(callbacks=[MarginMonitor()], max_steps=9, max_epochs=-1)  # epochs of 8 steps
    trainer.fit(make_model(), BlobsDataModule())
    trainer.save_checkpoint("last.ckpt")
    assert ANGLE_COUNTS not in torch.load("last.ckpt", weights_only=True)


def test_test_logs_the_angles() -> None:
    trainer = make_trainer(callbacks=[MarginMonitor()])
    model, data = make_model(margin=2).eval(), BlobsDataModule()
    (results,) = trainer.test(model, data, verbose=False)
    assert set(results) == {f"test/{name}" for name in METRICS | SEPARATION | {"loss", "acc"}}
    images, target = data.test_data
    with torch.inference_mode():
        cosines = torch.cosine_similarity(model.forward_features(data.normalize(images)), model.head.weight[target])
    assert results["test/angle"] == pytest.approx(torch.rad2deg(torch.arccos(cosines)).mean().item(), rel=1e-4)
    (validated,) = trainer.validate(model, data, verbose=False)
    assert "val/angle" in validated
    assert "val/margin_loss" not in validated  # lambda is not set outside of training


def test_checkpoint_can_monitor_an_angle() -> None:
    stopping = EarlyStopping("val/angle", patience=1, min_delta=1e9, mode="min")
    trainer, _ = fit(make_model(), callbacks=[stopping], max_epochs=9)
    assert trainer.current_epoch == 2


def drawn_tags(events: EventAccumulator) -> dict[str, list[list[str]]]:
    """Return the scalars that each chart of the Custom Scalars tab draws, by category."""
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    return {
        category.title: [
            [tag for tag in events.Tags()["scalars"] for pattern in chart.multiline.tag if re.match(pattern, tag)]
            for chart in category.chart
        ]
        for category in layout.category
    }


def test_custom_scalars_layout_is_written() -> None:
    _, events = fit(make_model())
    drawn = drawn_tags(events)
    assert list(drawn) == ["Training", "Validation", "Annealing", "Separability", "Speed"]
    for charts in drawn.values():
        for tags in charts:
            assert tags
            assert len({tag.partition("/")[0] for tag in tags}) == 1  # one colour does not stand for two stages


@pytest.mark.parametrize("has_callback", [False, True])
def test_run_is_listed_under_hparams(has_callback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    callbacks = [LambdaAnnealing(PowerLaw(base=9.0))] if has_callback else []
    _, events = fit(make_model(margin=2, label_smoothing=0.1), callbacks=callbacks)
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(events.summary_metadata[tag].plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    }
    row = content["_hparams_/session_start_info"].session_start_info.hparams
    assert row["margin"].number_value == 2
    assert row["backbone"].string_value == "digits"
    schedule = PowerLaw(base=9.0) if has_callback else AccuracyFeedback()
    assert row["lambda"].string_value == repr(schedule)
    assert row["lambda_min"].number_value == 0
    assert row["seed"].string_value == "7"
    assert row["settings/lr"].number_value == 0.1
    assert row["settings/label_smoothing"].number_value == 0.1
    assert sorted(row)[:5] == [
        "backbone",
        "lambda",
        "lambda_min",
        "margin",
        "seed",
    ]  # the columns that TensorBoard shows by default
    metrics = [metric.name.tag for metric in content["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == ["val/acc", "test/acc", "val/angle"]
    assert "hp_metric" not in events.Tags()["scalars"]
    assert steps(events, "val/acc") == [7]  # no placeholder before the first value


def test_pairs_have_no_class_scalars(tmp_path: Path) -> None:
    write_lfw(tmp_path, folds=4, count=4)
    data = LFWFoldDataModule(str(tmp_path), 4, 3, image_size=8, batch_size=4, num_workers=0)
    model = VerificationModule(data.num_classes, "digits", image_shape=data.image_shape, margin=2)
    _, events = fit(model, data)
    tags = set(events.Tags()["scalars"])
    assert {"train/angle", "train/cross_entropy", "val/auc", "val/weight_angle_min"} <= tags
    assert not {"val/angle", "val/centre_angle_mean", "val/margin_loss"} & tags
    drawn = drawn_tags(events)
    assert ["val/auc"] in drawn["Validation"]
    assert all(drawn["Training"] + drawn["Validation"] + drawn["Separability"])


def test_other_loggers_get_the_scalars() -> None:
    logger = CSVLogger(".", name="csv")
    trainer = make_trainer(callbacks=[MarginMonitor()], logger=logger, log_every_n_steps=4)
    trainer.fit(make_model(), BlobsDataModule())
    make_trainer(callbacks=[MarginMonitor()]).fit(make_model(), BlobsDataModule())
    assert "val/angle" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_module_without_lsoftmax_head_is_not_observed() -> None:
    class Other(ClassificationModule):
        def configure_model_parts(self, backbone: str | nn.Module) -> None:
            super().configure_model_parts(backbone)
            self.classifier = self.head
            del self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.forward_features(x))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_callbacks(self) -> list[Any]:
            return []

    with pytest.warns(UserWarning, match="MarginMonitor shows nothing: Other has no LSoftmaxLinear as its `head`"):
        _, events = fit(Other(4, "digits", image_shape=(1, 8, 8)))
    assert not {"val/angle", "train/angle"} & set(events.Tags()["scalars"])


def test_training_step_with_only_margin_logits_is_monitored() -> None:
    class Bare(ClassificationModule):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, target = batch
            return self.criterion(self.head(self.forward_features(x), target=target), target)

    torch.manual_seed(0)
    bare = Bare(4, "digits", margin=2, image_shape=(1, 8, 8))
    _, events = fit(bare)
    _, expected = fit(make_model())
    for tag in ("train/cross_entropy", "train/angle", "val/margin_loss"):
        values = [[event.value for event in run.Scalars(tag)] for run in (events, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), tag


def test_accumulated_batches_are_logged_by_optimiser_step() -> None:
    trainer, events = fit(make_model(), accumulate_grad_batches=2, max_epochs=2)
    assert trainer.global_step == 8
    assert steps(events, "train/angle") == steps(events, "train/loss") == [3, 7]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_monitor_resumes_within_an_epoch() -> None:
    saving = ModelCheckpoint(dirpath=".", filename="middle", every_n_train_steps=5, save_top_k=1)
    make_trainer(callbacks=[MarginMonitor(), saving], enable_checkpointing=True).fit(make_model(), BlobsDataModule())
    logger = TensorBoardLogger(".", name="resumed")
    trainer = make_trainer(callbacks=[MarginMonitor()], logger=logger, log_every_n_steps=1, max_epochs=2)
    trainer.fit(make_model(), BlobsDataModule(), ckpt_path="middle.ckpt")
    assert steps(EventAccumulator(logger.log_dir).Reload(), "train/angle")[0] == 5


def test_batches_without_classes_have_no_scalars() -> None:
    class Dicts(BlobsDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, target = super().on_after_batch_transfer(batch, dataloader_idx)
            return {"images": images, "target": target}

    class FromDicts(ClassificationModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["images"], batch["target"]), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step((batch["images"], batch["target"]), batch_idx)

    with pytest.warns(UserWarning, match="``compute`` method of metric ClassAngles was called before"):
        trainer, events = fit(FromDicts(4, "digits", image_shape=(1, 8, 8)), Dicts())
    assert not {"val/angle", "train/angle", "val/margin_loss"} & {*events.Tags()["scalars"], *trainer.callback_metrics}


def test_no_hook_is_left_on_the_head() -> None:
    model = make_model()
    fit(model)
    assert num_hooks(model) == 0
