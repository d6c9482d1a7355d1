"""One-line messages about mistakes in the settings: the place, the problem and the most similar valid names.

The messages of the parser are about types of its library. After an error, :func:`find_mistake` therefore reads the
command line and its config files again, and compares every name, class and value with the settings of the parser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from difflib import SequenceMatcher
from enum import Enum
from functools import cache
from inspect import isabstract
from itertools import chain
from pathlib import Path, PurePath
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from .compat import known_subclasses, settings_of_parser
from .config_files import load_bounded_yaml
from .config_paths import CONFIGS, find_config
from .errors import InputError, first_line

_SIMPLE = (int, float, complex, str, bytes, type(None), list, dict, tuple, set, Enum, PurePath, timedelta, Tensor)
_MAX_SUGGESTIONS = 3
_MAX_LISTED = 12  # names that a message lists if none is similar
_MIN_SIMILARITY = 0.6  # of a suggested name
_MIN_WORD_SIMILARITY = 0.65  # of the last component of a suggested name
_TIE = 0.1  # names are suggested together if their similarities differ by less
_MAX_VALUE = 80  # characters of a value in a message
_COMMAND_LINE_ONLY = ("config", "help", "print_config", "version")
_SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")


class _Base(NamedTuple):
    """A class whose subclasses a setting accepts, and the number of arguments that the program passes to them."""

    kind: type
    num_passed: int


class _Mistake(NamedTuple):
    """A message. Mistakes in names are reported before mistakes in values."""

    text: str
    is_about_value: bool = False


class _Node:
    """A setting or a group of settings, with the selected class and its settings.

    Args:
        owner: Command, class or group that contains the settings below.
        hint: Type of the setting; None for a group or an unknown type.
        default: Default of the setting, which determines the selected class.
    """

    def __init__(self, owner: str, hint: Any = None, default: Any = None) -> None:
        self.owner, self.hint = owner, hint
        self.bases = list(_bases(hint))
        self.children: dict[str, _Node] | None = None
        last = default[-1] if isinstance(default, list) and default else default
        if self.bases and isinstance(last, Namespace) and "class_path" in last:
            self.set_class(str(last.class_path))

    def set_class(self, name: str) -> bool:
        """Select a class; return whether it exists."""
        kind, _ = self._resolve(name)
        if kind is None:
            return False
        num_passed = next((base.num_passed for base in self.bases), 0)
        settings = _class_settings(kind, num_passed)
        self.owner = getattr(kind, "__name__", name)
        self.children = settings and _tree(*settings, self.owner)
        return True

    def _resolve(self, name: str) -> tuple[Any, str]:
        """Return the class of a name, or the function that returns one; if there is none, None and the reason."""
        paths = [name] if "." in name else [path for path in self.class_paths() if path.rpartition(".")[2] == name]
        if len(paths) != 1:
            return None, f"give one of {', '.join(paths)}" if paths else ""
        try:
            kind = resolve_name(paths[0])
        except Exception as error:
            return None, f"{type(error).__name__}: {first_line(error)}"
        if isinstance(kind, type) and not issubclass(kind, tuple(base.kind for base in self.bases)):
            return None, "it is a class of another type"
        if isinstance(kind, type) and isabstract(kind):
            return None, "it is abstract"
        return (kind, "") if callable(kind) else (None, "it is not a class")

    def class_mistake(self, name: str) -> str:
        """Return the problem with the name of a class."""
        _, reason = self._resolve(name)
        kinds = " or ".join(dict.fromkeys(base.kind.__name__ for base in self.bases))
        dotted = "." in name
        names = {path if dotted else path.rpartition(".")[2]: path for path in self.class_paths()}
        scores = {offer: _similarity(name.split("."), offer.split(".")) for offer in names}
        near = _nearest(scores)
        if near:
            advice = f"did you mean {_either(near)}?"
        else:
            advice = f"{reason or 'a class of your own needs its import path, as in my_module.MyClass'}."
        return f"must name a subclass of {kinds}, got {_shown(name)}; {advice}"

    def class_paths(self) -> list[str]:
        """Return the import paths of the known classes that the setting accepts."""
        return list(dict.fromkeys(path for base in self.bases for path in known_subclasses(base.kind)))

    def takes_any_key(self) -> bool:
        """Return whether names below this setting cannot be checked."""
        if self.children is not None:
            return False
        return self.hint is None or self.hint is Any or bool(self.bases) or "dict" in str(self.hint).lower()

    def accepts(self, value: Any, is_text: bool) -> bool:
        """Return whether the parser accepts a value; ``is_text`` for a string from the command line."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=self.hint)
        try:
            if is_text:
                parser.parse_args([f"--value={value}"])
            else:
                parser.parse_object({"value": value})
        except Exception:
            return False
        return True


