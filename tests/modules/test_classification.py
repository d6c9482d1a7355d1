"""Classification module: logging, optimisation and subclassing."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, MultiStepLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.data_spec import DataSpec
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.schedules import Constant

from ..helpers.command_line import QUIET, SHORT
from ..helpers.training import BlobsDataModule, make_model, make_trainer


class Flat(nn.Module):
    num_features = 64

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class LazyModule(ClassificationModule):
    """Module whose layers infer their input shapes."""

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        layers = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16))
        layers.num_features = 16  # type: ignore[assignment]
        super().__init__(num_classes, layers, **kwargs)


def test_forward_and_embed_do_not_apply_the_margin() -> None:
    models = [make_model(margin=margin).eval() for margin in (1, 4)]
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(models[0](x), models[1](x))
    assert models[0].forward_features(x).shape == (5, models[0].head.in_features)
    assert torch.equal(models[0](x), F.linear(models[0].forward_features(x), models[0].head.weight))


def test_a_module_pickles_copies_and_saves() -> None:
    model = make_model()
    torch.save(model, "model.pt")
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load("model.pt", weights_only=False)]
    x = torch.randn(5, 1, 8, 8)
    settings = [model.configure_optimizers().defaults for model in (model, *copies)]
    assert settings[0]["lr"] == 0.1
    assert all(other == settings[0] for other in settings)
    assert all(torch.equal(other.eval()(x), model.eval()(x)) for other in copies)


def test_training_learns_and_logs_fixed_names() -> None:
    trainer = make_trainer(max_epochs=4)
    model, data = make_model(margin=4), BlobsDataModule()
    trainer.fit(model, data)
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lambda"} <= set(trainer.callback_metrics)
    (results,) = trainer.test(model, data, verbose=False)
    assert set(results) == {"test/loss", "test/acc"}
    assert results["test/acc"] > 0.95


def test_metrics_use_plain_logits_and_are_exact_for_a_smaller_last_batch() -> None:
    data = BlobsDataModule(batch_size=16)  # 50 test images: 3 batches of 16 and one of 2
    model, trainer = make_model(margin=4).eval(), make_trainer()
    (results,) = trainer.test(model, data, verbose=False)
    images, targets = data.test_data
    with torch.inference_mode():
        logits = model(data.normalize(images))
    assert results["test/acc"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert results["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


@pytest.mark.parametrize("margin", [1, 4])
def test_margin_increases_the_training_loss(margin: int) -> None:
    model = make_model(margin=margin, backbone=Flat(), lambda_schedule=Constant(0.0))
    trainer = make_trainer(limit_train_batches=1, log_every_n_steps=1)
    data = BlobsDataModule()
    weight = model.head.weight.detach().clone()
    trainer.fit(model, data)
    images, targets = next(iter(data.train_dataloader()))
    plain = F.cross_entropy(F.linear(data.normalize(images).flatten(1), weight), targets).item()
    loss = trainer.callback_metrics["train/loss"].item()
    assert loss == pytest.approx(plain) if margin == 1 else loss > plain + 0.1


class Losses(Callback):
    """Record the computed and the logged loss of each step; can stop the run or monitor the loss."""

    def __init__(self, stop_at: int = -1, monitor: str | None = None) -> None:
        self.stop_at, self.monitor = stop_at, monitor
        self.computed: list[float] = []
        self.seen: list[float | None] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.computed.append(float(outputs["loss"]))
        logged = trainer.callback_metrics.get("train/loss")
        self.seen.append(None if logged is None else float(logged))
        trainer.should_stop = trainer.global_step == self.stop_at


@pytest.mark.parametrize(("stop_at", "expected"), [(-1, [2, 5, 8, 11, 14]), (7, [2, 5, 6])])
def test_the_loss_is_logged_at_logged_steps_and_at_the_last_one(stop_at: int, expected: list[int]) -> None:
    losses = Losses(stop_at)
    logger = TensorBoardLogger(".")
    trainer = make_trainer(logger=logger, callbacks=[losses], max_epochs=2, log_every_n_steps=3)
    trainer.fit(make_model(), BlobsDataModule())  # 8 steps an epoch
    curve = EventAccumulator(logger.log_dir).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in curve] == [
        (step, pytest.approx(losses.computed[step])) for step in expected
    ]
    at_epoch_end = (7, 15) if stop_at < 0 else ()
    assert all(losses.seen[step] == losses.computed[step] for step in (*expected, *at_epoch_end) if step != 6)


def test_a_monitored_loss_is_logged_at_each_step() -> None:
    losses = Losses(monitor="train/loss")
    make_trainer(callbacks=[losses], log_every_n_steps=3).fit(make_model(), BlobsDataModule())
    assert losses.seen == losses.computed


def test_weight_decay_excludes_biases_and_normalisation() -> None:
    model = make_model()
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, SGD)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    assert all(group["lr"] == 0.1 and group["momentum"] == 0.9 for group in optimizer.param_groups)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            is_kernel = kind == "weight" and isinstance(module, nn.Conv2d | nn.Linear | LSoftmaxLinear)
            assert (id(parameter) in decayed) == is_kernel, name


@pytest.mark.parametrize(("interval", "steps"), [("step", 8), ("epoch", 1)])
def test_scheduler_steps_by_step_or_epoch(interval: Any, steps: int) -> None:
    model = make_model(lr_scheduler=lambda o: StepLR(o, 1, gamma=0.5), lr_scheduler_interval=interval)
    trainer = make_trainer()
    trainer.fit(model, BlobsDataModule())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**steps)


@pytest.mark.parametrize(("interval", "every"), [("epoch", 1), ("step", 1), ("step", 2)])
def test_plateau_scheduler_monitors_the_validation_loss(interval: Any, every: int) -> None:
    model = make_model(
        lr_scheduler=lambda o: ReduceLROnPlateau(o, "val/loss", patience=0, threshold=1e9),
        lr_scheduler_interval=interval,
    )
    trainer = make_trainer(max_epochs=2 * every, check_val_every_n_epoch=every)
    trainer.fit(model, BlobsDataModule())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)  # no epoch was good enough


def test_plateau_scheduler_without_a_validation_in_the_first_epoch_is_an_error() -> None:
    model = make_model(lr_scheduler=lambda o: ReduceLROnPlateau(o, "val/loss"))
    trainer = make_trainer(max_epochs=6, check_val_every_n_epoch=None, val_check_interval=20)
    with pytest.raises(InputError, match="needs val/loss at the end of an epoch, after 8 batches, got"):
        trainer.fit(model, BlobsDataModule())


class Fixed(ClassificationModule):
    """Module that sets an argument of its base."""

    def __init__(self, num_classes: int, backbone: str = "digits", width: int = 3, **kwargs: Any) -> None:
        super().__init__(num_classes, backbone, label_smoothing=0.1, image_shape=(1, 8, 8), **kwargs)
        self.width = width


class FixedAgain(Fixed):
    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, width=5, **kwargs)


@pytest.mark.parametrize("kind", [Fixed, FixedAgain])
def test_a_subclass_with_fixed_arguments_loads_from_its_checkpoint(kind: type[Fixed]) -> None:
    model = kind(4, margin=3)
    trainer = make_trainer()
    trainer.fit(model, BlobsDataModule())
    trainer.save_checkpoint("fixed.ckpt")
    loaded = kind.load_from_checkpoint("fixed.ckpt", weights_only=True)
    assert (loaded.margin, loaded.label_smoothing, loaded.width) == (3, 0.1, model.width)
    assert kind.load_from_checkpoint("fixed.ckpt", margin=2, weights_only=True).margin == 2


def test_a_module_within_another_keeps_its_arguments() -> None:
    class Outer(LightningModule):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.inner = Fixed(size, margin=2)

    given = {"num_classes": 4, "backbone": "digits", "width": 3, "margin": 2}
    assert given.items() <= Outer(4).inner.hparams.items()  # Lightning adds those of the outer module


class Interrupts(Callback):
    """Callback that fails within an epoch."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("interrupted")


