"""Annealing of lambda by optimiser step, in all modes of the Trainer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
from lsoftmax_lightning.callbacks import ExactResume, LambdaAnnealing
from lsoftmax_lightning.errors import DivergenceError, InputError
from lsoftmax_lightning.lr_schedulers import FractionalMultiStepLR
from lsoftmax_lightning.schedules import Constant, PowerLaw, RunFraction

from ..helpers.training import BlobsDataModule, make_model, make_trainer

SCHEDULE = PowerLaw(base=100, gamma=0.1, power=2)


class Recorder(Callback):
    """Record the optimiser step and lambda at each training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.seen.append((trainer.global_step, pl_module.head.lambda_))


def fit(model: LightningModule, **settings: Any) -> tuple[Trainer, list[tuple[int, float]]]:
    recorder, ckpt_path = Recorder(), settings.pop("ckpt_path", None)
    trainer = make_trainer(callbacks=[recorder, *settings.pop("callbacks", [])], **settings)
    trainer.fit(model, BlobsDataModule(), ckpt_path=ckpt_path)
    return trainer, recorder.seen


def expected(steps: int, repeat: int = 1) -> list[tuple[int, float]]:
    return [(step, SCHEDULE(step)) for step in range(steps) for _ in range(repeat)]


def test_lambda_follows_the_schedule_by_step() -> None:
    trainer, seen = fit(make_model(lambda_schedule=SCHEDULE), max_epochs=2)
    assert seen == expected(16)  # 160 training images in batches of 20
    assert trainer.progress_bar_metrics["lambda"] == pytest.approx(SCHEDULE(15))


def test_gradient_accumulation_does_not_speed_up_annealing() -> None:
    _, seen = fit(make_model(lambda_schedule=SCHEDULE), accumulate_grad_batches=4)
    assert seen == expected(2, repeat=4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("scheduling", "settings", "length"),
    [
        ({0: 1, 2: 4}, {"max_epochs": 4}, 8 + 8 + 2 + 2),  # epochs of 8 batches
        ({0: 3, 1: 1}, {"max_epochs": 3}, 3 + 8 + 8),
        ({1: 8}, {"max_epochs": 3, "max_steps": 9}, 9),
        ({0: 2, 1: 1}, {"max_epochs": -1, "max_steps": 20}, 20),
    ],
)
def test_schedules_account_for_changing_gradient_accumulation(
    scheduling: dict[int, int], settings: dict[str, Any], length: int, tmp_path: Path
) -> None:
    schedule = RunFraction(fraction=1.0)

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[list[float], list[float]]:
        rates: list[float] = []
        seen = Recorder()
        model = make_model(
            lambda_schedule=schedule, lr_scheduler=lambda optimizer: FractionalMultiStepLR(optimizer, [0.5])
        )
        accumulation = GradientAccumulationScheduler(dict(scheduling))
        callbacks = (seen, ExactResume(), accumulation, Rates(rates), *callbacks)
        trainer = make_trainer(callbacks=[*callbacks], enable_checkpointing=True, **settings)
        trainer.fit(model, BlobsDataModule(), ckpt_path=ckpt_path)
        assert trainer.global_step == length
        return list(dict(seen.seen).values()), rates

    saved = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    lambdas, rates = run(saved)
    assert lambdas == [schedule(step, length) for step in range(length)]
    assert rates == pytest.approx([0.1 if step < round(length / 2) else 0.01 for step in range(length)])
    for step in (3, length - 2):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == (lambdas[step:], pytest.approx(rates[step:]))


class Rates(Callback):
    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_validation_and_sanity_checks_do_not_advance_lambda() -> None:
    model, data, recorder = make_model(lambda_schedule=SCHEDULE), BlobsDataModule(), Recorder()
    trainer = make_trainer(callbacks=[recorder], num_sanity_val_steps=2, val_check_interval=2)
    before = trainer.validate(model, data, verbose=False)
    assert 0 <= before[0]["val/acc"] <= 1
    trainer.fit(model, data)
    assert recorder.seen == expected(8)


def test_second_fit_continues_from_the_step_of_the_trainer() -> None:
    model, data, recorder = make_model(lambda_schedule=SCHEDULE), BlobsDataModule(), Recorder()
    trainer = make_trainer(callbacks=[recorder])
    trainer.fit(model, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data)
    assert recorder.seen == expected(16)
    assert sum(isinstance(callback, LambdaAnnealing) for callback in trainer.callbacks) == 1


