"""A network that leaves this package gives what it gave in it."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from lsoftmax_lightning import ClassificationModule, VerificationModule
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.datamodules import DigitsDataModule
from lsoftmax_lightning.errors import InputError, RunError
from lsoftmax_lightning.export import Format, Pixels, export

from .conftest import WRITES_ONNX, BlobsDataModule, make_model
from .test_cli import QUIET, SHORT, fails


def run(path: str, images: Tensor) -> tuple[dict[str, str], list[Tensor]]:
    """Metadata and outputs, without anything of ours."""
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
def test_for_batches_of_any_size(format: Format, pixels: Pixels) -> None:
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
            features = model.embed(data.normalize(images[:size]))
            torch.testing.assert_close(embedding, features, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits, model.head(features), rtol=1e-4, atol=1e-4)
    assert json.loads(metadata["class_names"]) == ["nw", "ne", "sw", "se"]
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([0.5], [0.25])
    assert (json.loads(metadata["pixels"]), json.loads(metadata["margin"])) == (pixels, 2)


def test_from_a_checkpoint_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "digits.yaml", *SHORT])
    checkpoint = "runs/digits/version_0/checkpoints/best.ckpt"
    capsys.readouterr()
    main(["export", "--ckpt_path", checkpoint, "--format", "state_dict", "--output", "backbone.pt"])
    assert capsys.readouterr().out.endswith("Wrote backbone.pt.\n")
    model = ClassificationModule.load_from_checkpoint(checkpoint)
    saved = torch.load("backbone.pt", weights_only=True)
    assert saved.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in model.backbone.state_dict().items())

    main(["export", "--ckpt_path", checkpoint, "--format", "torch_export", "--output", "model.pt2"])
    printed = capsys.readouterr().out
    assert "Wrote model.pt2. For test images it differs from the module by at most" in printed
    data = DigitsDataModule()
    _, (_, logits) = run("model.pt2", data.load(train=False).images)
    predicted = main(["predict", "--config", "digits.yaml", "--ckpt_path", checkpoint, *QUIET[:3]])
    assert predicted is not None
    rows = Path("runs/digits/version_1/predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == [data.class_names[number] for number in logits.argmax(1)]

    for args, said in (
        (["--ckpt_path", "nope.ckpt"], "there is no config.yaml, the config of the run that nope.ckpt is of"),
        (["--ckpt_path", checkpoint, "--model.margin", "x"], "margin"),
        (["--ckpt_path", checkpoint, "--model.backbone", "mnist"], "is of another network than the config"),
        (["--ckpt_path", "nope.ckpt", "--config", "digits.yaml"], "there is no file nope.ckpt"),
    ):
        assert said in fails(capsys, "export", *args)


def test_mirrored_faces() -> None:
    torch.manual_seed(0)
    model = VerificationModule(4, "digits", image_shape=(1, 8, 8), mirror=True).eval()
    data = BlobsDataModule()
    export(model, data, "faces.pt2", "torch_export")
    images = data.test_data.images
    with torch.no_grad():
        expected = model.represent(data.normalize(images))
    torch.testing.assert_close(run("faces.pt2", images)[1][0], expected, rtol=1e-4, atol=1e-4)


def test_what_differs_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BlobsDataModule):
        mean = (0.1,)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, targets = super().on_after_batch_transfer(batch, dataloader_idx)
            return images * 2, targets

    with pytest.raises(RunError, match="embedding of the exported network differs by"):
        export(make_model(), Wrong(), "model.pt2", "torch_export")
    assert not list(Path().iterdir())
    with pytest.raises(InputError, match="pixels must be uint8 or float, got 'int8'"):
        export(make_model(), BlobsDataModule(), "model.pt2", "torch_export", "int8")  # type: ignore[arg-type]
    monkeypatch.setattr("lsoftmax_lightning.export.find_spec", lambda name: None)
    with pytest.raises(InputError, match="to export to ONNX takes onnx, onnxscript, onnxruntime: pip install"):
        export(make_model(), BlobsDataModule(), "model.onnx")
