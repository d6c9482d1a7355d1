import pytest

from lsoftmax_lightning.seeds import global_seed, hashed_seed


def test_the_global_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() is None
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert global_seed() == 7


def test_neighbouring_keys_have_different_seeds() -> None:
    seeds = {hashed_seed(f"{seed} {epoch}") for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert hashed_seed("0 0") == 1506503743  # runs can be repeated with every release
