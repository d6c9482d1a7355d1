"""Config files: safe reading, paths, and flat names of settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from .compat import ShortClassLists
from .config_paths import expand_path, find_config
from .errors import InputError, LSoftmaxError
from .library_messages import missing_settings

_MAX_ERROR = 300  # characters of a parser error
_MAX_NODES = 100_000  # values in a YAML file, with aliases expanded
_PATH_SETTINGS = {
    "ckpt_path",
    "default_root_dir",
    "dirpath",
    "output",
    "predict_folder",
    "root",
    "save_dir",
    "train_root",
    "warm_start",
}
_load_yaml = get_loader("yaml")


def expand_paths(settings: Any) -> None:
    """Expand ``~`` and environment variables in all paths; Lightning expands only some of them.

    Args:
        settings: A Namespace, or a list that may contain Namespaces. It is changed in place.
    """
    for item in settings if isinstance(settings, list) else []:
        expand_paths(item)
    for name, value in vars(settings).items() if isinstance(settings, Namespace) else []:
        if name in _PATH_SETTINGS and isinstance(value, str):
            setattr(settings, name, expand_path(value))
        else:
            expand_paths(value)


class ParserError(LSoftmaxError):
    """The parser rejects the settings. Not a ValueError, which jsonargparse would catch."""


class ConfigParser(LightningArgumentParser):
    """Lightning's parser; ``--config`` also accepts the name of a shipped config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults: Any = {"prog": "lsoftmax_lightning", "formatter_class": ShortClassLists}
        super().__init__(*args, **defaults | kwargs)

    @override
    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = _ConfigFile
        return super().add_argument(*args, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        names, owner = missing_settings(message)
        if names and owner:
            raise ParserError(f"{', '.join(names)}: required by {owner}, got nothing; set it in init_args.") from ex
        if names:
            names = [name.rpartition(".")[2] for name in names]
            advice = "use a config with model and data, such as --config digits.yaml."
            raise ParserError(f"{', '.join(names)}: required, got nothing; {advice}") from ex
        text = " ".join(message.split())
        raise ParserError(text if len(text) <= _MAX_ERROR else f"{text[: _MAX_ERROR - 3]}...") from ex


class _ConfigFile(ActionConfigFile):
    """Action that reads a config, and names the run after it unless the config names its logger."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_config(values)
        if cfg.get("trainer.logger.init_args.name") == "":
            cfg["trainer.logger.init_args.name"] = path.stem
        super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]


def load_bounded_yaml(text: str) -> Any:
    """Load YAML from an untrusted source.

    Raises:
        InputError: If a mapping has a key twice, or there are more than 100,000 values with aliases expanded.
    """
    content = _load_yaml(text)
    if isinstance(content, dict | list):
        _check_keys(yaml.compose(text, yaml.SafeLoader), set())
    counts: dict[int, float] = {}

    def count(node: Any) -> float:
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in counts:
            counts[id(node)] = math.inf  # while its values are counted: a node that contains itself is infinite
            counts[id(node)] = 1 + sum(map(count, node.values() if isinstance(node, dict) else node))
        return counts[id(node)]

    if count(content) > _MAX_NODES:
        raise InputError(
            f"YAML: must have at most {_MAX_NODES:,} values with aliases expanded, got more; remove aliases."
        )
    return content


def _check_keys(node: Any, seen: set[int]) -> None:
    """Reject a mapping that has a key twice; PyYAML would silently ignore the first value.

    Raises:
        InputError: If a key is repeated.
    """
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            _check_keys(item, seen)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if name in lines and key.tag != "tag:yaml.org,2002:merge":
            raise InputError(f"{key.value}: must be set once, got lines {lines[name]} and {line}; remove one.")
        lines[name] = line
        _check_keys(value, seen)


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a YAML file; None if the file is missing, empty or damaged."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if content and isinstance(content, dict) else None


def setting_name(key: str) -> str:
    """Return the name of a setting on the command line, which needs no ``init_args``."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Return nested settings by their names on the command line.

    Args:
        settings: Settings as loaded from YAML.
        path: Prefix of the names, for the recursion.

    Example:
        >>> from lsoftmax_lightning.config_files import flat
        >>> flat({"model": {"class_path": "Net", "init_args": {"width": 2}}})
        {'model.class_path': 'Net', 'model.width': 2}
    """
    if not isinstance(settings, dict) or not settings:
        return {setting_name(path).removeprefix("."): settings}
    groups = (flat(value, f"{path}.{key}") for key, value in settings.items())
    return {name: value for group in groups for name, value in group.items()}