class _Candidate(NamedTuple):
    """A valid setting: its name on the command line and its keys in a config file."""

    parts: tuple[str, ...]
    keys: tuple[str, ...]


def find_mistake(parsers: Mapping[str, ArgumentParser], words: Sequence[str]) -> str | None:
    """Find the first mistake in a command line and its config files.

    Args:
        parsers: Parsers of the commands.
        words: The arguments, including the command.

    Returns:
        A message for the user; None if all names, classes and values are valid.
    """
    position = next((i for i, word in enumerate(words) if word in parsers), None)
    if position is None:
        return None
    command = words[position]
    parser = parsers[command]
    root = _Node(command)
    root.children = _tree(settings_of_parser(parser), parser.get_defaults(), command)
    commands = _Node("lsoftmax_lightning")
    commands.children = {name: root if name == command else _Node(name) for name in parsers}
    commands.children |= {name: _Node(name) for name in _COMMAND_LINE_ONLY}
    about_values = []
    for mistake in chain(_Search(commands).words(words[:position]), _Search(root).words(words[position + 1 :])):
        if not mistake.is_about_value:
            return mistake.text
        about_values.append(mistake.text)
    return about_values[0] if about_values else None


class _Search:
    """Search for mistakes in settings.

    Args:
        root: Group of all settings.
    """

    def __init__(self, root: _Node) -> None:
        self._root = root

    def words(self, words: Sequence[str]) -> Iterator[_Mistake]:
        """Check the arguments of a command line."""
        rest = list(words)
        while rest:
            word = rest.pop(0)
            option, equals, value = word.partition("=")
            if not re.match("--?[^-0-9.]", option):
                yield self._stray(word)
                continue
            given = value if equals else rest.pop(0) if rest and not re.match("--?[a-zA-Z]", rest[0]) else None
            yield from self._option(option, given)

    def _stray(self, word: str) -> _Mistake:
        name, equals, _ = word.partition("=")
        parts = tuple(part for part in name.split(".") if part != "init_args")
        if equals and any(candidate.parts == parts for candidate in self._candidates()):
            return _Mistake(f"{_shown(word)}: has no dashes; did you mean --{word}?")
        is_config = word.endswith((".yaml", ".yml")) or Path(CONFIGS, f"{word}.yaml").is_file()
        advice = f"did you mean --config {word}?" if is_config else "write settings as --KEY VALUE."
        return _Mistake(f"{_shown(word)}: is not a setting; {advice}")

    def _option(self, option: str, value: str | None) -> Iterator[_Mistake]:
        name = option.lstrip("-").removesuffix("+")
        if name in ("c", "config"):
            yield from self._config(option, value)
            return
        if name == "h" or name in _COMMAND_LINE_ONLY or name.endswith(".help"):
            return
        parts = [part for part in name.split(".") if part != "init_args"]
        is_class = parts[-1:] == ["class_path"]
        if is_class:
            parts.pop()
        if "dict_kwargs" in parts:
            return
        node = self._root
        for index, part in enumerate(parts):
            if node.children is None and node.bases:
                yield _Mistake(
                    f"{option}: has no class yet; give --{'.'.join(parts[:index])} CLASS before it, or a config."
                )
                return
            if node.takes_any_key():
                return
            below = (node.children or {}).get(part)
            if below is None:
                if not self._is_abbreviation(name):
                    yield self.unknown(option, parts, node)
                return
            node = below
        if not option.startswith("--"):
            yield _Mistake(f"{option}: has one dash; did you mean -{option}?")
        elif value is None:
            yield _Mistake(f"{option}: needs a value; write {option} VALUE.")
        elif is_class:
            if not node.set_class(value):
                yield _Mistake(f"{option}: {node.class_mistake(value)}")
        else:
            yield from self._text(node, option, value)

    def _is_abbreviation(self, name: str) -> bool:
        """Return whether argparse accepts a name as the abbreviation of an option."""
        options = [".".join(candidate.parts) for candidate in self._candidates() if "init_args" not in candidate.keys]
        return sum(option.startswith(name) for option in options) == 1

    def _config(self, option: str, value: str | None) -> Iterator[_Mistake]:
        if value is None:
            yield _Mistake(f"{option}: needs a value; write {option} NAME.")
            return
        try:
            path = find_config(value)
        except InputError as error:
            yield _Mistake(str(error))
            return
        yield from self._file(self._root, path)

    def _text(self, node: _Node, option: str, value: str) -> Iterator[_Mistake]:
        """Check a value of the command line."""
        if node.bases or node.children is not None:
            try:
                content = load_bounded_yaml(value)
            except (InputError, yaml.YAMLError):
                content = value
            if isinstance(content, dict | list):
                yield from _Content(self, option, {}).check(node, (), content)
                return
        yield from self.value(node, option, value, is_text=True)

    def value(self, node: _Node, place: str, value: Any, is_text: bool) -> Iterator[_Mistake]:
        """Check a value that is not a mapping of settings."""
        if node.bases and isinstance(value, str):
            if _is_file(value):
                yield from self._file(node, Path(value))
            elif not node.set_class(value) and not node.accepts(value, is_text):
                yield _Mistake(f"{place}: {node.class_mistake(value)}")
        elif node.children is not None and not node.bases:
            if isinstance(value, str) and _is_file(value):
                yield from self._file(node, Path(value))
            elif value is not None:
                yield _Mistake(f"{place}: is a group of settings, got {_shown(value)}; set one of them.")
        elif node.hint is not None and not node.accepts(value, is_text):
            yield _Mistake(f"{place}: must be {_type_name(node.hint)}, got {_shown(value)}.", is_about_value=True)

    def _file(self, node: _Node, path: Path) -> Iterator[_Mistake]:
        name = path.name if path.parent == CONFIGS else str(path)
        try:
            text = path.read_text(encoding="utf-8")
            content = load_bounded_yaml(text)
            lines = dict(_lines(yaml.compose(text, yaml.SafeLoader), ()))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            yield _Mistake(f"{name}{line}: is not valid YAML: {' '.join((error.problem or str(error)).split())}.")
        except (InputError, OSError, ValueError, yaml.YAMLError) as error:
            yield _Mistake(f"{name}: {first_line(error)}")
        else:
            if isinstance(content, dict):
                yield from _Content(self, name, lines).check(node, (), content)
            elif content is not None:
                yield _Mistake(f"{name}: must be a mapping of settings, got {_shown(content)}.")

    def unknown(self, place: str, names: Sequence[str], node: _Node) -> _Mistake:
        """Return the message about a name that is not a setting of a node.

        Args:
            place: The option, or file, line and key.
            names: Components of the name.
            node: Class or group without a setting of this name.
        """
        is_option = place.startswith("-")
        parts = [name for name in names if name != "init_args"]
        scores = {}
        for candidate in self._candidates():
            if is_option or candidate.parts[0] not in _COMMAND_LINE_ONLY:
                offer = "--" + ".".join(candidate.parts) if is_option else ".".join(candidate.keys)
                scores[offer] = _similarity(parts, candidate.parts)
        return _Mistake(f"{place}: is not a setting of {node.owner}; {_advice(scores, node)}")

    def _candidates(self) -> list[_Candidate]:
        return list(dict.fromkeys(_candidates(self._root, (), ())))


