"""What may be installed beside us."""

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

NEEDED = [need for need in map(Requirement, requires("lsoftmax-lightning") or []) if not need.marker]


def test_no_release_of_lightning_that_stole_secrets_is_allowed() -> None:
    (lightning,) = (need.specifier for need in NEEDED if need.name == "lightning")
    assert list(lightning.filter(["2.6.1", "2.6.2", "2.6.3", "2.6.4"])) == ["2.6.4"]


def test_the_oldest_set_is_that_of_the_bounds() -> None:
    lines = [line.partition("#")[0] for line in Path(__file__).with_name("oldest.txt").read_text().splitlines()]
    pinned = {(pin.name, bound.version) for pin in map(Requirement, filter(None, lines)) for bound in pin.specifier}
    bounds = {(need.name, bound.version) for need in NEEDED for bound in need.specifier if bound.operator == ">="}
    assert bounds == {(name, version) for name, version in pinned if name != "pyparsing"}