def test_second_model_uses_its_own_schedule() -> None:
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder])
    trainer.fit(make_model(lambda_schedule=SCHEDULE), BlobsDataModule())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(make_model(lambda_schedule=Constant(7.0)), BlobsDataModule())
    assert {lambda_ for _, lambda_ in recorder.seen[8:]} == {7.0}


def test_resumed_annealing_needs_no_saved_state(tmp_path: Path) -> None:
    first, _ = fit(make_model(lambda_schedule=SCHEDULE))
    first.save_checkpoint(tmp_path / "first.ckpt")
    _, seen = fit(make_model(lambda_schedule=SCHEDULE), max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert seen == expected(16)[8:]


def test_run_fraction_uses_the_length_of_the_run() -> None:
    for settings in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 16}):
        _, seen = fit(make_model(lambda_schedule=RunFraction(lambda_min=0.0, fraction=0.5)), **settings)
        lambdas = [lambda_ for _, lambda_ in seen]
        assert lambdas[0] == 1000
        assert lambdas[7] > 0
        assert lambdas[8:] == [0] * 8


def test_run_fraction_rejects_a_run_of_unknown_length() -> None:
    with pytest.raises(InputError, match="max_steps, or max_epochs"):
        fit(make_model(lambda_schedule=RunFraction()), max_epochs=-1)


def test_schedule_of_the_callback_takes_precedence() -> None:
    _, seen = fit(make_model(lambda_schedule=SCHEDULE), callbacks=[LambdaAnnealing(Constant(3.0))])
    assert seen == [(step, 3.0) for step in range(8)]


def test_lambda_is_logged_by_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(make_model(lambda_schedule=SCHEDULE), logger=logger, log_every_n_steps=1)
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    column, step = rows[0].index("lambda"), rows[0].index("step")
    logged = {int(row[step]): float(row[column]) for row in rows[1:] if row[column]}
    assert logged == pytest.approx(dict(expected(8)))


class Headless(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: object, batch_idx: int) -> None: ...
    def validation_step(self, batch: object, batch_idx: int) -> None: ...
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def test_missing_head_or_invalid_schedule_is_rejected() -> None:
    with pytest.raises(InputError, match=r"self\.head` of Headless"):
        make_trainer(callbacks=[LambdaAnnealing()]).fit(Headless(), BlobsDataModule())
    model = Headless()
    model.head, model.lambda_schedule = make_model().head, 5.0
    with pytest.raises(InputError, match=r"lambda_schedule: must be callable, got 5\.0"):
        make_trainer(callbacks=[LambdaAnnealing()]).fit(model, BlobsDataModule())
    with pytest.raises(InputError, match=r"lambda_schedule: must be callable, got <class '.*RunFraction'>"):
        make_trainer(callbacks=[LambdaAnnealing(RunFraction)]).fit(model, BlobsDataModule())  # type: ignore[arg-type]