class _Content:
    """Search for mistakes in the content of a YAML file, or in an option with a YAML value.

    Args:
        search: The search, which checks values.
        name: Name of the file or the option.
        lines: Line of each key.
    """

    def __init__(self, search: _Search, name: str, lines: dict[tuple[Any, ...], int]) -> None:
        self._search, self._name, self._lines = search, name, lines

    def check(self, node: _Node, keys: tuple[Any, ...], value: Any) -> Iterator[_Mistake]:
        """Check a value and the values below it."""
        if node.bases and isinstance(value, list) and _takes_list(node.hint):
            for index, item in enumerate(value):
                yield from self.check(node, (*keys, index), item)
        elif isinstance(value, dict) and node.bases:
            yield from self._spec(node, keys, value)
        elif isinstance(value, dict) and node.children is not None:
            yield from self._group(node, keys, value)
        else:
            yield from self._search.value(node, self._place(keys), value, is_text=False)

    def _spec(self, node: _Node, keys: tuple[Any, ...], spec: dict[Any, Any]) -> Iterator[_Mistake]:
        """Check a mapping with ``class_path`` and ``init_args``, or with arguments only."""
        name = spec.get("class_path")
        if name is not None and not node.set_class(str(name)):
            yield _Mistake(f"{self._place((*keys, 'class_path'))}: {node.class_mistake(str(name))}")
            return
        if node.children is None:
            if name is None and not node.accepts(spec, is_text=False):
                expected = f"{_type_name(node.hint)}, as a mapping with class_path and init_args"
                yield _Mistake(f"{self._place(keys)}: must be {expected}, got {_shown(spec)}.", is_about_value=True)
            return
        if not spec.keys() & set(_SPEC_KEYS):
            yield from self._group(node, keys, spec)
            return
        for key in spec:
            if key in _SPEC_KEYS:
                continue
            place = self._place((*keys, key))
            if key in (node.children or {}):
                yield _Mistake(f"{place}: is an argument of {node.owner}; move it below init_args.")
            else:
                yield self._search.unknown(place, self._names((*keys, key)), node)
        arguments = spec.get("init_args")
        if isinstance(arguments, dict):
            yield from self._group(node, (*keys, "init_args"), arguments)
        elif arguments is not None:
            place = self._place((*keys, "init_args"))
            yield _Mistake(f"{place}: must be a mapping of arguments, got {_shown(arguments)}.", is_about_value=True)

    def _group(self, node: _Node, keys: tuple[Any, ...], values: dict[Any, Any]) -> Iterator[_Mistake]:
        for key, value in values.items():
            below = (node.children or {}).get(str(key))
            if below is not None:
                yield from self.check(below, (*keys, key), value)
            else:
                place = self._place((*keys, key))
                yield self._search.unknown(place, self._names((*keys, key)), node)

    def _names(self, keys: tuple[Any, ...]) -> list[str]:
        above = self._name.removeprefix("--").split(".") if self._name.startswith("--") else []
        return above + [str(key) for key in keys if not isinstance(key, int)]

    def _place(self, keys: tuple[Any, ...]) -> str:
        if self._name.startswith("--"):
            return "--" + ".".join(name for name in self._names(keys) if name not in _SPEC_KEYS)
        known = next((keys[:end] for end in range(len(keys), 0, -1) if keys[:end] in self._lines), None)
        line = f", line {self._lines[known]}" if known else ""
        return ": ".join([f"{self._name}{line}", *([".".join(map(str, keys))] if keys else [])])