def test_training_metrics_are_logged_after_an_interrupted_training() -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match="interrupted"):
        make_trainer(callbacks=[Interrupts()]).fit(model, BlobsDataModule())
    trainer = make_trainer()
    trainer.fit(model, BlobsDataModule())
    assert "train/acc" in trainer.callback_metrics


def test_weighted_loss_does_not_depend_on_the_batch_size() -> None:
    model = make_model()
    model.criterion = nn.CrossEntropyLoss(weight=torch.tensor([10.0, 1.0, 1.0, 1.0]))
    data = BlobsDataModule()
    found = []
    for batch_size in (7, 50):
        data.batch_size = batch_size
        found.append(make_trainer().test(model, data, verbose=False)[0]["test/loss"])
    assert found[0] == pytest.approx(found[1])


def test_plateau_scheduler_accepts_validations_by_time() -> None:
    model = make_model(lr_scheduler=lambda o: ReduceLROnPlateau(o, "val/loss"))
    trainer = make_trainer(check_val_every_n_epoch=None, val_check_interval="00:00:00:00")
    trainer.fit(model, BlobsDataModule())
    assert trainer.current_epoch == 1


def test_plateau_scheduler_of_the_training_loss_steps_with_the_optimiser() -> None:
    model = make_model(lr_scheduler=lambda o: ReduceLROnPlateau(o, "train/loss", patience=0, threshold=1e9))
    trainer = make_trainer(limit_train_batches=3)
    trainer.fit(model, BlobsDataModule())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


