"""Schedule that follows the training accuracy, in all modes of the Trainer."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.callbacks import ExactResume, LambdaAnnealing
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.schedules import AccuracyFeedback, LambdaSchedule
from lsoftmax_lightning.strategies import ClassShardedStrategy

from ..helpers.forked import run_on
from ..helpers.training import BlobsDataModule, make_model, make_trainer, num_hooks

FEEDBACK = AccuracyFeedback(gain=10, power=1)


class Recorder(Callback):
    """lambda of each optimiser step, and the accuracy of the margin logits, computed from the head's parts."""

    def __init__(self) -> None:
        self.lambdas: dict[int, float] = {}
        self.correct: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        self.correct.setdefault(trainer.global_step, [0, 0])

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.lambdas[trainer.global_step] = pl_module.head.lambda_

    def count(self, step: int, correct: int, total: int) -> None:
        self.correct[step][0] += correct
        self.correct[step][1] += total


def record(model: Any, recorder: Recorder, trainer: Trainer) -> None:
    """Count the samples of each training step by a separate hook."""

    def hook(calls: Any, args: Any, call: Any) -> None:
        if call.target is not None and torch.is_grad_enabled():
            plain = F.linear(call.features, model.head.weight)
            logits = model.head.apply_margin(plain, call.features, call.target).detach()
            correct = int((logits.argmax(1) == call.target).sum())
            recorder.count(trainer.global_step, correct, len(call.target))

    model.head.observed.register_forward_hook(hook)


def expected(correct: dict[int, list[int]], decay: float = 0.95, delay: int = 2) -> list[float]:
    """Return lambda of each step by the documented rule: the mean accuracy of all but the last two steps."""
    lambdas, mean = [], 0.0
    for step in sorted(correct):
        if step > delay:
            right, total = correct[step - delay - 1]
            mean = decay * mean + (1 - decay) * right / total
        lambdas.append(FEEDBACK(step, accuracy=mean))
    return lambdas


def fit(model: Any = None, ckpt_path: Path | None = None, **settings: Any) -> tuple[Trainer, Recorder]:
    model, recorder = model or make_model(margin=3, lambda_schedule=FEEDBACK), Recorder()
    trainer = make_trainer(callbacks=[recorder, *settings.pop("callbacks", [])], **settings)
    record(model, recorder, trainer)
    trainer.fit(model, BlobsDataModule(), ckpt_path=ckpt_path)
    return trainer, recorder


@pytest.mark.parametrize("accumulate", [1, 4])
def test_lambda_follows_the_accuracy_of_the_margin_logits(accumulate: int) -> None:
    _, recorder = fit(max_epochs=8, accumulate_grad_batches=accumulate)
    lambdas = list(recorder.lambdas.values())
    assert len(lambdas) == 64 // accumulate
    assert lambdas == pytest.approx(expected(recorder.correct))
    assert lambdas[0] == 1000
    assert lambdas[-1] < 100
    assert {total for _, total in recorder.correct.values()} == {20 * accumulate}


@pytest.mark.usefixtures("chunks")
def test_chunked_loss_gives_the_same_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for chunked_from in (4, 5):  # classes; there are 4
        monkeypatch.setattr("lsoftmax_lightning.heads.CHUNKED_FROM", chunked_from)
        model, recorder = make_model(margin=3, lambda_schedule=FEEDBACK), Recorder()
        seed_everything(0)
        make_trainer(callbacks=[recorder], max_epochs=4).fit(model, BlobsDataModule())
        runs[model.head.uses_chunked_loss] = list(recorder.lambdas.values())
    assert runs[True] == pytest.approx(runs[False])
    assert runs[True][-1] < 1000


