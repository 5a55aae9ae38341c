"""A field of the configuration is a flag: its help, its bounds, its aliases, and what a resumed run may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from ..bounds import Bound, Interval


@dataclass(frozen=True)
class Flag:
    """What a field says of its flag."""

    help: str  # what it does; the range and the default are added
    bound: Bound | None = None  # what it takes; None for a switch
    aliases: tuple[str, ...] = ()  # other names of the flag
    name: str = ""  # the flag's, if it is not the field's
    free: bool = False  # whether a resumed run may change it
    is_path: bool = False  # whether its value may be a path of this machine, which others must not see
    is_list: bool = False  # whether several values may follow it


def flag(default: Any, help: str, bound: Bound | None = None, *aliases: str, **options: Any) -> Any:
    """A field with a `Flag`; its default, a function that finds it, or None where it depends on other flags."""
    metadata = {"flag": Flag(help, bound, aliases, **options)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A field of the configuration with its flag."""

    name: str
    flag: Flag
    field: Field[Any]

    @property
    def option(self) -> str:
        """The flag as it is typed."""
        return f"--{self.flag.name or self.name}"

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the flag, without dashes."""
        return (self.flag.name or self.name, *(alias.removeprefix("--") for alias in self.flag.aliases))

    @property
    def default(self) -> Any:
        """The default; None where it depends on other flags."""
        factory: Callable[[], Any] | Any = self.field.default_factory
        return self.field.default if factory is MISSING else factory()

    @property
    def is_repeatable(self) -> bool:
        """Whether the flag takes several values."""
        return bool(self.default == ())

    @property
    def kinds(self) -> tuple[type, ...]:
        """The types that the value has in JSON."""
        bound, empty = self.flag.bound, (type(None),) if self.default in (None, ()) else ()
        if self.is_repeatable:
            return (list, *empty)
        if isinstance(bound, Interval):
            return (int if bound.whole else float, *empty)
        return (bool, *empty) if bound is None else (*bound.kinds, *empty)

    def checked(self, value: Any) -> Any:
        """A value of a file, of Python or of the command line as the field holds it; ValueError if it is none."""
        if self.is_repeatable:
            return tuple(self._checked(one) for one in ([value] if isinstance(value, str | float | int) else value))
        return self._checked(value)

    def _checked(self, value: Any) -> Any:
        bound = self.flag.bound
        if bound is None:
            if not isinstance(value, bool):
                raise ValueError(f"{self.option} is {value}; it must be true or false.")
            return value
        try:
            value = bound.parse(str(value))
        except Exception as error:  # argparse's, which is no ValueError
            raise ValueError(f"{self.option}: {error}.") from error
        problem = bound.problem(value)
        if problem:
            raise ValueError(f"{self.option} {problem}.")
        return value


def settings_of(subject: type) -> list[Setting]:
    """The fields of a subject's dataclass."""
    return [Setting(each.name, each.metadata["flag"], each) for each in fields(subject)]
