"""A mistake in the settings ends in one line that names the right setting."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lsoftmax_lightning.cli import CONFIGS
from lsoftmax_lightning.lightning_cli import InstantiatedCLI
from lsoftmax_lightning.user_errors import errors_without_traceback

from .helpers.command_line import QUIET, fails

SAMPLE_SIZE = 100
MIN_SHARE = 0.9


class Typo(NamedTuple):
    """Settings with a mistake, the option if it is one of the command line, and the name that must be offered."""

    config: str
    content: dict[str, Any] | None
    words: tuple[str, ...]
    right: str


def drop(name: str, place: int) -> str:
    return name[:place] + name[place + 1 :]


def double(name: str, place: int) -> str:
    return name[:place] + name[place] + name[place:]


def swap(name: str, place: int) -> str:
    place = min(place, len(name) - 2)
    return name[:place] + name[place + 1] + name[place] + name[place + 2 :]


def entries(content: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Return the keys that lead to each value, and the value."""
    for key, value in content.items() if isinstance(content, dict) else []:
        yield (*keys, key), value
        yield from entries(value, (*keys, key))


def with_change(content: dict[str, Any], keys: tuple[Any, ...], change: Callable[[dict[str, Any]], None]) -> Any:
    """Return a copy of a config in which the mapping at ``keys`` is changed."""
    changed = copy.deepcopy(content)
    place = changed
    for key in keys:
        place = place[key]
    change(place)
    return changed


def typos_of(path: Path, rng: random.Random) -> Iterator[Typo]:
    content = yaml.safe_load(path.read_text())
    groups = [(), *(keys for keys, value in entries(content) if isinstance(value, dict) and "class_path" not in value)]
    groups = [keys for keys in groups if "backbone_args" not in keys]  # takes any key
    for keys, value in entries(content):
        *parents, name = keys
        if name == "init_args" or "backbone_args" in parents:
            continue
        if name == "class_path":
            prefix, dot, short = value.rpartition(".")
            for edit in (drop, double, swap):
                wrong = prefix + dot + edit(short, rng.randrange(len(short)))
                yield Typo(path.name, with_change(content, tuple(parents), lambda at: at.update(class_path=wrong)), (), short)  # noqa: B023
                option = ".".join(key for key in parents if key != "init_args")
                yield Typo(path.name, None, (f"--{option}={wrong}",), short)
            continue
        right = ".".join(keys)
        option = right.replace(".init_args", "")
        is_leaf = not isinstance(value, dict)
        for edit in (drop, double, swap):
            wrong = edit(name, rng.randrange(len(name)))
            yield Typo(path.name, with_change(content, tuple(parents), lambda at: at.update({wrong: at.pop(name)})), (), right)  # noqa: B023
            if is_leaf:
                place = rng.randrange(len(option))
                misspelt = edit(option, place)
                yield Typo(path.name, None, (f"--{misspelt}={value}",), option)
        if is_leaf:
            parent = rng.choice([keys for keys in groups if keys != tuple(parents)])
            moved = with_change(content, tuple(parents), lambda at: at.pop(name))  # noqa: B023
            yield Typo(path.name, with_change(moved, parent, lambda at: at.update({name: value})), (), right)  # noqa: B023
            below = ".".join(key for key in (*parent, name) if key != "init_args")
            yield Typo(path.name, None, (f"--{below}={value}",), option)


def all_typos() -> list[Typo]:
    rng = random.Random(0)
    return [typo for path in sorted(CONFIGS.glob("*.yaml")) for typo in typos_of(path, rng)]


def message(cli: InstantiatedCLI, typo: Typo, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return what is printed; None if the parser takes the settings."""
    config = typo.config
    if typo.content is not None:
        config = "wrong.yaml"
        Path(config).write_text(yaml.safe_dump(typo.content, sort_keys=False))
    try:
        with errors_without_traceback():
            cli.parse_arguments(cli.parser, ["fit", f"--config={config}", *typo.words])
    except SystemExit as error:
        assert error.code == 2
        return capsys.readouterr().err
    return None


def check(typos: list[Typo], capsys: pytest.CaptureFixture[str]) -> None:
    cli = InstantiatedCLI(["fit", "--config=digits.yaml", *QUIET])
    printed = [(typo, text) for typo in typos if (text := message(cli, typo, capsys)) is not None]
    assert len(printed) > 0.9 * len(typos)  # the parser takes an abbreviation
    for typo, text in printed:
        assert text.startswith("error: ")
        assert len(text.splitlines()) == 1, text
        assert "Traceback" not in text
        if typo.content is not None:
            assert text.startswith("error: wrong.yaml, line "), text
    missed = [f"{typo.words or typo.content} -> {text}" for typo, text in printed if typo.right not in offered(text)]
    assert len(missed) <= (1 - MIN_SHARE) * len(printed), "\n".join(missed)
    print(f"{len(missed)} of {len(printed)}, {len(typos)}", *missed, sep="\n")


def offered(text: str) -> set[str]:
    """Return the names that a message offers, of classes without their module."""
    names = re.split(", | or ", text.partition("did you mean ")[2].strip().removesuffix("?"))
    return {name.removeprefix("--") for name in names} | {name.rpartition(".")[2] for name in names if name[:1] != "-"}


def test_the_right_name_is_offered_for_a_sample_of_typos(capsys: pytest.CaptureFixture[str]) -> None:
    check(random.Random(1).sample(all_typos(), SAMPLE_SIZE), capsys)


@pytest.mark.slow
def test_the_right_name_is_offered_for_all_typos(capsys: pytest.CaptureFixture[str]) -> None:
    check(all_typos(), capsys)