ONE_CYCLES: dict[str, Callable[[SGD, int], Any]] = {
    "alone": lambda o, steps: OneCycleLR(o, 0.1, total_steps=steps),
    "chained": lambda o, steps: ChainedScheduler([StepLR(o, 100), OneCycleLR(o, 0.1, total_steps=steps)]),
}


@pytest.mark.parametrize("kind", ONE_CYCLES)
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize(("interval", "steps"), [("step", 16), ("epoch", 2)])
def test_one_cycle_shorter_than_the_run_is_rejected(interval: Any, steps: int, kind: str) -> None:
    def fit(total_steps: int) -> Trainer:
        make = ONE_CYCLES[kind]
        model = make_model(lr_scheduler=lambda o: make(o, total_steps), lr_scheduler_interval=interval)
        trainer = make_trainer(max_epochs=2)
        trainer.fit(model, BlobsDataModule())
        return trainer

    with pytest.raises(
        InputError, match=rf"OneCycleLR must have at least the {steps} steps of the run, got {steps - 1}"
    ):
        fit(steps - 1)
    assert fit(steps).global_step == 16


def test_too_short_one_cycle_of_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    def fit(total_steps: int, ckpt_path: Path | None = None) -> Trainer:
        trainer = make_trainer(max_epochs=-1, max_steps=total_steps)
        model = make_model(lr_scheduler=lambda o: OneCycleLR(o, 0.1, total_steps))
        trainer.fit(model, BlobsDataModule(), ckpt_path=ckpt_path)
        return trainer

    fit(3).save_checkpoint(tmp_path / "short.ckpt")
    with pytest.raises(InputError, match="6 steps of the run, got 3; the value in the checkpoint"):
        fit(6, tmp_path / "short.ckpt")


def test_a_checkpoint_is_plain_and_rebuilds_the_module(tmp_path: Path) -> None:
    model = make_model(margin=3, lr_scheduler=lambda o: MultiStepLR(o, [3]))
    trainer = make_trainer()
    trainer.fit(model, BlobsDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    loaded = ClassificationModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))
    assert loaded.head.margin == 3


def test_loading_a_checkpoint_requires_the_backbone_module(tmp_path: Path) -> None:
    model = make_model(backbone=Flat(), image_shape=None)
    trainer = make_trainer()
    trainer.fit(model, BlobsDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(TypeError, match="backbone"):
        ClassificationModule.load_from_checkpoint(tmp_path / "model.ckpt")
    loaded = ClassificationModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=Flat())
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_a_deep_copy_is_independent() -> None:
    model = make_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.zero_()
    assert model.head.weight.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0}, "margin"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": None}, "num_classes: must be an integer"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"backbone": "resnet"}, "got 'resnet'"),
        ({"image_shape": None}, "image_shape"),
        ({"backbone": nn.Flatten()}, "num_features"),
        ({"backbone_args": {"width": 3}}, "cannot be built with"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model(**settings)


def test_labels_out_of_range_are_rejected() -> None:
    model, data = make_model(num_classes=3), BlobsDataModule()
    with pytest.raises(InputError, match="classes 0 to 2, got 0 to 3"):
        make_trainer(num_sanity_val_steps=0).fit(model, data)
    with pytest.raises(InputError, match="classes 0 to 2, got 0 to 3"):
        make_trainer().test(model, data)


class Indexed(ClassificationModule):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step(batch, batch_idx)


def test_several_dataloaders_are_rejected() -> None:
    data = BlobsDataModule()
    data.setup("test")
    loader = DataLoader(TensorDataset(data.normalize(data.test_data.images), data.test_data.targets), batch_size=20)
    model = Indexed(4, "digits", image_shape=(1, 8, 8))
    with pytest.raises(InputError, match=r"dataloaders: must be one, because .*, got several; evaluate each by"):
        make_trainer().test(model, [loader, loader], verbose=False)


def test_plain_dataloaders_are_accepted() -> None:
    data = BlobsDataModule()
    data.setup("fit")
    images, targets = data.train_data
    loader = DataLoader(TensorDataset(data.normalize(images), targets), batch_size=20)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make_model(), loader, loader)
    assert trainer.callback_metrics["val/acc"] > 0.5


