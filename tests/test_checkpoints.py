"""Checkpoints and files of weights: damage, code, warm start and earlier releases."""

import importlib
import io
import os
import pickle
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.checkpoints import FORMAT, AtomicCheckpointIO, read
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.data_spec import DataSpec
from lsoftmax_lightning.errors import InputError, RunError
from lsoftmax_lightning.user_errors import errors_without_traceback

from .helpers.command_line import QUIET, SHORT, fails
from .helpers.formats import Call
from .helpers.training import BlobsDataModule, file_size_limit, make_model, make_trainer

HERE = Path(__file__).parent


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    place = content.index(torch.full((3,), 7.0).numpy().tobytes())
    return content[:place] + b"\1" + content[place + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: b"", "not a complete checkpoint"),
        (lambda whole: b"text", "not a complete checkpoint"),
        (cut, "not a complete checkpoint"),
        (flipped, "damaged: the checksum of .* is wrong"),
        (lambda whole: pickle.dumps(Call()), "not a complete checkpoint"),
    ],
)
def test_incomplete_or_damaged_files_are_rejected(content: Callable[[bytes], bytes], message: str) -> None:
    path = Path("some.ckpt")
    torch.save({"state_dict": {"weight": torch.full((3,), 7.0)}}, path)
    assert read(path)["state_dict"]["weight"].tolist() == [7, 7, 7]
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read(path)
    assert not Path("called").exists()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (Call(), "loading it would run code"),
        ({"state_dict": Call()}, "loading it would run code"),
        (nn.Linear(2, 2), "loading it would run code .torch.nn.modules.linear.Linear"),
        ([1, 2], "must contain a state_dict"),
        ({}, "must contain a state_dict"),
        ({"state_dict": {"weight": 1}}, "of tensors only"),
        ({"state_dict": torch.zeros(2)}, "must contain a state_dict"),
        (
            {"state_dict": {"weight": torch.zeros(1)}, "lsoftmax_lightning": {"format": FORMAT + 1, "version": "9.0"}},
            "has format 2, written by lsoftmax-lightning 9.0.*upgrade",
        ),
    ],
)
def test_files_without_weights_are_rejected(saved: Any, message: str) -> None:
    torch.save(saved, "some.ckpt")
    with pytest.raises(InputError, match=message):
        read("some.ckpt")
    assert not Path("called").exists()


def test_damage_at_any_byte_is_detected() -> None:
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
        assert torch.equal(after["weight"], before)  # the damaged bytes hold no data


def repacked(content: bytes, compression: int = zipfile.ZIP_DEFLATED, copies: int = 1) -> bytes:
    """Return a checkpoint whose members are compressed or stored again, possibly several times."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for entry in source.infolist():
            for _ in range(copies):
                target.writestr(entry.filename, source.read(entry))
    return packed.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("how", [{}, {"compression": zipfile.ZIP_LZMA}, {"compression": 0, "copies": 2}], ids=str)
def test_repacked_checkpoint_is_rejected(how: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config=digits.yaml", *SHORT])
    path = Path("runs/digits/m2-s0/checkpoints/best.ckpt")
    path.write_bytes(repacked(path.read_bytes(), **how))
    assert zipfile.ZipFile(path).testzip() is None
    warm = ["fit", "--config=digits.yaml", *SHORT, f"--model.warm_start={path}"]
    export = ["export", f"--ckpt_path={path}", "--format=state_dict"]
    test = ["test", "--config=digits.yaml", *QUIET, f"--ckpt_path={path}"]
    for command in (warm, export, test):
        assert "was repacked" in fails(capsys, *command)
    assert not Path("backbone.pt").exists()


def test_uncompressed_copy_is_read() -> None:
    torch.save({"state_dict": {"weight": torch.arange(50.0)}}, "some.ckpt")
    Path("copy.ckpt").write_bytes(repacked(Path("some.ckpt").read_bytes(), compression=zipfile.ZIP_STORED))
    assert torch.equal(read("copy.ckpt")["state_dict"]["weight"], torch.arange(50.0))


@pytest.fixture
def server() -> Iterator[str]:
    """Serve the working directory, and return the address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(Path.cwd()))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("force", ["", pytest.param("--weights_only=false", marks=pytest.mark.slow)])
