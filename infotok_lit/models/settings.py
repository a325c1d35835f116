"""A family's configuration with some of its entries changed."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar


class Config(Protocol):
    """The configuration of a family: dataclasses that convert to primitives and back."""

    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self: ...


C = TypeVar("C", bound=Config)


def with_settings(config: C, settings: Mapping[str, Any]) -> C:
    """The configuration with the entries of `settings`, nested as in an exported config.json.

    Raises:
        ValueError: for an entry that there is not; the message names it.
    """
    return type(config).from_dict(_merged(config.to_dict(), settings))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], change) if nested else change
    return merged
