"""Files of weights: what is refused and why, and what a network takes from another."""

import importlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.checkpoints import FORMAT, WholeCheckpointIO, read
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.errors import InputError, RunError

from .conftest import BlobsDataModule, file_size_limit, make_model, make_trainer
from .test_cli import QUIET, SHORT

HERE = Path(__file__).parent


class Call:
    """What a malicious file would have Python call when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("called"),)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    place = content.index(torch.full((3,), 7.0).numpy().tobytes())
    return content[:place] + b"\1" + content[place + 1 :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: b"", "not a complete checkpoint"),
        (lambda whole: b"text", "not a complete checkpoint"),
        (cut, "not a complete checkpoint"),
        (flipped, "damaged: .* is not what was written"),
        (lambda whole: pickle.dumps(Call()), "not a complete checkpoint"),
    ],
)
def test_what_is_not_whole_is_refused(content: Callable[[bytes], bytes], said: str) -> None:
    path = Path("some.ckpt")
    torch.save({"state_dict": {"weight": torch.full((3,), 7.0)}}, path)
    assert read(path)["state_dict"]["weight"].tolist() == [7, 7, 7]
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=said):
        read(path)
    assert not Path("called").exists()


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (Call(), "to load it would run code"),
        ({"state_dict": Call()}, "to load it would run code"),
        (nn.Linear(2, 2), "to load it would run code .torch.nn.modules.linear.Linear"),
        ([1, 2], "no state_dict"),
        ({}, "no state_dict"),
        ({"state_dict": {"weight": 1}}, "more than tensors"),
        ({"state_dict": torch.zeros(2)}, "no state_dict"),
        (
            {"state_dict": {"weight": torch.zeros(1)}, "lsoftmax_lightning": {"format": FORMAT + 1, "version": "9.0"}},
            "written by lsoftmax-lightning 9.0 in format 2.*upgrade",
        ),
    ],
)
def test_what_is_not_weights_is_refused(saved: Any, said: str) -> None:
    torch.save(saved, "some.ckpt")
    with pytest.raises(InputError, match=said):
        read("some.ckpt")
    assert not Path("called").exists()


def test_no_damage_at_all_goes_unnoticed() -> None:
    path = Path("some.ckpt")
    torch.save({"state_dict": {"weight": torch.randn(50)}}, path)
    whole = path.read_bytes()
    before = read(path)["state_dict"]["weight"]
    draw = random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            after = read(path)["state_dict"]
        except InputError:
            continue
        assert torch.equal(after["weight"], before)  # the damage is where nothing is kept


def test_a_checkpoint_says_by_whom_and_in_which_format_it_was_written() -> None:
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_model(), BlobsDataModule())
    trainer.save_checkpoint("some.ckpt", weights_only=False)
    assert read("some.ckpt")["lsoftmax_lightning"] == {"format": FORMAT, "version": "0.1.0"}
    later = torch.load("some.ckpt", weights_only=True)
    later["lsoftmax_lightning"]["format"] += 1
    torch.save(later, "later.ckpt")
    with pytest.raises(InputError, match="upgrade"):
        ClassificationModule.load_from_checkpoint("later.ckpt", weights_only=True)
    with pytest.raises(InputError, match="upgrade"):
        make_trainer(max_steps=2).fit(make_model(), BlobsDataModule(), ckpt_path="later.ckpt")


def test_what_cannot_be_written_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="File exists"):
        WholeCheckpointIO().save_checkpoint({}, tmp_path / "file" / "some.ckpt")
    path = tmp_path / "some.ckpt"
    WholeCheckpointIO().save_checkpoint({"a": 1}, path)
    with file_size_limit(100), pytest.raises(RunError, match=r"some.ckpt could not be written: File too large"):
        WholeCheckpointIO().save_checkpoint({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "some.ckpt"]


class Plain(nn.Module):
    """A softmax network as anybody may write it."""

    def __init__(self, backbone: nn.Module, bias: bool = True, num_classes: int = 4) -> None:
        super().__init__()
        self.features = backbone
        self.fc = nn.Linear(64, num_classes, bias=bias)


def bare(plain: Plain) -> dict[str, Tensor]:
    return plain.state_dict()


def of_lightning(plain: Plain) -> dict[str, Any]:
    state = {f"model.{name}": weight for name, weight in plain.state_dict().items()}
    return {"state_dict": state | {"metric.total": torch.zeros(())}, "pytorch-lightning_version": "2.0.0"}


def of_ddp_and_compile(plain: Plain) -> dict[str, Tensor]:
    return {f"module._orig_mod.{name}": weight for name, weight in plain.state_dict().items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("saved", [bare, of_lightning, of_ddp_and_compile])
def test_a_softmax_network_is_where_a_margin_begins(
    saved: Callable[[Plain], dict[str, Any]], bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_model(margin=1)
    plain = Plain(other.backbone, bias)
    torch.save(saved(plain), "softmax.pt")
    torch.manual_seed(5)
    with caplog.at_level("INFO"):
        model = ClassificationModule(4, "digits", margin=4, image_shape=(1, 8, 8), warm_start="softmax.pt")
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, plain.features.state_dict()[name])
    assert torch.equal(model.head.weight, plain.fc.weight)
    said = caplog.messages[-1]
    assert "Warm start from softmax.pt: took the backbone" in said
    assert "and the classifier (" in said
    assert ("fc.bias" in said) == bias
    assert ("metric.total" in said) == (saved is of_lightning)


def test_a_backbone_alone_is_taken_and_a_head_begins_at_random(caplog: pytest.LogCaptureFixture) -> None:
    torch.save(make_model(num_classes=7).state_dict(), "seven.pt")
    with caplog.at_level("INFO"):
        make_model(warm_start="seven.pt")
    assert "The head of (4, 64) begins at random. Dropped: head.weight." in caplog.messages[-1]


def test_torchvisions_weights_are_of_use() -> None:
    from torchvision.models import resnet18

    torch.save(resnet18(num_classes=4).state_dict(), "resnet.pt")
    state = torch.load("resnet.pt", weights_only=True)
    model = make_model(backbone="resnet18", image_shape=(3, 32, 32), warm_start="resnet.pt")
    assert torch.equal(model.head.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {}, "no state_dict"),
        (lambda state: {"other.weight": torch.zeros(2)}, "missing there.*and so on for"),
        (lambda state: {name: w for name, w in state.items() if "3" not in name}, "missing there"),
        (lambda state: state | {"aux.weight": torch.zeros(4, 64)}, "several weights .* aux.weight"),
        (lambda state: {name: w[:1] if w.ndim == 4 else w for name, w in state.items()}, r"is \(1, .* there and \("),
    ],
)
def test_what_is_of_another_network_is_refused(change: Callable[[Any], Any], said: str) -> None:
    torch.save(change(make_model().state_dict()), "other.pt")
    with pytest.raises(InputError, match=said):
        make_model(warm_start="other.pt")


def test_a_run_that_began_warm_is_resumed_without_the_file() -> None:
    torch.save(make_model(margin=1).state_dict(), "softmax.pt")
    model = make_model(warm_start="softmax.pt")
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, BlobsDataModule())
    trainer.save_checkpoint("some.ckpt", weights_only=False)
    Path("softmax.pt").unlink()
    loaded = ClassificationModule.load_from_checkpoint("some.ckpt", weights_only=True)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_the_command_line_begins_warm() -> None:
    main(["fit", "--config=digits.yaml", *SHORT, "--model.margin=1"])
    best = "runs/digits/version_0/checkpoints/best.ckpt"
    begin = [*SHORT, "--model.optimizer.lr=0", f"--model.warm_start={best}"]
    cli = main(["fit", "--config=digits.yaml", *begin])
    assert cli is not None
    assert cli.model.head.margin == 2
    assert torch.equal(cli.model.head.weight, torch.load(best, weights_only=True)["state_dict"]["head.weight"])


@pytest.mark.parametrize("path", sorted(HERE.glob("releases/*.ckpt")), ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:The best checkpoint in", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")  # newer than the oldest
def test_what_an_earlier_release_wrote_is_read_and_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE / "releases"))
    module: Any = importlib.import_module("flat").Module
    loaded = module.load_from_checkpoint(path, weights_only=True).eval()
    logits = loaded(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))[0].tolist()
    expected = [0.6012, 0.3479, 0.4928, -0.5978, 1.8146, -2.0736, 1.5796, -0.6995, -0.5048, -0.6250]
    assert logits == pytest.approx(expected, abs=1e-3)
    assert loaded.head.margin == 3
    more = ["--model=flat.Module", "--model.margin=3", "--trainer.max_epochs=3", f"--ckpt_path={path}"]
    cli = main(["fit", "--config=digits.yaml", *QUIET, *more])
    assert cli is not None
    assert cli.trainer.global_step == 60


def test_every_format_has_its_checkpoint() -> None:
    assert {path.stem for path in HERE.glob("releases/*.ckpt")} == {f"format_{n}" for n in range(FORMAT + 1)}