def test_labels_of_any_integer_type_are_accepted() -> None:
    class Short(BlobsDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, targets = super().on_after_batch_transfer(batch, dataloader_idx)
            return images, targets.to(torch.int16)

    make_trainer(fast_dev_run=True).fit(make_model(), Short())


def test_subclass_can_override_parts_without_overriding_steps() -> None:
    class Other(ClassificationModule):
        def configure_model_parts(self, backbone: str | nn.Module) -> None:
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            self.head = LSoftmaxLinear(3, self.hparams.num_classes, self.hparams.margin)

        def configure_losses(self) -> None:
            self.criterion = nn.MultiMarginLoss()

        def configure_metrics(self) -> None:
            super().configure_metrics()
            self.test_metrics.add_metrics({"again": self.test_metrics["acc"].clone()})

    model, data, trainer = Other(num_classes=4, backbone="digits"), BlobsDataModule(), make_trainer()
    trainer.fit(model, data)
    (results,) = trainer.test(model, data, verbose=False)
    assert set(results) == {"test/loss", "test/acc", "test/again"}


def test_predict_gives_classes_and_probabilities_in_order() -> None:
    model, data = make_model().eval(), BlobsDataModule()
    batches = make_trainer().predict(model, data)
    assert batches is not None
    predicted = torch.cat([batch["prediction"] for batch in batches])
    probabilities = torch.cat([batch["probability"] for batch in batches])
    with torch.inference_mode():
        expected = model(data.normalize(data.test_data.images)).softmax(1).max(1)
    assert torch.equal(predicted, expected.indices)
    torch.testing.assert_close(probabilities, expected.values)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_classifies_raw_images_as_the_test_does(precision: Any) -> None:
    data, trainer = BlobsDataModule(), make_trainer(max_epochs=3, precision=precision)
    trainer.fit(make_model(), data)
    (results,) = trainer.test(trainer.lightning_module, data, verbose=False)
    trainer.save_checkpoint("some.ckpt")
    model = ClassificationModule.load_from_checkpoint("some.ckpt", weights_only=True)
    model.backbone.layers[0].eval()  # a frozen layer
    before = [part.training for part in model.modules()]
    images, targets = data.load(train=False)
    names, probabilities = model.classify(images)
    correct = [name == data.class_names[target] for name, target in zip(names, targets.tolist(), strict=True)]
    assert sum(correct) / len(correct) == pytest.approx(results["test/acc"])
    assert results["test/acc"] > 0.9
    assert (probabilities.shape, probabilities.dtype) == ((50,), torch.float32)
    assert [part.training for part in model.modules()] == before
    one = model.classify(images[:1])
    assert (one.names, one.probabilities.item()) == (names[:1], pytest.approx(probabilities[0].item(), abs=1e-2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.float(), r"images: must be uint8 \(N, 1, 8, 8\).* got float32 \(50, 1, 8, 8\)"),
        (lambda images: images[0], r"got uint8 \(1, 8, 8\)"),
        (lambda images: images[:, :, 1:], r"got uint8 \(50, 1, 7, 8\)"),
        (lambda images: images.repeat(1, 3, 1, 1), r"got uint8 \(50, 3, 8, 8\)"),
    ],
)
def test_only_raw_images_are_classified(change: Any, message: str) -> None:
    model, data = make_model(), BlobsDataModule()
    images = data.load(train=False).images
    with pytest.raises(InputError, match="data_spec: must have class_names, image_shape, mean, std"):
        model.classify(images)
    model.data_spec = DataSpec.from_datamodule(data)
    with pytest.raises(InputError, match=message):
        model.classify(change(images))


