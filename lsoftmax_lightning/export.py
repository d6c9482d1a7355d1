"""A trained network on its own: from pixels to embedding and logits, for ONNX or torch.export."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .atomic import atomic_path, disk_errors, temporary_path, torch_save_part
from .checkpoints import read
from .data_spec import DataSpec
from .errors import InputError, RunError, first_line

Format = Literal["onnx", "torch_export", "state_dict"]
Pixels = Literal["uint8", "float"]

_TOLERANCE = 1e-3  # of the largest value; rounding leaves a thousandth of that
_IMAGES = 64  # that a file is checked with
_OUTPUTS = ("embedding", "logits")


class Deployed(nn.Module):
    """What is exported: images [N, channels, height, width] to their embeddings [N, D] and plain logits [N, C].

    Args:
        model: A module of ours.
        mean: Mean of each channel, in 0 .. 1.
        std: Likewise the standard deviation.
        pixels: Whether images are uint8, or floats in 0 .. 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...], pixels: Pixels = "uint8") -> None:
        super().__init__()
        self.model = model
        self.scale = 255 if pixels == "uint8" else 1
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding and logits."""
        embedding = self.model.embed((images.float() / self.scale - self.mean) / self.std)
        return embedding, self.model.head(embedding)


def export(
    model: Any, datamodule: Any | None, path: str | Path, format: Format = "onnx", pixels: Pixels = "uint8"
) -> dict[str, float]:
    """Writes a network to a file, and checks what that gives for images.

    ``onnx`` and ``torch_export`` are of :class:`Deployed`, for batches of any size, with ``class_names``, ``mean``,
    ``std``, ``pixels`` and ``margin`` in the metadata: of ONNX each as JSON, of torch.export in the extra file
    ``metadata.json``.
    ``state_dict`` is that of the backbone alone.

    Args:
        model: A module of ours, with the weights that are to be exported. It is put on the CPU, in evaluation mode.
        datamodule: Of the data that it was trained on, whose test images check the file. With None, random images do,
            and class names and normalisation are those of ``model.data_spec``, from the checkpoint.
        path: Of the file.
        format: What to write.
        pixels: Whether the exported network is to be given uint8 images, or floats in 0 .. 1.

    Returns:
        Of embedding and logits, the largest difference between the exported network and the module.

    Raises:
        InputError: If class names or normalisation are not known, the datamodule is of other data than those of the
            training, or a package is missing.
        RunError: If the network cannot be written so, what was written gives something else than the module, or the
            disk is full or read-only. A file that was there before is unchanged.
    """
    for name, value, known in (("format", format, get_args(Format)), ("pixels", pixels, get_args(Pixels))):
        if value not in known:
            raise InputError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" and not find_spec(name)]
    if missing:
        raise InputError(f"to export to ONNX takes {', '.join(missing)}: pip install 'lsoftmax-lightning[export]'.")
    path = Path(path)
    with disk_errors("output", path), temporary_path(path) as folder:
        folder.mkdir()  # an error here comes before the work
    model = model.cpu().eval()
    if format == "state_dict":
        with disk_errors("output", path), atomic_path(path) as part:
            torch_save_part(model.backbone.state_dict(), part)
            read(part)
        return {}

    if datamodule is None:
        spec = model.data_spec or DataSpec()
        images, normalized = _random_images(spec)
    else:
        images, normalized = _test_images(datamodule)
        spec = DataSpec.from_datamodule(datamodule)
        if not (spec.class_names and spec.mean and spec.std):
            raise InputError(
                f"{type(datamodule).__name__}: must have class_names, and mean and std of each channel in 0 .. 1, got "
                f" {getattr(datamodule, 'class_names', None)!r:.200}, {getattr(datamodule, 'mean', None)} and "
                f"{getattr(datamodule, 'std', None)}; set them on the datamodule."
            )
        model.check_data(datamodule)
    with torch.inference_mode():
        embedding = model.embed(normalized)
        expected = embedding, model.head(embedding)
    if pixels == "float":
        images = images / 255
    metadata = {
        "class_names": spec.class_names,
        "mean": spec.mean,
        "std": spec.std,
        "pixels": pixels,
        "margin": model.head.margin,
    }
    deployed = Deployed(model, spec.mean, spec.std, pixels).eval()
    two = torch.cat([images[:1], images[:1]])  # one would be taken for the only size there is
    program = torch.export.export(deployed, (two,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    write = _onnx if format == "onnx" else _torch_export
    with disk_errors("output", path), temporary_path(path) as folder:
        folder.mkdir()
        run = write(program, Path(folder, path.name), metadata)
        with torch.inference_mode():
            found = run(images), run(images[:1])
        differences = {}
        for at, name in enumerate(_OUTPUTS):
            difference = max(float((own[at] - expected[at][: len(own[at])]).abs().max()) for own in found)
            if not difference <= _TOLERANCE * max(1.0, float(expected[at].abs().max())):
                raise RunError(f"{name} of the exported network differs by {difference:.3g} from that of the module.")
            differences[name] = difference
        external_data = [file for file in folder.iterdir() if file.name != path.name]
        if external_data:  # in which ONNX keeps large weights; no model is left that would read those of another
            path.unlink(missing_ok=True)
        for file in [*external_data, folder / path.name]:
            with atomic_path(path.parent / file.name) as part:
                file.replace(part)
    return differences


def _random_images(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Return images, and the same normalised."""
    spec.require("class_names", "image_shape")
    images = torch.randint(256, (_IMAGES, *spec.image_shape), generator=torch.Generator().manual_seed(0))
    return images.byte(), spec.normalize(images.byte())


def _test_images(datamodule: Any) -> tuple[Tensor, Tensor]:
    """Return test images, and the same as the datamodule gives them to a network."""
    datamodule.prepare_data()
    datamodule.setup("test")
    images, targets, *_ = (part[:_IMAGES] for part in next(iter(datamodule.test_dataloader())))
    return images, datamodule.on_after_batch_transfer((images, targets), 0)[0]


Runner = Callable[[Tensor], tuple[Tensor, ...]]


def _torch_export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> Runner:
    buffer = io.BytesIO()  # on a full disk, torch reports no cause
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())
    read_again: Runner = torch.export.load(path).module()
    return read_again


def _onnx(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> Runner:
    import onnxruntime

    try:
        onnx = torch.onnx.export(program, input_names=["images"], output_names=_OUTPUTS, dynamo=True, verbose=False)
        assert onnx is not None
        onnx.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        onnx.save(path)
    except OSError:  # of the disk
        raise
    except Exception as error:  # whatever their converters meet
        raise RunError(
            f"torch {torch.__version__} and onnxscript {version('onnxscript')} cannot write this network as ONNX "
            f"({first_line(error)}). Newer ones may; torch_export does without them."
        ) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(_OUTPUTS, {"images": images.numpy()})))

    return run
