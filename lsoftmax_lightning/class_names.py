"""Class names of any datamodule as printable strings."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

_NOT_PRINTED = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are not UTF-8, line and paragraph separators


def names_by_index(datamodule: Any) -> dict[int, str]:
    r"""Return the ``class_names`` of a datamodule by class index, each as one printable line.

    Control characters are escaped, a tab as ``\t``, for example. Classes with an empty name are omitted.

    Args:
        datamodule: Its ``class_names`` may be a sequence, an array, a tensor or a series of names of any type, or a
            mapping from index to name or from name to index.

    Example:
        >>> from types import SimpleNamespace
        >>> names_by_index(SimpleNamespace(class_names={"cat": 0, "dog": 1}))
        {0: 'cat', 1: 'dog'}
    """
    try:
        names = _by_index(getattr(datamodule, "class_names", None))
    except Exception:  # a property may raise before `setup`
        return {}
    return {index: text for index, name in names.items() if (text := _printable(name))}


def _by_index(names: Any) -> dict[int, Any]:
    if isinstance(names, Mapping):
        if all(isinstance(index, Integral) for index in names.values()) and not all(
            isinstance(name, Integral) for name in names
        ):
            return {int(index): name for name, index in names.items()}
        return {int(index): name for index, name in names.items() if str(index).isdecimal()}
    if hasattr(names, "tolist"):  # NumPy, pandas and torch
        names = names.tolist()
    if not isinstance(names, Collection) or isinstance(names, set | frozenset):  # a set has no order
        return {}
    return dict(enumerate(names))


def _printable(name: Any) -> str:
    if name is None:
        return ""
    text = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _NOT_PRINTED else character
        for character in text
    )
