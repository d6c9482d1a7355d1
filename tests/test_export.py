"""Export: outputs of the exported network equal those of the module."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from lsoftmax_lightning import ClassificationModule, VerificationModule
from lsoftmax_lightning.atomic import atomic_path
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.data_spec import DataSpec
from lsoftmax_lightning.datamodules import DigitsDataModule
from lsoftmax_lightning.errors import InputError, RunError
from lsoftmax_lightning.export import Format, Pixels, export

from .helpers.command_line import QUIET, SHORT, fails
from .helpers.forked import run_on
from .helpers.training import WRITES_ONNX, BlobsDataModule, file_size_limit, make_model


def run(path: str, images: Tensor) -> tuple[dict[str, str], list[Tensor]]:
    """Return metadata and outputs of an exported file, read without this package."""
    if path.endswith("onnx"):
        session = onnxruntime.InferenceSession(path)
        assert [(x.name, x.shape[1:]) for x in session.get_inputs()] == [("images", [1, 8, 8])]
        outputs = session.run(["embedding", "logits"], {"images": images.numpy()})
        return session.get_modelmeta().custom_metadata_map, list(map(torch.from_numpy, outputs))
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    metadata = {name: json.dumps(value) for name, value in json.loads(extra["metadata.json"]).items()}
    return metadata, list(program.module()(images))


@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_exported_network_accepts_batches_of_any_size(format: Format, pixels: Pixels) -> None:
    data, model = BlobsDataModule(), make_model().eval()
    path = f"out/model.{'onnx' if format == 'onnx' else 'pt2'}"
    if format == "onnx" and not WRITES_ONNX:
        with pytest.raises(RunError, match="cannot write this network as ONNX"):
            export(model, data, path, format, pixels)
        assert not list(Path("out").iterdir())
        return
    differences = export(model, data, path, format, pixels)
    assert set(differences) == {"embedding", "logits"}
    assert max(differences.values()) < 1e-4
    images = data.test_data.images
    for size in (1, 3, 50):
        given = images[:size] if pixels == "uint8" else images[:size] / 255
        metadata, (embedding, logits) = run(path, given)
        with torch.no_grad():
            features = model.forward_features(data.normalize(images[:size]))
            torch.testing.assert_close(embedding, features, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits, model.head(features), rtol=1e-4, atol=1e-4)
    if format == "onnx":
        graph = onnx.load(path).graph
        assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}
    assert json.loads(metadata["class_names"]) == ["nw", "ne", "sw", "se"]
    assert (json.loads(metadata["image_shape"]), json.loads(metadata["resize"])) == ([1, 8, 8], "cover")
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([0.5], [0.25])
    assert (json.loads(metadata["pixels"]), json.loads(metadata["margin"])) == (pixels, 2)


def test_export_command_exports_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "digits.yaml", *SHORT])
    checkpoint = "runs/digits/m2-s0/checkpoints/best.ckpt"
    capsys.readouterr()
    main(["export", "--ckpt_path", checkpoint, "--format", "state_dict", "--output", "backbone.pt"])
    assert capsys.readouterr().out.endswith("Wrote backbone.pt.\n")
    model = ClassificationModule.load_from_checkpoint(checkpoint)
    saved = torch.load("backbone.pt", weights_only=True)
    assert saved.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in model.backbone.state_dict().items())

    Path("small.yaml").write_text("data: {init_args: {batch_size: 8}}")
    configs = ["--config", "digits.yaml", "-c", "small.yaml"]
    main(["export", *configs, "--ckpt_path", checkpoint, "--format", "torch_export", "--output", "model.pt2"])
    printed = capsys.readouterr().out
    assert "Wrote model.pt2. On random images, it differs from the module by at most" in printed
    data = DigitsDataModule()
    metadata, (_, logits) = run("model.pt2", data.load(train=False).images)
    assert metadata["margin"] == "2"  # of the checkpoint, not of the config
    predicted = main(["predict", "--config", "digits.yaml", "--ckpt_path", checkpoint, *QUIET[:3]])
    assert predicted is not None
    rows = Path("runs/digits/m2-s0/predict/predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[2] for row in rows] == [data.class_names[number] for number in logits.argmax(1)]

    earlier = torch.load(checkpoint, weights_only=True)  # as from a release without data specification
    del earlier["lsoftmax_lightning"]["data"]
    torch.save(earlier, checkpoint)
    main(["export", "--ckpt_path", checkpoint, "--format", "torch_export", "--output", "model.pt2"])
    printed = capsys.readouterr().out
    assert "Wrote model.pt2. On test images, it differs from the module by at most" in printed

    shutil.copy(checkpoint, "moved.ckpt")
    for args, message in (
        (["--ckpt_path", "nope.ckpt"], "--ckpt_path: must be a checkpoint of fit, got nope.ckpt, which is not a file"),
        (["--ckpt_path", "moved.ckpt"], "--config: must be set, because the run folder of the checkpoint, /"),
        (["--ckpt_path", checkpoint, "--model.margin", "x"], "margin"),
        (["--ckpt_path", checkpoint, "--model.backbone", "mnist"], "is from another network"),
        (["--ckpt_path", "nope.ckpt", "--config", "digits.yaml"], "nope.ckpt does not exist, or is not a file"),
    ):
        assert message in fails(capsys, "export", *args)


def test_export_without_data_uses_the_data_spec_of_the_module() -> None:
    model = make_model().eval()
    with pytest.raises(InputError, match="data_spec: must have class_names, image_shape of the training data"):
        export(model, None, "model.pt2", "torch_export")
    model.data_spec = DataSpec.from_datamodule(BlobsDataModule())
    export(model, None, "model.pt2", "torch_export")
    images = BlobsDataModule().load(train=False).images
    metadata, (_, logits) = run("model.pt2", images)
    assert json.loads(metadata["class_names"]) == ["nw", "ne", "sw", "se"]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(BlobsDataModule().normalize(images)), rtol=1e-4, atol=1e-4)


def test_export_of_mirrored_faces_equals_the_module() -> None:
    torch.manual_seed(0)
    model = VerificationModule(4, "digits", image_shape=(1, 8, 8), mirror=True).eval()
    data = BlobsDataModule()
    export(model, data, "faces.pt2", "torch_export")
    images = data.test_data.images
    with torch.no_grad():
        expected = model.embed(data.normalize(images))
    torch.testing.assert_close(run("faces.pt2", images)[1][0], expected, rtol=1e-4, atol=1e-4)


def test_export_that_differs_from_the_module_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BlobsDataModule):
        mean = (0.1,)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, targets = super().on_after_batch_transfer(batch, dataloader_idx)
            return images * 2, targets

    with pytest.raises(RunError, match="embedding of the exported network differs by"):
        export(make_model(), Wrong(), "model.pt2", "torch_export")
    assert not list(Path().iterdir())
    with pytest.raises(InputError, match=r"^pixels: must be uint8 or float, got 'int8'"):
        export(make_model(), BlobsDataModule(), "model.pt2", "torch_export", "int8")  # type: ignore[arg-type]
    monkeypatch.setattr("lsoftmax_lightning.export.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"^format: onnx requires the packages onnx, onnxscript, onnxruntime, .*; run pip install"
    ):
        export(make_model(), BlobsDataModule(), "model.onnx")


FORMATS = [
    pytest.param("onnx", marks=pytest.mark.skipif(not WRITES_ONNX, reason="this torch writes no ONNX")),
    "torch_export",
    "state_dict",
]


@pytest.mark.parametrize("size", [1_000, 50_000])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_full_disk_is_an_error_and_keeps_the_previous_file(format: Format, size: int) -> None:
    Path("out").mkdir()
    Path("out/model").write_text("old")
    with (
        file_size_limit(size),
        pytest.raises(
            RunError, match=r"^output: out/model cannot be written \(File too large\); free some space"
        ) as caught,
    ):
        export(make_model(), BlobsDataModule(), "out/model", format)
    assert "\n" not in str(caught.value)
    assert Path("out/model").read_text() == "old"
    assert os.listdir("out") == ["model"]


@pytest.mark.parametrize("path", ["/proc/out/model", "file/model", "/dev/null"])
@pytest.mark.parametrize("format", FORMATS)
def test_unwritable_output_is_an_error_before_any_work(format: Format, path: str) -> None:
    Path("file").touch()
    with pytest.raises(RunError, match=f"^output: {path} cannot be written"):
        export(None, None, path, format)
    assert not Path("/dev/null").is_file()


KILLED = """
import os, signal, torch
from lsoftmax_lightning.export import export
from tests.helpers.training import BlobsDataModule, make_model
torch.export.load = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # the file is written, and not yet checked
export(make_model(), BlobsDataModule(), "out/model", "torch_export")
"""


@pytest.mark.slow
def test_killed_export_leaves_no_output_and_the_next_one_cleans_up() -> None:
    # a fork would wait for threads of torch.export that it does not have
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = Path("out").iterdir()
    assert left.name.startswith(".model.")
    assert (left / "model").is_file()
    export(make_model(), BlobsDataModule(), "out/model", "state_dict")
    assert os.listdir("out") == ["model"]


def test_weights_of_a_killed_export_are_removed_by_the_next_one() -> None:
    def kill(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsoftmax_lightning.export.read", kill)  # the file is written, and not yet checked
        killed = run_on(1, partial(export, make_model(), BlobsDataModule(), "out/model", "state_dict"))
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir("out")) == 1
    export(make_model(), BlobsDataModule(), "out/model", "state_dict")
    assert os.listdir("out") == ["model"]


def test_external_data_of_an_onnx_model_are_replaced_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, set[str]]] = []

    def write(program: Any, path: Path, metadata: Any) -> Any:
        for file in (path, path.with_name("model.onnx.data")):
            file.write_text("new")
        return program.module()

    def recorded(path: Path) -> Any:
        moved.append((path.name, {file.name for file in Path("out").iterdir() if file.is_file()}))
        return atomic_path(path)

    Path("out").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        Path("out", name).write_text("old")
    monkeypatch.setattr("lsoftmax_lightning.export.write_onnx", write)
    monkeypatch.setattr("lsoftmax_lightning.export.atomic_path", recorded)
    monkeypatch.setattr("lsoftmax_lightning.export.find_spec", lambda name: True)
    export(make_model(), BlobsDataModule(), "out/model.onnx")
    assert moved == [("model.onnx.data", {"model.onnx.data"}), ("model.onnx", {"model.onnx.data"})]
    assert {path.name: path.read_text() for path in Path("out").iterdir()} == {
        "model.onnx": "new",
        "model.onnx.data": "new",
    }