def test_a_remote_checkpoint_runs_no_code(
    force: str, scheme: str, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config=digits.yaml", *SHORT])
    place = server if scheme == "http" else f"file://{Path.cwd()}"
    hostile = torch.load("runs/digits/m2-s0/checkpoints/last.ckpt", weights_only=True) | {"code": Call()}
    torch.save(hostile, "hostile.ckpt")
    for command in ("fit", "validate", "test", "predict"):
        args = [command, "--config=digits.yaml", *(SHORT if command == "fit" else QUIET), *filter(None, [force])]
        printed = fails(capsys, *args, f"--ckpt_path={place}/hostile.ckpt")
        assert ("weights_only: checkpoints are always read" if force else "would run code") in printed
    assert "would run code" in fails(
        capsys, "export", f"--ckpt_path={place}/hostile.ckpt", "--config=digits.yaml", "--format=state_dict"
    )
    assert not Path("called").exists()


@pytest.mark.filterwarnings("ignore:The best checkpoint in")
def test_a_remote_checkpoint_is_used_as_a_local_one(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config=digits.yaml", *SHORT])
    last = f"{server}/runs/digits/m2-s0/checkpoints/last.ckpt"
    cli = main(["fit", "--config=digits.yaml", *SHORT, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    assert cli is not None
    assert cli.trainer.global_step == 6
    assert "cannot be downloaded" in fails(capsys, "test", "--config=digits.yaml", f"--ckpt_path={server}/gone.ckpt")
    warm = make_model(num_classes=10, warm_start=last)
    assert torch.equal(warm.head.weight, read(last)["state_dict"]["head.weight"])


def test_no_reader_runs_code_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Call(), "hostile.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError), errors_without_traceback():
        torch.load("hostile.pt", weights_only=False)
    assert not Path("called").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_checkpoint_stores_version_and_format() -> None:
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_model(), BlobsDataModule())
    trainer.save_checkpoint("some.ckpt", weights_only=False)
    stamp = read("some.ckpt")["lsoftmax_lightning"]
    data = DataSpec.from_datamodule(BlobsDataModule()).to_json()
    assert stamp == {"format": FORMAT, "version": "0.1.0", "data": data}
    later = torch.load("some.ckpt", weights_only=True)
    later["lsoftmax_lightning"]["format"] += 1
    torch.save(later, "later.ckpt")
    with pytest.raises(InputError, match="upgrade"):
        ClassificationModule.load_from_checkpoint("later.ckpt", weights_only=True)
    with pytest.raises(InputError, match="upgrade"):
        make_trainer(max_steps=2).fit(make_model(), BlobsDataModule(), ckpt_path="later.ckpt")


def test_failed_write_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="File exists"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "some.ckpt")
    path = tmp_path / "some.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    with file_size_limit(100), pytest.raises(RunError, match=r"some.ckpt could not be written: File too large"):
        AtomicCheckpointIO().save_checkpoint({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "some.ckpt"]


def test_config_with_the_former_name_of_the_plugin_is_read() -> None:
    main(["fit", "--config=digits.yaml", *SHORT])
    config = Path("runs/digits/m2-s0/config.yaml")
    name = "lsoftmax_lightning.checkpoints.AtomicCheckpointIO"
    former = config.read_text().replace(name, "lsoftmax_lightning.checkpoints.WholeCheckpointIO")
    assert name not in former
    Path("former.yaml").write_text(former)
    cli = main(["fit", "--config=former.yaml"])
    assert cli is not None
    assert type(cli.trainer.strategy.checkpoint_io) is AtomicCheckpointIO


class Plain(nn.Module):
    """Softmax network of a user."""

    def __init__(self, backbone: nn.Module, bias: bool = True, num_classes: int = 4) -> None:
        super().__init__()
        self.features = backbone
        self.fc = nn.Linear(64, num_classes, bias=bias)


def bare(plain: Plain) -> dict[str, Tensor]:
    return plain.state_dict()


def lightning_checkpoint(plain: Plain) -> dict[str, Any]:
    state = {f"model.{name}": weight for name, weight in plain.state_dict().items()}
    return {"state_dict": state | {"metric.total": torch.zeros(())}, "pytorch-lightning_version": "2.0.0"}


def ddp_and_compile(plain: Plain) -> dict[str, Tensor]:
    return {f"module._orig_mod.{name}": weight for name, weight in plain.state_dict().items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("saved", [bare, lightning_checkpoint, ddp_and_compile])
def test_warm_start_loads_a_softmax_network(
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
    message = caplog.messages[-1]
    assert "Warm start from softmax.pt: loaded the backbone" in message
    assert "and the classifier (" in message
    assert ("fc.bias" in message) == bias
    assert ("metric.total" in message) == (saved is lightning_checkpoint)


def test_warm_start_with_other_classes_initialises_the_head_and_warns() -> None:
    torch.save(make_model(num_classes=7).state_dict(), "seven.pt")
    message = r"The head of shape \(4, 64\) is randomly initialised\. Dropped: head\.weight\."
    with pytest.warns(UserWarning, match=message):
        make_model(warm_start="seven.pt")


class Stateful(nn.Sequential):
    """Backbone with an extra state that is not a tensor."""

    num_features = 4

    def __init__(self, extra: int = 0) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 4))
        self.extra = extra

    def get_extra_state(self) -> dict[str, int]:
        return {"extra": self.extra}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.extra = state["extra"]


def test_the_extra_state_of_a_module_is_read() -> None:
    arguments = ["--config=digits.yaml", *SHORT]
    backbone = f'--model.backbone={{"class_path": "{__name__}.Stateful", "init_args": {{"extra": %d}}}}'
    main(["fit", *arguments, backbone % 3])
    checkpoint = "runs/digits/m2-s0/checkpoints/last.ckpt"
    assert read(checkpoint)["state_dict"]["backbone._extra_state"] == {"extra": 3}
    cli = main(["fit", *arguments, backbone % 2, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"])
    assert cli is not None
    assert cli.model.backbone.extra == 3
    model = make_model(num_classes=10, backbone=Stateful(), warm_start=checkpoint)
    assert model.backbone.extra == 3


def test_warm_start_reads_weights_of_torchvision() -> None:
    from torchvision.models import resnet18

    torch.save(resnet18(num_classes=4).state_dict(), "resnet.pt")
    state = torch.load("resnet.pt", weights_only=True)
    model = make_model(backbone="resnet18", image_shape=(3, 32, 32), warm_start="resnet.pt")
    assert torch.equal(model.head.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "must contain a state_dict"),
        (lambda state: {"other.weight": torch.zeros(2)}, "got no weight for .* of shape .*a mismatch for"),
        (lambda state: {name: w for name, w in state.items() if "3" not in name}, "got no weight for .*3.* of shape"),
        (
            lambda state: state | {"aux.weight": torch.zeros(4, 64)},
            "shape of the head's weight, got several: .*aux.weight",
        ),
        (
            lambda state: {name: w[:1] if w.ndim == 4 else w for name, w in state.items()},
            r"got shape \(1, .* for .* of shape \(",
        ),
    ],
)
def test_warm_start_from_another_network_is_rejected(change: Callable[[Any], Any], message: str) -> None:
    torch.save(change(make_model().state_dict()), "other.pt")
    with pytest.raises(InputError, match=message):
        make_model(warm_start="other.pt")


def test_warm_started_module_loads_without_the_file() -> None:
    torch.save(make_model(margin=1).state_dict(), "softmax.pt")
    model = make_model(warm_start="softmax.pt")
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, BlobsDataModule())
    trainer.save_checkpoint("some.ckpt", weights_only=False)
    Path("softmax.pt").unlink()
    loaded = ClassificationModule.load_from_checkpoint("some.ckpt", weights_only=True)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_command_line_accepts_warm_start() -> None:
    main(["fit", "--config=digits.yaml", *SHORT, "--model.margin=1"])
    best = "runs/digits/m1-s0/checkpoints/best.ckpt"
    begin = [*SHORT, "--model.optimizer.lr=0", f"--model.warm_start={best}"]
    cli = main(["fit", "--config=digits.yaml", *begin])
    assert cli is not None
    assert cli.model.head.margin == 2
    assert torch.equal(cli.model.head.weight, torch.load(best, weights_only=True)["state_dict"]["head.weight"])


@pytest.mark.parametrize("path", sorted(HERE.glob("releases/*.ckpt")), ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:The best checkpoint in", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings(
    "ignore:The loaded checkpoint was produced with Lightning"
)  # newer than the oldest supported one
def test_checkpoint_of_an_earlier_release_resumes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
