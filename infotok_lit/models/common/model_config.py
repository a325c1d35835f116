"""What the configurations of all families have in common."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar, Self, get_type_hints

from infotok_lit.errors import SettingsError


class ModelConfig:
    """The base of a family's configuration: a frozen dataclass of primitives, tuples, and dataclasses of these."""

    title: ClassVar[str]
    """The family's name in messages."""

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of to_dict.

        Raises:
            SettingsError: for an unknown or missing entry, which the message names.
        """
        try:
            return _build(cls, values)
        except TypeError as error:
            raise SettingsError(f"this does not describe a model of {cls.title}: {error}") from error

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same with the entries of `settings`, nested as in an exported config.json.

        Raises:
            SettingsError: for an entry that there is not; the message names it.
        """
        return self.from_dict(_merged(self.to_dict(), settings))


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from primitives; TypeError for what it does not have."""
    hints = get_type_hints(kind)
    parts = {field.name for field in fields(kind) if is_dataclass(hints[field.name])}
    built = dict(values)
    for name, value in values.items():
        if isinstance(value, list):
            built[name] = tuple(value)
        if name in parts:
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} is {value!r}, where entries with values are expected")
            built[name] = _build(hints[name], value)
    return kind(**built)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], change) if nested else change
    return merged