class Wrapper(nn.Module):
    """Module with the attributes of another one, like those of libraries for fine-tuning and checkpointing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name) if name != "inner" else super().__getattr__(name)

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.inner(*args)
        return output


def test_lambda_of_a_wrapped_head_is_annealed() -> None:
    model = make_model(lambda_schedule=SCHEDULE)
    head = model.head
    model.head = Wrapper(head)  # type: ignore[assignment]
    make_trainer(max_steps=4).fit(model, BlobsDataModule())
    assert head.lambda_ == pytest.approx(SCHEDULE(3))


class Poison(nn.Module):
    """Cross-entropy that is not finite at one step."""

    def __init__(self, bad_step: int, value: float) -> None:
        super().__init__()
        self.calls, self.bad_step, self.value = 0, bad_step, value

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, target)
        if self.training:
            loss = loss * self.value if self.calls == self.bad_step else loss
            self.calls += 1
        return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("bad_step", "every"), [(10, 1), (10, 50), (15, 50)])
def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, bad_step: int, every: int, value: float
) -> None:
    model = make_model(lambda_schedule=SCHEDULE)
    model.criterion = Poison(bad_step, value)
    checkpoint = ModelCheckpoint(tmp_path, filename="best", monitor="val/acc", save_last=True)
    with pytest.raises(DivergenceError) as caught:
        fit(
            model,
            max_epochs=3,
            callbacks=[checkpoint],
            enable_checkpointing=True,
            log_every_n_steps=every,
            num_sanity_val_steps=0,
        )
    message = str(caught.value)
    for part in (f"step {bad_step},", f"lambda was {SCHEDULE(bad_step):.4g}", "slower", "lambda_min", "best.ckpt"):
        assert part in message
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 8  # the end of the first epoch; the loss diverges in the second
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("monitor", ["val/acc", None])
def test_diverged_run_saves_no_checkpoint_within_an_epoch(
    tmp_path: Path, weights_only: bool, monitor: str | None
) -> None:
    model = make_model()
    model.criterion = Poison(5, math.nan)
    checkpoint = ModelCheckpoint(
        tmp_path, filename="best", monitor=monitor, save_last=True, save_weights_only=weights_only
    )
    with pytest.raises(DivergenceError) as caught:
        fit(model, callbacks=[checkpoint], enable_checkpointing=True, val_check_interval=2, num_sanity_val_steps=0)
    assert "best.ckpt" in str(caught.value)
    assert (tmp_path / "best.ckpt").is_file()
    for path in tmp_path.glob("*.ckpt"):
        kept = torch.load(path, weights_only=True)
        assert kept["global_step"] in ([2, 4] if monitor else [4])
        assert all(weight.isfinite().all() for weight in kept["state_dict"].values())


def test_diverged_run_saves_no_checkpoint_by_step(tmp_path: Path) -> None:
    model = make_model()
    model.criterion = Poison(5, math.nan)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(DivergenceError):
        fit(model, callbacks=[checkpoint], enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {f"step={step}.ckpt" for step in range(1, 6)}


def test_diverged_run_that_ends_within_an_epoch_is_stopped() -> None:
    model = make_model()
    model.criterion = Poison(4, math.nan)
    with pytest.raises(DivergenceError, match="optimiser step 4,"):
        fit(model, max_steps=6)


def test_annealing_works_without_logging() -> None:
    fit(make_model(), log_every_n_steps=0)


def test_validation_after_divergence_succeeds() -> None:
    model, data, trainer = make_model(), BlobsDataModule(), make_trainer(num_sanity_val_steps=0)
    model.criterion = Poison(0, math.nan)
    with pytest.raises(DivergenceError):
        trainer.fit(model, data)
    (results,) = trainer.validate(make_model(), data, verbose=False)
    assert 0 <= results["val/acc"] <= 1


@pytest.mark.parametrize(("precision", "overflows"), [("16-true", True), ("bf16-true", False), ("32-true", False)])
def test_divergence_error_mentions_overflow_only_in_float16(precision: Any, overflows: bool) -> None:
    model = make_model()
    model.criterion = Poison(0, math.nan)
    with pytest.raises(DivergenceError) as caught:
        fit(model, precision=precision, num_sanity_val_steps=0)
    assert ("16-true overflows above 65504: try bf16-mixed or 32-true." in str(caught.value)) is overflows


def test_divergence_before_any_checkpoint_is_reported() -> None:
    model = make_model()
    model.criterion = Poison(0, math.nan)
    with pytest.raises(DivergenceError, match="none was saved yet"):
        fit(model, log_every_n_steps=1)


class TwoHeads(ClassificationModule):
    def configure_model_parts(self, backbone: Any) -> None:
        super().configure_model_parts(backbone)
        self.other = LSoftmaxLinear(self.head.in_features, 3, margin=2)


def test_head_that_is_not_annealed_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"anneals self\.head of TwoHeads, not self\.other"):
        make_trainer().fit(TwoHeads(num_classes=4, backbone="digits", image_shape=(1, 8, 8)), BlobsDataModule())
    model = make_model()
    model.classifier = model.head
    del model.head
    with pytest.raises(InputError, match=r"self\.classifier is one: rename it to head"):
        make_trainer().fit(model, BlobsDataModule())


def test_tuner_uses_lambda_of_an_accuracy_schedule() -> None:
    class Half:
        accuracy_decay = 0.5

        def __call__(self, step: int, total_steps: float, accuracy: float) -> float:
            return 100 * (1 - accuracy)

    model = make_model(lambda_schedule=Half())
    make_trainer(callbacks=[LearningRateFinder(num_training_steps=8, early_stop_threshold=None)]).fit(
        model, BlobsDataModule()
    )
    assert model.head.lambda_ > 0


def test_an_infinite_loss_of_the_second_optimizer_is_reported() -> None:
    class Two(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.head = LSoftmaxLinear(64, 4, margin=2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer, factor in zip(self.optimizers(), (1.0, math.inf), strict=True):
                optimizer.zero_grad()
                self.manual_backward(factor * self.head(batch[0].flatten(1), batch[1]).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(2)]

    data = BlobsDataModule()
    data.setup("fit")
    with pytest.raises(DivergenceError, match="NaN or infinite at optimiser step 1, where lambda was 7"):
        make_trainer(callbacks=[LambdaAnnealing(Constant(7.0))]).fit(Two(), data.train_dataloader())