def test_evaluation_does_not_change_lambda() -> None:
    model, data, recorder = make_model(margin=3, lambda_schedule=FEEDBACK), BlobsDataModule(), Recorder()
    trainer = make_trainer(callbacks=[recorder], num_sanity_val_steps=2, val_check_interval=2, max_epochs=2)
    record(model, recorder, trainer)
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    assert list(recorder.lambdas.values()) == pytest.approx(expected(recorder.correct))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stop", [1, 5, 11, 18])
def test_a_resumed_run_has_the_same_lambda(stop: int, tmp_path: Path) -> None:
    seed_everything(0)
    settings: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": 0}
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, before = fit(callbacks=[ExactResume(), checkpoint], enable_checkpointing=True, **settings)
    path = tmp_path / f"step={stop}.ckpt"
    again = ModelCheckpoint(tmp_path / "resumed", every_n_train_steps=1, save_top_k=-1)
    resumed, after = fit(callbacks=[ExactResume(), again], enable_checkpointing=True, ckpt_path=path, **settings)
    assert after.lambdas == {step: lambda_ for step, lambda_ in before.lambdas.items() if step >= stop}
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(one, other)


def test_second_fit_continues_and_another_model_restarts() -> None:
    model, data, recorder = make_model(margin=3, lambda_schedule=FEEDBACK), BlobsDataModule(), Recorder()
    trainer = make_trainer(callbacks=[recorder], max_epochs=4)
    trainer.fit(model, data)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(model, data)
    assert recorder.lambdas[32] <= recorder.lambdas[31] < 1000
    trainer.fit_loop.max_epochs = 6
    trainer.fit(make_model(margin=3, lambda_schedule=FEEDBACK), data)
    assert recorder.lambdas[40] == 1000


def test_a_run_of_unknown_length_is_annealed() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 30

    _, recorder = fit(max_epochs=-1, callbacks=[Stop()])
    assert len(recorder.lambdas) == 30
    assert recorder.lambdas[29] < recorder.lambdas[0] == 1000