def test_lazy_layers_are_initialised_before_training() -> None:
    model, data = LazyModule(4, image_shape=(1, 8, 8)), BlobsDataModule()
    assert all(part.training for part in model.modules())
    shapes = {tuple(weight.shape) for weight in model.configure_optimizers().param_groups[0]["params"]}  # type: ignore[union-attr]
    assert shapes == {(4, 1, 3, 3), (16, 144), (4, 16)}  # the parameters with weight decay
    trainer = make_trainer()
    trainer.fit(model, data)
    (results,) = trainer.test(model, data, verbose=False)
    trainer.save_checkpoint("some.ckpt")
    loaded = LazyModule.load_from_checkpoint("some.ckpt", weights_only=True)
    assert make_trainer().test(loaded, data, verbose=False)[0] == pytest.approx(results)


def test_lazy_layers_without_image_shape_are_rejected_before_training() -> None:
    with pytest.raises(InputError, match="image_shape: is required for the lazy layers of Sequential, got None; pass"):
        make_trainer().fit(LazyModule(4), BlobsDataModule())
    with pytest.raises(InputError, match=r"backbone: Sequential does not accept images of \(1, 2, 2\): Calculated"):
        LazyModule(4, image_shape=(1, 2, 2))
    torch.save(LazyModule(4, image_shape=(1, 8, 8)).state_dict(), "weights.pt")
    model = LazyModule(4).eval()  # as from a checkpoint of an earlier release
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_network_with_lazy_layers_works_in_every_command() -> None:
    lazy = ["--config=digits.yaml", "--model=tests.modules.test_classification.LazyModule", "--model.margin=2"]
    main(["fit", *lazy, *SHORT])
    last = "--ckpt_path=runs/digits/m2-s0/checkpoints/last.ckpt"
    for command in ("validate", "test", "predict"):
        main([command, *lazy, *QUIET, last])
    main(["fit", *lazy, *SHORT, "--trainer.max_epochs=2", last])
    main(["export", last, "--format=torch_export"])


def test_bf16_training_learns() -> None:
    trainer, model, data = make_trainer(max_epochs=4, precision="bf16-mixed"), make_model(margin=4), BlobsDataModule()
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test/acc"] > 0.95
    assert model.head.weight.dtype == torch.float32


def test_weight_averaging_keeps_lambda() -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    model = make_model(lambda_schedule=Constant(5.0))
    make_trainer(max_epochs=2, callbacks=[EMAWeightAveraging()]).fit(model, BlobsDataModule())
    assert model.head.lambda_ == 5.0


def test_channels_last_changes_only_the_layout() -> None:
    plain, last = make_model(), make_model(channels_last=True)
    x = torch.rand(4, 1, 8, 8)
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in last.backbone.parameters() if w.ndim == 4)
    torch.testing.assert_close(last.eval()(x), plain.eval()(x))


def test_backbone_is_compiled_once_without_changing_the_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, graphs = [], []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr("torch.compile", lambda call, mode: modes.append(mode) or compile(call, backend=backend))
    model = make_model(compile="reduce-overhead")
    data = BlobsDataModule(batch_size=20, val_size=30)  # the last validation batch is smaller
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, data)
    trainer.test(model, data)
    assert modes == ["reduce-overhead"]
    assert len(graphs) == 1
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert "compile" not in model.hparams
    assert model.state_dict().keys() == make_model().state_dict().keys()


def test_data_of_an_earlier_run_are_neither_stored_nor_compared() -> None:
    trainer, model = make_trainer(), make_model(num_classes=3)
    trainer.validate(make_model(), BlobsDataModule(), verbose=False)
    loader = DataLoader(TensorDataset(torch.ones(4, 1, 8, 8), torch.arange(4) % 3), batch_size=4)
    trainer.fit(model, loader, loader)
    assert model.data_spec is None
    model.data_spec = DataSpec(class_names=("a", "b", "c"))
    trainer.validate(model, loader, verbose=False)