def _lines(node: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield the keys below a YAML node with their lines."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*keys, index), item.start_mark.line + 1
            yield from _lines(item, (*keys, index))


def _tree(hints: Mapping[str, Any], defaults: Namespace, owner: str) -> dict[str, _Node]:
    """Return the tree of settings, by name; the settings of a group are below it."""
    root = _Node(owner)
    root.children = {}
    for name, hint in hints.items():
        node = root
        *groups, last = name.split(".")
        for group in groups:
            children = node.children = node.children if node.children is not None else {}
            node = children.setdefault(group, _Node(group))
        children = node.children = node.children if node.children is not None else {}
        children[last] = _Node(last, hint, defaults.get(name))
    return root.children


@cache
def _class_settings(kind: Any, num_passed: int) -> tuple[dict[str, Any], Namespace] | None:
    """Return the types and defaults of the arguments of a class or function; None if they are unknown."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(kind, type) else parser.add_function_arguments
    try:
        add(kind, fail_untyped=False, skip={num_passed} if num_passed else None)
    except Exception:
        return None
    return {name: hint for name, hint in settings_of_parser(parser).items() if name != "help"}, parser.get_defaults()


def _bases(hint: Any, num_passed: int = 0) -> Iterator[_Base]:
    """Yield the classes in a type whose subclasses a setting accepts."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Callable:
        passed = len(arguments[0]) if arguments and isinstance(arguments[0], list) else 0
        yield from _bases(arguments[-1], passed) if arguments else ()
    elif arguments and origin is not Literal and not (isinstance(origin, type) and issubclass(origin, Mapping)):
        for argument in arguments:
            yield from _bases(argument, num_passed)
    elif not arguments and isinstance(hint, type) and hint is not object and not issubclass(hint, _SIMPLE):
        yield _Base(hint, num_passed)


def _candidates(node: _Node, parts: tuple[str, ...], keys: tuple[str, ...]) -> Iterator[_Candidate]:
    """Yield all settings below a node."""
    children = [node.children] if node.children is not None else []
    if not children and len(parts) == 1:  # model or data without a class: use those of this package
        package = f"{__package__}."
        for path in node.class_paths():
            example = _Node("", node.hint)
            if path.startswith(package) and example.set_class(path) and example.children is not None:
                children.append(example.children)
    for group in children:
        for name, child in group.items():
            below = (*parts, name), (*keys, "init_args", name) if node.bases else (*keys, name)
            yield _Candidate(*below)
            yield from _candidates(child, *below)


def _similarity(given: Sequence[str], valid: Sequence[str]) -> float:
    """Return the similarity of two names, from 0 to 1; the last component has the largest weight."""
    if "".join(given) == "".join(valid):  # a missing or doubled dot
        return 1.0
    last = _word_similarity(given[-1], valid[-1])
    if last < _MIN_WORD_SIMILARITY:
        return 0.0
    return 0.7 * last + 0.3 * _ratio(".".join(given[:-1]), ".".join(valid[:-1]))


def _word_similarity(given: str, valid: str) -> float:
    words, others = (set(re.split("[_-]", name.lower())) for name in (given, valid))
    ratio = _ratio(given, valid)
    if words <= others or others <= words:
        return max(ratio, 0.55 + 0.4 * ratio)
    return max(ratio, 0.85) if sorted(given) == sorted(valid) else ratio


def _ratio(given: str, valid: str) -> float:
    return 1.0 if given == valid else 0.99 * SequenceMatcher(None, given.lower(), valid.lower()).ratio()


def _nearest(scores: Mapping[str, float]) -> list[str]:
    best = max(scores.values(), default=0)
    near = [name for name, score in scores.items() if score >= max(_MIN_SIMILARITY, best - _TIE)]
    return sorted(near, key=lambda name: -scores[name])[:_MAX_SUGGESTIONS]


def _advice(scores: Mapping[str, float], node: _Node) -> str:
    if near := _nearest(scores):
        return f"did you mean {_either(near)}?"
    names = sorted(node.children or {})
    if 0 < len(names) <= _MAX_LISTED:
        return f"it has {', '.join(names)}."
    return "--help lists the settings."


def _either(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value and " " not in value else repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def _type_name(hint: Any) -> str:
    """Return a readable name of a type."""
    return _either(list(dict.fromkeys(_type_names(hint))))


def _type_names(hint: Any) -> Iterator[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        yield "null"
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _type_names(argument)
    elif origin is Callable:
        yield from (base.kind.__name__ for base in _bases(hint))
    elif isinstance(hint, type) and not arguments:
        yield hint.__name__
    else:
        yield re.sub(r"[\w.]+\.(?=\w)", "", str(hint))


def _takes_list(hint: Any) -> bool:
    origin = get_origin(hint)
    is_list = isinstance(origin, type) and issubclass(list, origin)
    return is_list or (origin in (Union, UnionType) and any(map(_takes_list, get_args(hint))))
