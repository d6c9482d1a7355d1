"""Backbones by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from lsoftmax_lightning.backbones import create_backbone, list_backbones
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.errors import InputError

from .helpers.command_line import QUIET, fails

PAPER = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "mnist_2d": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "lfw": (3, 112, 96),
}


def layers(name: str) -> list[tuple[str, int]]:
    """Return kind and width of the layers that Table 1 lists."""
    return [
        ("conv", m.out_channels) if isinstance(m, nn.Conv2d) else ("fc", m.out_features)
        for m in create_backbone(name, PAPER[name]).modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]


def test_networks_equal_table_1() -> None:
    assert layers("mnist") == [("conv", 64)] * 10 + [("fc", 256)]
    assert layers("mnist_2d") == [("conv", w) for w in (32, 32, 64, 64, 128, 128)] + [("fc", 2)]
    assert layers("cifar10") == [("conv", w) for w in [64] * 5 + [96] * 4 + [128] * 4] + [("fc", 256)]
    assert layers("cifar100") == [("conv", w) for w in [96] * 5 + [192] * 4 + [384] * 4] + [("fc", 512)]
    assert layers("lfw") == [("conv", w) for w in [64] * 5 + [256] * 12] + [("fc", 512)]
    strides = [m.stride for m in create_backbone("lfw", PAPER["lfw"]).modules() if isinstance(m, nn.Conv2d)]
    assert strides == [(2, 2)] + [(1, 1)] * 16
    sizes = {m.kernel_size for m in create_backbone("mnist_2d", (1, 28, 28)).modules() if isinstance(m, nn.Conv2d)}
    assert sizes == {(5, 5)}


def test_dropout_precedes_the_feature_layer_and_leaves_the_names_of_other_layers() -> None:
    names = create_backbone("mnist", (1, 28, 28)).state_dict().keys()
    assert create_backbone("mnist", (1, 28, 28), dropout=0.0).state_dict().keys() == names
    backbone = create_backbone("mnist", (1, 28, 28), dropout=0.5)
    kinds = [type(module) for module in backbone.modules()]
    assert kinds[kinds.index(nn.Dropout) + 1] is nn.Linear
    images = torch.randn(4, 1, 28, 28)
    torch.manual_seed(0)
    assert not torch.equal(backbone(images), backbone(images))
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize("name", PAPER)
def test_paper_networks_give_features(name: str) -> None:
    backbone = create_backbone(name, PAPER[name])
    features = backbone(torch.randn(3, *PAPER[name]))
    assert features.shape == (3, backbone.num_features)
    assert backbone(torch.randn(3, *PAPER[name])).requires_grad


def test_pooling_rounds_up_for_any_image_size() -> None:
    for stride in (1, 2, 3):
        backbone = create_backbone("mnist", (3, 29, 41), num_features=7, stem_stride=stride)
        assert backbone(torch.randn(2, 3, 29, 41)).shape == (2, 7)


# the smallest network of each family
FAMILIES = {
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
}


# RegNet computes its widths from tensors, which have no values on the meta device
@pytest.mark.parametrize(
    "name",
    [
        n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow)
        for n in list_backbones()
        if n not in PAPER and "regnet" not in n
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_torchvision_classifier_gives_features(name: str) -> None:
    side = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        backbone = create_backbone(name, (1, side, side)).train()
        features = backbone(torch.empty(2, 1, side, side))
    assert features.shape == (2, backbone.num_features)
    assert backbone.num_features != 1000


@pytest.mark.parametrize("name", ["regnet_y_400mf", "resnet18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_backbones_train(name: str, channels: int) -> None:
    backbone = create_backbone(name, (channels, 32, 32))
    features = backbone(torch.randn(2, channels, 32, 32))
    features.sum().backward()
    assert features.shape == (2, backbone.num_features)
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "shape"), [("vit_b_32", (3, 64, 64)), ("vit_b_16", (1, 32, 32)), ("maxvit_t", (3, 448, 448))]
)
def test_fixed_size_models_are_built_for_the_image_size(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name, shape).train()
        assert backbone(torch.empty(2, *shape)).shape == (2, backbone.num_features)
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("vit_b_16", (3, 64, 48), {}, r"'vit_b_16' does not accept images of \(3, 64, 48\): Wrong image width!"),
        ("vit_b_16", (3, 30, 30), {}, r"with no arguments for images of \(3, 30, 30\): .* indivisible by patch size"),
        ("vit_b_16", (3, 32, 32), {"image_size": 64}, "Wrong image height! Expected 64 but got 32"),
        ("vit_b_16", (3, 32, 32), {"weights": "DEFAULT"}, "expected value 224 but got 32"),
        ("maxvit_t", (3, 64, 64), {}, "is not divisible by partition size 7"),
        ("maxvit_t", (3, 448, 224), {}, "Grid size must be divisible by partition size"),
        ("alexnet", (3, 32, 32), {}, "Output size is too small; use another size"),
        (
            "inception_v3",
            (3, 64, 64),
            {},
            "(Kernel|Output) size .*; use another size",
        ),
    ],
)
def test_unsupported_image_sizes_are_rejected_in_one_line(
    name: str, shape: tuple[int, int, int], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught, torch.device("meta"):
        create_backbone(name, shape, **settings)
    assert "\n" not in str(caught.value)


def test_replacing_a_pretrained_convolution_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models.get_model", lambda name, weights: resnet18())  # no download
    create_backbone("resnet18", (3, 32, 32), weights="DEFAULT")
    with pytest.warns(UserWarning, match=r"backbone_args.weights: .* requires images of 3 channels, got 1; .* random"):
        create_backbone("resnet18", (1, 32, 32), weights="DEFAULT")


def test_command_line_reports_backbone_and_image_shape(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "fit", "--config=digits.yaml", "--model.backbone=alexnet")
    assert "error: backbone: 'alexnet' does not accept images of (1, 8, 8): " in message


def test_command_line_accepts_the_class_path_of_a_backbone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("networks.py").write_text(
        """from torch import nn
