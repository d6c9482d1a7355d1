"""The networks of the paper (Table 1) as one configurable class."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import InputError


class PaperNet(nn.Module):
    """Convolutional network of the paper (Table 1).

    The network is a stack of blocks of conv-BN-PReLU layers. A 2x2 max pooling follows each of the first three blocks.
    The last layer is linear and returns the features.

    Args:
        image_shape: Channels, height and width of the input.
        num_features: Number of features D.
        blocks: Number of channels and number of convolutions of each block.
        stem: Number of channels of a convolution before the blocks. Default: no such convolution.
        stem_stride: Stride of that convolution.
        kernel_size: Kernel size of all convolutions, odd.
        feature_norm: Whether to apply batch normalisation after the linear layer.
        dropout: Probability of dropout before the linear layer, from 0 to below 1. The paper uses none.

    Attributes:
        num_features: Number of features D.

    Raises:
        InputError: If the image is too small for the poolings, ``kernel_size`` is even, or ``dropout`` is out of range.

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.backbones import PaperNet
        >>> net = PaperNet((1, 28, 28), num_features=64, blocks=[(16, 1), (32, 1)], stem=16)
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_features: int,
        blocks: Sequence[tuple[int, int]],
        stem: int | None = None,
        stem_stride: int = 1,
        kernel_size: int = 3,
        feature_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout: must be at least 0 and below 1, got {dropout}; the usual value is 0.5.")
        if kernel_size % 2 == 0:
            raise InputError(
                f"kernel_size: must be odd, so that the padding is the same on both sides, got {kernel_size}; the "
                "paper uses 3 and 5."
            )
        channels, height, width = image_shape
        poolings = min(len(blocks), 3)
        shrink = (1 if stem is None else stem_stride) * 2**poolings
        if min(height, width) < shrink:
            raise InputError(
                f"image_shape: height and width must be at least {shrink} pixels, got {height}x{width}; use larger "
                "images or fewer blocks."
            )
        layers: list[nn.Module] = []

        def convolution(out_channels: int, stride: int = 1) -> None:
            nonlocal channels
            # no bias, since the batch normalisation that follows would cancel it
            conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
            layers.extend([conv, nn.BatchNorm2d(out_channels), nn.PReLU(out_channels)])
            channels = out_channels

        if stem is not None:
            convolution(stem, stem_stride)
        for block_index, (block_width, depth) in enumerate(blocks):
            for _ in range(depth):
                convolution(block_width)
            if block_index < poolings:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # as Caffe rounds
        flat = channels * math.ceil(height / shrink) * math.ceil(width / shrink)
        layers.append(nn.Flatten())
        if dropout:  # added only if used, since checkpoints contain the indices of the layers after it
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(flat, num_features))
        if feature_norm:
            layers.append(nn.BatchNorm1d(num_features))
        self.layers = nn.Sequential(*layers)
        self.num_features = num_features
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # MSRA
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(N, D)`` of normalised images ``(N, C, H, W)``."""
        features: Tensor = self.layers(x)
        return features
