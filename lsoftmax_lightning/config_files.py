"""Config files: how they are read, and the names of the settings in them."""

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

_MAX_ERROR = 300  # characters of an error of the parser
_MAX_NODES = 100_000  # of a YAML text, with each alias replaced by its value
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
    """Expand the paths in settings: Lightning expands some of them, and writes to two folders.

    Args:
        settings: A Namespace, or a list that may contain some. It is changed in place.
    """
    for item in settings if isinstance(settings, list) else []:
        expand_paths(item)
    for name, value in vars(settings).items() if isinstance(settings, Namespace) else []:
        if name in _PATH_SETTINGS and isinstance(value, str):
            setattr(settings, name, expand_path(value))
        else:
            expand_paths(value)


class ParserError(LSoftmaxError):
    """The parser does not take the settings; it is no ValueError, which jsonargparse would catch."""


class ConfigParser(LightningArgumentParser):
    """Lightning's parser, whose ``--config`` also takes the names of shipped configs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults: Any = {"prog": "lsoftmax_lightning", "formatter_class": ShortClassLists}
        super().__init__(*args, **defaults | kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; replace the action of config files."""
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
            advice = "name a config that has model and data, as in --config digits.yaml."
            raise ParserError(f"{', '.join(names)}: required, got nothing; {advice}") from ex
        text = " ".join(message.split())
        raise ParserError(text if len(text) <= _MAX_ERROR else f"{text[: _MAX_ERROR - 3]}...") from ex


class _ConfigFile(ActionConfigFile):
    """Reads a config; its name is that of the run unless the config has a logger of its own."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_config(values)
        if cfg.get("trainer.logger.init_args.name") == "":
            cfg["trainer.logger.init_args.name"] = path.stem
        super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]


def load_bounded_yaml(text: str) -> Any:
    """Load YAML from an untrusted source.

    Raises:
        InputError: If a mapping has a key twice, or the values would be more than 100,000, or endless, with each alias
            replaced by its value.
    """
    content = _load_yaml(text)
    if isinstance(content, dict | list):
        _check_keys(yaml.compose(text, yaml.SafeLoader), set())
    counts: dict[int, float] = {}

    def count(node: Any) -> float:
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in counts:
            counts[id(node)] = math.inf  # until it is counted: a node that contains itself has no end
            counts[id(node)] = 1 + sum(map(count, node.values() if isinstance(node, dict) else node))
        return counts[id(node)]

    if count(content) > _MAX_NODES:
        raise InputError(f"the YAML has more than {_MAX_NODES:,} values once its aliases are replaced; write it out.")
    return content


def _check_keys(node: Any, seen: set[int]) -> None:
    """Refuse a mapping that has a key twice: PyYAML drops the first without a word."""
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
            raise InputError(f"{key.value}: must be in a mapping once, got lines {lines[name]} and {line}; remove one.")
        lines[name] = line
        _check_keys(value, seen)


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a YAML file; None if the file is missing, empty or damaged."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if content and isinstance(content, dict) else None


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Return settings by their names on the command line.

    Args:
        settings: As YAML has them.
        path: The name of these among others.
    """
    if not isinstance(settings, dict) or not settings:
        return {path.replace(".init_args", "").removeprefix("."): settings}
    parts = (flat(value, f"{path}.{key}") for key, value in settings.items())
    return {name: value for part in parts for name, value in part.items()}
