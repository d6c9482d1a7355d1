"""Pairs of images: columns, selection, and pairs of a datamodule."""

from types import SimpleNamespace

import torch

from lsoftmax_lightning.pairs import Pairs, pairs_of

TABLE = torch.tensor([[4, 1, 1, 1], [0, 1, 0, 0], [2, 4, 0, 2]])


def test_columns_equal_those_of_the_table() -> None:
    pairs = Pairs.from_table(TABLE)
    assert len(pairs) == 3
    assert torch.equal(torch.stack([pairs.first, pairs.second, pairs.same, pairs.fold], dim=1), TABLE)
    assert pairs.is_scored.tolist() == [True, False, True]
    assert pairs.image_ids.tolist() == [0, 1, 2, 4]


def test_rows_are_selected_by_mask_or_index() -> None:
    pairs = Pairs.from_table(TABLE)
    for rows in (pairs.is_scored, torch.tensor([0, 2])):
        assert pairs[rows].first.tolist() == [4, 2]
        assert pairs[rows].same.tolist() == [True, False]


def test_pairs_of_accepts_pairs_a_table_or_none() -> None:
    pairs = Pairs.from_table(TABLE)
    assert pairs_of(SimpleNamespace(val_pairs=pairs), "val") is pairs
    from_table = pairs_of(SimpleNamespace(test_pairs=TABLE), "test")
    assert from_table is not None
    assert torch.equal(from_table.first, pairs.first)
    assert pairs_of(SimpleNamespace(val_pairs=pairs), "test") is None
    assert pairs_of(None, "val") is None
