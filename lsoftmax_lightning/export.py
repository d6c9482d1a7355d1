"""Export of a trained network, from pixels to embeddings and logits, to ONNX or torch.export."""

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

from .atomic import atomic_path, disk_errors, temporary_path, torch_save_temporary
from .checkpoints import read
from .data_spec import DataSpec
from .errors import InputError, RunError, first_line

Format = Literal["onnx", "torch_export", "state_dict"]
Pixels = Literal["uint8", "float"]

_TOLERANCE = 1e-3  # relative to the largest value; rounding errors are a thousand times smaller
_NUM_IMAGES = 64  # images to compare the outputs on
_OUTPUTS = ("embedding", "logits")


class ExportWrapper(nn.Module):
    """The exported network, from images (N, channels, height, width) to embeddings (N, D) and plain logits (N, C).

    Args:
        model: A module of this package.
        mean: Mean of each channel, in 0 .. 1.
        std: Standard deviation of each channel, in 0 .. 1.
        pixels: ``"uint8"`` for images of uint8, ``"float"`` for images of floats from 0 to 1.
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
        """Compute the embeddings (N, D) and the logits (N, C) of images."""
        embedding = self.model.embed((images.float() / self.scale - self.mean) / self.std)
        return embedding, self.model.head(embedding)


def export(
    model: Any, datamodule: Any | None, path: str | Path, format: Format = "onnx", pixels: Pixels = "uint8"
) -> dict[str, float]:
    """Write a network to a file, and compare the outputs of the file with those of the module.

    ``onnx`` and ``torch_export`` write an :class:`ExportWrapper` for batches of any size, with the metadata
    ``class_names``, ``image_shape``, ``resize``, ``mean``, ``std``, ``pixels`` and ``margin``. ONNX stores each of them
    as JSON in its metadata, and names the first axis ``batch``. torch.export stores them in the extra file
    ``metadata.json``. ``state_dict`` writes the state dict of the backbone, and compares nothing.

    Args:
        model: A module of this package with its trained weights. It is moved to the CPU and set to evaluation mode.
        datamodule: Datamodule of the training data, to compare outputs on its test images. None compares them on random
            images, and takes class names and normalisation from ``model.data_spec``, which a checkpoint contains.
        path: Path of the file.
        format: Format of the file.
        pixels: Input of the exported network: ``"uint8"`` for images of uint8, ``"float"`` for floats from 0 to 1.

    Returns:
        The largest absolute difference of the embeddings and of the logits, by ``embedding`` and ``logits``.

    Raises:
        InputError: If class names or normalisation are unknown, the datamodule does not match the training data, or a
            package is missing.
        RunError: If the format does not support the network, the outputs differ, or the file cannot be written. An
            existing file is then unchanged.
    """
    for name, value, known in (("format", format, get_args(Format)), ("pixels", pixels, get_args(Pixels))):
        if value not in known:
            raise InputError(f"{name}: must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}; use {known[0]}.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" and not find_spec(name)]
    if missing:
        raise InputError(
            f"format: onnx requires the packages {', '.join(missing)}, which are not installed; "
            "run pip install 'lsoftmax-lightning[export]'."
        )
    path = Path(path)
    if path.is_dir():
        raise InputError(f"output: must be a file, got the folder {path}; name a file in it.")
    with disk_errors("output", path), temporary_path(path) as folder:
        folder.mkdir()  # to report an unwritable path before the export
    model = model.cpu().eval()
    if format == "state_dict":
        with disk_errors("output", path), atomic_path(path) as temporary:
            torch_save_temporary(model.backbone.state_dict(), temporary)
            read(temporary)
        return {}

    if datamodule is None:
        spec = model.data_spec or DataSpec()
        images, normalized = _random_images(spec)
    else:
        images, normalized = _test_images(datamodule)
        spec = DataSpec.from_datamodule(datamodule)
        if not (spec.class_names and spec.mean and spec.std):
            raise InputError(
                f"{type(datamodule).__name__}: must have class_names, and mean and std of each channel from 0 to 1, "
                f"got {getattr(datamodule, 'class_names', None)!r:.200}, {getattr(datamodule, 'mean', None)} and "
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
        "image_shape": spec.image_shape,
        "resize": spec.resize,
        "mean": spec.mean,
        "std": spec.std,
        "pixels": pixels,
        "margin": model.head.margin,
    }
    wrapper = ExportWrapper(model, spec.mean, spec.std, pixels).eval()
    two = torch.cat([images[:1], images[:1]])  # torch.export would fix a batch size of 1
    program = torch.export.export(wrapper, (two,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    write = write_onnx if format == "onnx" else write_torch_export
    with disk_errors("output", path), temporary_path(path) as folder:
        folder.mkdir()
        run = write(program, Path(folder, path.name), metadata)
        with torch.inference_mode():
            batch, single = run(images), run(images[:1])
        differences = {}
        for name, reference, *outputs in zip(_OUTPUTS, expected, batch, single, strict=True):
            difference = max(float((output - reference[: len(output)]).abs().max()) for output in outputs)
            if not difference <= _TOLERANCE * max(1.0, float(reference.abs().max())):
                raise RunError(f"{name} of the exported network differs by {difference:.3g} from that of the module.")
            differences[name] = difference
        external_data = [file for file in folder.iterdir() if file.name != path.name]
        if external_data:  # ONNX stores large weights there; the old model must not read the new weights
            path.unlink(missing_ok=True)
        for file in [*external_data, folder / path.name]:
            with atomic_path(path.parent / file.name) as temporary:
                file.replace(temporary)
    return differences


def _random_images(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Return random images, and the same images normalised."""
    spec.require("class_names", "image_shape")
    images = torch.randint(256, (_NUM_IMAGES, *spec.image_shape), generator=torch.Generator().manual_seed(0))
    return images.byte(), spec.normalize(images.byte())


def _test_images(datamodule: Any) -> tuple[Tensor, Tensor]:
    """Return test images, and the same images after the datamodule's transforms and normalisation."""
    datamodule.prepare_data()
    datamodule.setup("test")
    images, targets, *_ = (column[:_NUM_IMAGES] for column in next(iter(datamodule.test_dataloader())))
    return images, datamodule.on_after_batch_transfer((images, targets), 0)[0]


Runner = Callable[[Tensor], tuple[Tensor, ...]]


def write_torch_export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> Runner:
    """Write a program for :func:`torch.export.load`, and return a function that runs the written file."""
    buffer = io.BytesIO()  # torch would not report the cause of a full disk
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())
    run: Runner = torch.export.load(path).module()
    return run


def write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> Runner:
    """Write a program as ONNX, and return a function that runs the written file.

    Raises:
        RunError: If ONNX does not support the network.
    """
    import onnxruntime

    try:
        axes = ({0: "batch"},)  # names the axis
        onnx = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=_OUTPUTS,
            dynamic_shapes=axes,
            dynamo=True,
            verbose=False,
        )
        assert onnx is not None
        onnx.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        onnx.save(path)
    except OSError:  # a full disk
        raise
    except Exception as error:  # converters may raise anything
        raise RunError(
            f"torch {torch.__version__} and onnxscript {version('onnxscript')} cannot write this network as ONNX "
            f"({first_line(error)}). Upgrade them, or set the format to torch_export."
        ) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(_OUTPUTS, {"images": images.numpy()})))

    return run