def test_lambda_rises_again_when_the_accuracy_falls() -> None:
    class Shuffle(Callback):
        """Draw labels at random from step 40 on."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step >= 40:
                batch[1].copy_(torch.randint(4, batch[1].shape))

    model = make_model(margin=3, lambda_schedule=FEEDBACK)
    _, recorder = fit(model, max_epochs=8, callbacks=[Shuffle()])
    assert recorder.lambdas[63] > 2 * recorder.lambdas[42]


def test_lambda_and_its_accuracy_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    _, recorder = fit(logger=logger, log_every_n_steps=1, max_epochs=2)
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    step, *columns = (rows[0].index(name) for name in ("step", "lambda", "train/margin_acc"))
    logged = {int(row[step]): [float(row[column]) for column in columns] for row in rows[1:] if row[columns[0]]}
    assert {at: lambda_ for at, (lambda_, _) in logged.items()} == pytest.approx(recorder.lambdas, rel=1e-4)
    for lambda_, accuracy in logged.values():
        assert FEEDBACK(0, accuracy=accuracy) == pytest.approx(lambda_, rel=1e-3)


class CustomModule(LightningModule):
    """Module of a user with an LSoftmaxLinear instead of a linear layer."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = LSoftmaxLinear(16, 4, margin=3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.network(x), y), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/acc", (self.head(self.network(x)).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_annealing_works_in_a_custom_module() -> None:
    model, recorder = CustomModule(), Recorder()
    trainer = make_trainer(callbacks=[LambdaAnnealing(), recorder], max_epochs=8)
    trainer.fit(model, BlobsDataModule())
    assert recorder.lambdas[0] == 1000
    assert recorder.lambdas[63] < 100
    assert trainer.callback_metrics["val/acc"] > 0.9
    assert num_hooks(model) == 0


def test_training_without_annealing_warns_once() -> None:
    with pytest.warns(UserWarning, match="LambdaAnnealing") as caught:
        make_trainer(max_epochs=2).fit(CustomModule(), BlobsDataModule())
    assert sum("LambdaAnnealing" in str(warning.message) for warning in caught) == 1


class AccuracyPlusFive(LambdaSchedule):
    """Schedule of a user that depends on the accuracy."""

    accuracy_decay = 0.0

    def __call__(self, step: int, total_steps: float, accuracy: float = -1.0) -> float:
        return accuracy + 5


def test_custom_schedule_receives_the_accuracy_of_a_step() -> None:
    _, recorder = fit(make_model(margin=3, lambda_schedule=AccuracyPlusFive()), max_epochs=2)
    accuracies = [right / total for right, total in recorder.correct.values()]
    assert [recorder.lambdas[step] - 5 for step in range(3, 16)] == pytest.approx(accuracies[:13])
    assert recorder.lambdas[0] == 5


class Rewritten(CustomModule):
    """Module that calls the head without a target."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        features = self.network(x)
        return F.cross_entropy(self.head.apply_margin(self.head(features), features, y), y)


def test_head_called_without_target_is_rejected() -> None:
    with pytest.raises(InputError, match=r"call self\.head\(x, target\)"):
        make_trainer(callbacks=[LambdaAnnealing()], max_epochs=3).fit(Rewritten(), BlobsDataModule())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_accuracy_decay_out_of_range_is_rejected(decay: float) -> None:
    schedule = AccuracyPlusFive()
    schedule.accuracy_decay = decay
    with pytest.raises(InputError, match="accuracy_decay"):
        make_trainer().fit(make_model(lambda_schedule=schedule), BlobsDataModule())


def test_fit_after_an_exception_continues_annealing() -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 30:
                raise RuntimeError("stop here")

    model, recorder = make_model(margin=3, lambda_schedule=FEEDBACK), Recorder()
    trainer = make_trainer(callbacks=[recorder, Fail()], max_epochs=5)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(model, BlobsDataModule())
    trainer.fit(model, BlobsDataModule())
    assert recorder.lambdas[30] <= 1.1 * recorder.lambdas[29] < 1000


def test_a_failed_run_leaves_no_hook() -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop here")

    model = make_model(lambda_schedule=FEEDBACK)
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(callbacks=[Fail()]).fit(model, BlobsDataModule())
    assert num_hooks(model) == 0
    copy.deepcopy(model)


def train_on(strategy: str) -> None:
    """Print lambda of each step on every rank."""
    seed_everything(0)
    recorder = Recorder()
    model = make_model(margin=3, lambda_schedule=FEEDBACK, backbone=Flat())
    chosen = ClassShardedStrategy() if strategy == "class_sharded" else strategy
    trainer = make_trainer(callbacks=[recorder], max_epochs=6, strategy=chosen, devices=1 if strategy == "auto" else 2)
    trainer.fit(model, BlobsDataModule())
    print("lambdas", *recorder.lambdas.values())


class Flat(nn.Sequential):
    """Network without batch normalisation, whose statistics would depend on the number of ranks."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16))


def resume_sharded(folder: Path) -> None:
    """Print lambda of a run on two ranks, and of a run resumed from step 11."""
    for max_epochs, name in ((3, None), (3, "step=11.ckpt")):
        seed_everything(0)
        recorder = Recorder()
        checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=11, save_top_k=-1)
        trainer = make_trainer(
            callbacks=[recorder, checkpoint, ExactResume()],
            enable_checkpointing=True,
            max_epochs=max_epochs,
            num_sanity_val_steps=0,
            strategy=ClassShardedStrategy(),
            devices=2,
        )
        model = make_model(margin=3, lambda_schedule=FEEDBACK, backbone=Flat())
        trainer.fit(model, BlobsDataModule(), ckpt_path=name and folder / name)
        print("lambdas", *(recorder.lambdas[step] for step in range(11, 24)))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="gloo sums gradients here")
def test_a_resumed_sharded_run_has_the_same_lambda(tmp_path: Path) -> None:
    done = run_on(2, partial(resume_sharded, tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("lambdas")]
    assert len(lines) == 4
    assert len(set(lines)) == 1


@pytest.mark.parametrize("strategy", ["ddp", "class_sharded"])
def test_lambda_of_every_rank_equals_that_of_one_process(strategy: str) -> None:
    if strategy == "class_sharded" and torch.__version__ < "2.9":
        pytest.skip("gloo sums gradients here")
    lines = []
    for count, name in ((1, "auto"), (2, strategy)):
        done = run_on(count, partial(train_on, name))
        assert done.returncode == 0, done.stderr
        found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("lambdas")]
        assert len(found) == count
        lines += found
    one, *ranks = [[float(value) for value in line] for line in lines]
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(one, rel=0.05)  # a sample at the boundary may round to the other side
    assert one[-1] < 100
