"""Networks from images to features, by name."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.func import functional_call

from ..errors import InputError, first_line
from .modes import evaluation_mode
from .paper import PaperNet

__all__ = ["PaperNet", "create_backbone", "list_backbones"]

# Table 1 of the paper. `digits`, for scikit-learn's 8x8 digits, is not in the paper but has the same design.
_PAPER: dict[str, dict[str, Any]] = {
    "digits": {"stem": 32, "blocks": [(32, 1), (64, 1)], "num_features": 64},
    "mnist": {"stem": 64, "blocks": [(64, 3), (64, 3), (64, 3)], "num_features": 256},
    "mnist_2d": {"blocks": [(32, 2), (64, 2), (128, 2)], "kernel_size": 5, "num_features": 2},
    "cifar10": {"stem": 64, "blocks": [(64, 4), (96, 4), (128, 4)], "num_features": 256},
    "cifar100": {"stem": 96, "blocks": [(96, 4), (192, 4), (384, 4)], "num_features": 512},
    "lfw": {"stem": 64, "stem_stride": 2, "blocks": [(64, 4), (256, 4), (256, 4), (256, 4)], "num_features": 512},
}


def list_backbones() -> list[str]:
    """Return the names for :func:`create_backbone`: the paper's networks, then torchvision's classifiers."""
    return [*_PAPER, *torchvision.models.list_models(module=torchvision.models)]


def create_backbone(name: str, image_shape: tuple[int, int, int], **kwargs: Any) -> nn.Module:
    """Build a network without its classifier.

    If the images do not have three channels, the first convolution of a torchvision model is replaced by a randomly
    initialised one, with a warning if ``weights`` are pretrained. Models with a fixed image size (``vit_b_16``,
    ``maxvit_t``) are built for the size in ``image_shape``.

    Args:
        name: One of :func:`list_backbones`.
        image_shape: Channels, height and width of the images.
        **kwargs: Arguments of :class:`PaperNet` or of the torchvision model, such as ``weights``. They override the
            defaults of ``name``.

    Returns:
        A module from images ``(N, C, H, W)`` to features ``(N, D)``, with D in its attribute ``num_features``.

    Raises:
        InputError: If the name is unknown, or the settings or the image shape do not fit the network.

    Example:
        >>> from lsoftmax_lightning.backbones import create_backbone
        >>> create_backbone("cifar10", (3, 32, 32)).num_features
        256
    """
    if name not in list_backbones():
        raise InputError(
            f"backbone: must be {', '.join(_PAPER)} or one of torchvision's classification models (resnet18, ...), got "
            f"{name!r}; see lsoftmax_lightning.backbones.list_backbones()."
        )
    try:
        if name in _PAPER:
            return PaperNet(image_shape, **(_PAPER[name] | kwargs))
        size = tuple(image_shape[1:])
        backbone = _torchvision_backbone(name, image_shape[0], **(_size_arguments(name, size) | kwargs))
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, OSError, AssertionError) as error:
        raise InputError(
            f"backbone: {name!r} cannot be built with {kwargs or 'no arguments'} for images of "
            f"{tuple(image_shape)}: {first_line(error)}"
        ) from error
    _check_image_shape(name, backbone, image_shape)
    return backbone


def _size_arguments(name: str, size: tuple[int, ...]) -> dict[str, Any]:
    """Return the argument of a torchvision model that sets its image size, if the model has one."""
    if name.startswith("vit_"):
        return {"image_size": size[0]}
    return {"input_size": size} if name.startswith("maxvit_") else {}


def _check_image_shape(name: str, backbone: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Check on the meta device, without computation, that a network accepts images of a shape.

    Raises:
        InputError: If it does not accept them.
    """
    state = {key: value.to("meta") for key, value in [*backbone.named_parameters(), *backbone.named_buffers()]}
    try:
        with evaluation_mode(backbone):  # in training mode, batch normalisation rejects a single value per channel
            functional_call(backbone, state, torch.empty(1, *image_shape, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"backbone: {name!r} does not accept images of {tuple(image_shape)}: {first_line(error).rstrip('.')}; use "
            "another size, such as 224x224."
        ) from error


def _torchvision_backbone(name: str, channels: int, **kwargs: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3") and not kwargs.get("weights"):
        # auxiliary classifiers would turn the output into a tuple in training
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs
    model: nn.Module = torchvision.models.get_model(name, **kwargs)
    if name == "inception_v3":  # pretrained weights enable its auxiliary classifier
        model.aux_logits, model.AuxLogits = False, None  # type: ignore[assignment]

    # the last layer is the classifier: linear, except for SqueezeNet's 1x1 convolution
    classifier_name, classifier = [
        (path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ][-1]
    model.set_submodule(classifier_name, nn.Identity())
    model.num_features = classifier.weight.shape[1]  # type: ignore[assignment]

    if channels != 3:
        if kwargs.get("weights"):
            rank_zero_warn(
                f"backbone_args.weights: the pretrained first convolution requires images of 3 channels, got "
                f"{channels}; it is replaced by a randomly initialised one."
            )
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        first.in_channels = channels
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
        first.reset_parameters()
        if hasattr(model, "transform_input"):
            model.transform_input = False  # type: ignore[assignment] # it requires three channels
    return model
