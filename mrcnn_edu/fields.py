"""What every class of a configuration does: check its values when they are set, go to JSON and come back.

Chapter 12 (the whole model).

A mistake is reported where it was made, with the nearest right name where a name is wrong.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def lookup(kind: str, table: dict[str, Any], name: str) -> Any:
    """``table[name]``, or a ValueError that names what there is and what was probably meant."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(table)}")


def require(condition: bool, config: Any, name: str, allowed: str) -> None:
    """A ValueError that names the field, what it may be and what it is, unless the condition holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}.{name} must be {allowed}, got {getattr(config, name)!r}")


def check_types(config: Any) -> None:
    """Each field must hold what its annotation says; a type checker knows, a JSON file or a notebook does not."""
    for name, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(hint)
        if _fits(value, hint):
            continue
        if get_origin(hint) is Literal:
            require(all(isinstance(c, str) for c in choices), config, name, " or ".join(map(str, choices)))
            lookup(f"{type(config).__name__}.{name}", {c: c for c in choices}, str(value))
        wanted = re.sub(r"mrcnn_edu\.\w+\.", "", hint.__name__ if isinstance(hint, type) else str(hint))
        raise TypeError(f"{type(config).__name__}.{name} must be {wanted}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Is this a value of that type? A whole number is a float as well, True is no number, a list no tuple."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is not None:  # one of several
        return any(_fits(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings and numbers."""
    return asdict(config)


def from_json(kind: type, values: dict[str, Any], place: str = "config") -> Any:
    """The config dataclass ``kind`` out of ``to_json``'s dict; unknown names are refused with the nearest right one."""
    if not isinstance(values, dict):
        raise TypeError(f"{place} must be an object with the fields of {kind.__name__}, got {type(values).__name__}")
    known = {f.name: f for f in fields(kind)}
    hints, arguments = get_type_hints(kind), {}
    for name, value in values.items():
        lookup(f"field of {place}", known, name)
        nested = _nested(hints[name])
        if nested is not None and value is not None:
            arguments[name] = from_json(nested, value, f"{place}.{name}")
        else:
            arguments[name] = _tuples(value)
    return kind(**arguments)


def _nested(hint: Any) -> type | None:
    """The config class that a field holds, if it holds one."""
    return next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
