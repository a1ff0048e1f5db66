"""One JSON object of options: reading them one by one, and refusing what nobody has read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from protos.errors import UnsupportedModel

_T = TypeVar("_T")


class Options:
    """An object of options at `path` in `file`, and which of its keys have been understood."""

    def __init__(self, values: Any, *, path: str, file: Path) -> None:
        """
        Raises:
            UnsupportedModel: `values` is not an object.
        """
        self._path = path
        self._file = file
        self._known: set[str] = set()
        if not isinstance(values, Mapping):
            raise UnsupportedModel(f"{file}: {path} is {_shown(values)} (supported: an object)")
        self._values = values

    def value(self, key: str) -> Any:
        """The value of `key`, from now on understood; None where it is absent or null."""
        self._known.add(key)
        return self._values.get(key)

    def is_null(self, key: str) -> bool:
        """Whether `key` is there and null, from now on understood."""
        return self.value(key) is None and key in self._values

    def one_of(self, key: str, supported: Sequence[_T], *, default: _T | None = None) -> _T:
        """The value of `key` among `supported`, strings in any case; `default` where it is absent, if there is one."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        folded = value.lower() if isinstance(value, str) else value
        for candidate in supported:
            if type(candidate) is type(folded) and candidate == folded:  # True is not 1
                return candidate
        raise self.refusal(key, ", ".join(_shown(candidate) for candidate in supported))

    def group_size(self, key: str, *, default: int | None = None) -> int:
        """How many columns share a scale; 0 for all of them (stored as -1)."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or (value < 1 and value != -1):
            raise self.refusal(key, "a positive number, or -1 for all columns")
        return 0 if value == -1 else value

    def block(self, key: str) -> tuple[int, int]:
        """The rows and columns that share a scale."""
        value = self.value(key)
        if not isinstance(value, list) or [type(size) for size in value] != [int, int] or min(value) < 1:
            raise self.refusal(key, "[rows, columns]")
        return value[0], value[1]

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, or of such lists, in one."""
        value = self.value(key)
        names = tuple(_flat(value))
        if not isinstance(value, list | None) or not all(isinstance(name, str) and name for name in names):
            raise self.refusal(key, "a list of names")
        return names

    def section(self, key: str) -> "Options":
        """The object at `key`; an empty one where it is absent."""
        value = self.value(key)
        return Options({} if value is None else value, path=f"{self._path}.{key}", file=self._file)

    def sections(self) -> list[tuple[str, "Options"]]:
        """Every value, each an object, by key."""
        return [(key, self.section(key)) for key in self._values]

    def ignore(self, keys: Iterable[str]) -> None:
        """Understand `keys` without looking at them: no weight depends on them."""
        self._known.update(keys)

    def expression(self, key: str, pattern: str) -> str:
        """A regular expression that comes from `key`, if it is one."""
        try:
            re.compile(pattern)
        except re.error as err:
            raise self.refusal(key, f"regular expressions; {err} in {pattern!r}") from err
        return pattern

    def refusal(self, key: str, supported: str) -> UnsupportedModel:
        """The error that refuses the value of `key`."""
        value = self._values.get(key)
        what = "missing" if value is None else _shown(value)
        return UnsupportedModel(f"{self._file}: {self._path}.{key} is {what} (supported: {supported})")

    def refuse_unknown(self) -> None:
        """Raise UnsupportedModel for a key that nobody has asked for, unless its value is null."""
        for key, value in self._values.items():
            if key not in self._known and value is not None:
                raise UnsupportedModel(
                    f"{self._file}: {self._path}.{key} is {_shown(value)}, an option that is not understood "
                    f"(supported: {', '.join(sorted(self._known))})"
                )


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return []
    return [name for item in value for name in (_flat(item) if isinstance(item, list) else [item])]


def _shown(value: Any) -> str:
    """JSON's spelling of the simple values, cut to a line."""
    spelled = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return spelled or repr(value)[:200]
