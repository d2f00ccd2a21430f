"""Settings as frozen dataclasses: their fields are the command line's flags and a run's JSON."""

import argparse
import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def option(default: Any, help: str) -> Any:
    """A field with its default and the line that ``--help`` prints."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Declares a flag for each field; one that is not given leaves no trace in the namespace."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = "" if field.default is None else f" (default {field.default})"
        flag = "--" + field.name.replace("_", "-")
        said = {"default": argparse.SUPPRESS, "help": field.metadata.get("help", "") + default}
        hint = _without_none(hints[field.name])
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **said)
        elif get_origin(hint) is Literal:
            parser.add_argument(flag, choices=get_args(hint), **said)
        else:
            parser.add_argument(flag, type=hint, metavar=_METAVARS[hint], **said)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(a for a in get_args(hint) if a is not type(None))
    return hint


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields whose flags were on the command line."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


def from_fields(kind: type[T], fields: Mapping[str, Any]) -> T:
    """The dataclass from JSON's fields.

    Raises:
        ValueError: A name that is no field.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown field {unknown[0]!r}")
    return kind(**fields)


def from_words(kind: type, words: Sequence[str], flag: str) -> dict[str, Any]:
    """Fields out of words such as ``n_layer=4``, ``bias=true``, ``window=none``.

    Raises:
        ValueError: Not of that form, a name that is no field, or a value that is not of its type.
    """
    hints, found = get_type_hints(kind), {}
    for word in words:
        name, _, text = word.partition("=")
        if not text:
            raise ValueError(f"{flag} must be like NAME=VALUE; got {word!r}")
        if name not in hints:
            raise ValueError(f"{flag} must name one of {', '.join(hints)}; got {name!r}")
        found[name] = _value(hints[name], text, f"{flag} {name}")
    return found


def _value(hint: Any, text: str, what: str) -> Any:
    if text.lower() == "none" and type(None) in get_args(hint):
        return None
    hint = _without_none(hint)
    choices = {"true": True, "false": False} if hint is bool else {c: c for c in get_args(hint)}
    if choices:
        if text.lower() not in choices:
            raise ValueError(f"{what} must be one of {', '.join(choices)}; got {text!r}")
        return choices[text.lower()]
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{what} must be {hint.__name__}; got {text!r}") from None
