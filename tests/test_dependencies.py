"""Version bounds of the dependencies."""

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

DECLARED = [Requirement(text) for text in requires("lsoftmax-lightning") or []]
NEEDED = [need for need in DECLARED if not need.marker]
EXTRAS = [
    need for need in DECLARED if need.marker and any(need.marker.evaluate({"extra": e}) for e in ("export", "parquet"))
]


def test_compromised_releases_of_lightning_are_excluded() -> None:
    (lightning,) = (need.specifier for need in NEEDED if need.name == "lightning")
    assert list(lightning.filter(["2.6.1", "2.6.2", "2.6.3", "2.6.4"])) == ["2.6.4"]


def test_oldest_txt_pins_the_lower_bounds() -> None:
    lines = [line.partition("#")[0] for line in Path(__file__).with_name("oldest.txt").read_text().splitlines()]
    pinned = {(pin.name, bound.version) for pin in map(Requirement, filter(None, lines)) for bound in pin.specifier}
    bounds = {
        (need.name, bound.version) for need in NEEDED + EXTRAS for bound in need.specifier if bound.operator == ">="
    }
    assert bounds == {(name, version) for name, version in pinned if name != "pyparsing"}