class Plain(nn.Sequential):
    num_features = 9
    def __init__(self, bias: bool = True):
        super().__init__(nn.Flatten(), nn.Linear(64, 9, bias))
"""
    )
    monkeypatch.syspath_prepend("")
    for settings in ([], ["--model.backbone.bias=false"]):
        fit = ["fit", "--config=digits.yaml", *QUIET, "--trainer.fast_dev_run=true", "--model.backbone=networks.Plain"]
        cli = main([*fit, *settings])
        assert cli is not None
        assert (cli.model.backbone[1].bias is None) == bool(settings)
    for name in ("networks.Plane", "network.Plain"):
        printed = fails(capsys, "fit", "--config=digits.yaml", f"--model.backbone={name}")
        assert f"error: model.backbone: cannot be imported, got {name!r} (" in printed


def test_invalid_backbones_are_rejected() -> None:
    with pytest.raises(InputError, match="got 'resnet19'"):
        create_backbone("resnet19", (3, 32, 32))
    with pytest.raises(InputError, match="wdith"):
        create_backbone("mnist", (1, 28, 28), wdith=3)
    with pytest.raises(InputError, match="kernel_size: must be odd"):
        create_backbone("mnist", (1, 28, 28), kernel_size=4)
    for probability in (-0.1, 1.0):
        with pytest.raises(InputError, match=f"dropout: must be at least 0 and below 1, got {probability}"):
            create_backbone("mnist", (1, 28, 28), dropout=probability)
    with pytest.raises(InputError, match="nope"):
        create_backbone("resnet18", (3, 32, 32), weights="nope")
    with pytest.raises(InputError, match="at least 8 pixels, got 4x28"):
        create_backbone("mnist", (1, 4, 28))
    with pytest.raises(InputError, match="at least 16 pixels, got 15x96"):
        create_backbone("lfw", (3, 15, 96))
