"""Augmentation: its result for an image, and uniform and independent draws."""

import pytest
import torch
import torchvision.transforms.functional as TF
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.transforms import RandomCropFlip

# significance level of the tests
ALPHA = 1e-6


def places(images: Tensor, height: int) -> Tensor:
    """Return row, column and flip, (N, 3), of images from :func:`numbered`."""
    corner = images[:, 0, 4, 4].long() - 1  # padding 4 leaves this pixel inside the image
    mirrored = (images[:, 0, 4, 5] < images[:, 0, 4, 4]).long()
    row, column = corner // height - 4, corner % height - 4
    column = torch.where(mirrored == 1, column - (height - 1 - 8), column)
    return torch.stack([row + 4, column + 4, mirrored], dim=1)


def numbered(count: int, side: int) -> Tensor:
    return torch.arange(1, side * side + 1, dtype=torch.int16).view(1, 1, side, side).expand(count, 1, side, side)


@pytest.mark.parametrize("shape", [(7, 3, 8, 8), (7, 1, 5, 9)])
@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (2, True)])
def test_crop_and_flip_equal_torchvision(shape: tuple[int, ...], padding: int, flip: bool) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    draws = torch.rand(len(images), 3)
    out = RandomCropFlip(padding, flip)(images, draws)
    assert out.dtype == torch.uint8
    for before, after, draw in zip(images, out, draws.tolist(), strict=True):
        top, left = (int(value * (2 * padding + 1)) for value in draw[:2])
        expected = TF.crop(TF.pad(before, [padding]), top, left, *shape[2:])
        assert torch.equal(after, TF.hflip(expected) if flip and draw[2] < 0.5 else expected)


def test_extreme_draws_stay_inside_the_image() -> None:
    draws = torch.tensor([[0.0, 0.0, 0.0], [1 - 2**-24] * 3])  # the largest that torch.rand gives
    found = places(RandomCropFlip(4, flip=True)(numbered(2, 32), draws), 32)
    assert found.tolist() == [[0, 0, 1], [8, 8, 0]]


def test_crops_and_flips_are_uniform_and_independent_per_sample() -> None:
    draws = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0))
    found = places(RandomCropFlip(4, flip=True)(numbered(len(draws), 32), draws), 32)
    cells = found[:, 0] * 18 + found[:, 1] * 2 + found[:, 2]
    assert (
        chisquare(cells.bincount(minlength=162)).pvalue > ALPHA
    )  # all 9 x 9 x 2 combinations, which also tests their independence
    for kind, values in zip(found.T, (9, 9, 2), strict=True):  # samples are independent of the next one
        table = (kind[:-1] * values + kind[1:]).bincount(minlength=values**2).view(values, values)
        assert chi2_contingency(table).pvalue > ALPHA


def test_a_negative_padding_is_rejected() -> None:
    with pytest.raises(InputError, match="padding: must be at least 0 pixels, got -1"):
        RandomCropFlip(-1)
