"""YAML files and `key=value` overrides -> one validated config, with every error in one message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError
from yaml import YAMLError

from diffrep.config.schema import Section
from diffrep.errors import ConfigError, suggest

T = TypeVar("T", bound=Section)


def load_config(schema: type[T], files: list[str | Path] = (), overrides: list[str] = ()) -> T:
    """Merges files, then overrides (later ones win), and validates.

    Args:
        schema: Section to validate against.
        files: YAML files. A `base:` key (a path or a list, relative to the file) names files that come before it.
        overrides: Dotted `key=value` words; values are YAML, so `levels=[1,10]` is a list.

    Raises:
        ConfigError: A file cannot be read, or any keys or values are wrong; all of them are in the message.
    """
    merged = OmegaConf.create({})
    for file in files:
        merged = _merge(merged, _read(schema, Path(file), ()), str(file))
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read the override {word!r}; write key=value, for example batch_size=32")
        try:
            given = OmegaConf.from_dotlist([word])
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"cannot read the override {word!r}: {_first_line(error)}") from error
        merged = _merge(merged, _spread_bare_values(schema, given), f"the override {word!r}")
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve the config: {_first_line(error)}") from error
    return validate(schema, plain, ", ".join(str(f) for f in files) or "arguments")


def validate(schema: type[T], values: dict[str, Any], where: str = "arguments") -> T:
    """Validates plain values.

    Raises:
        ConfigError: With one line for each wrong key or value.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for one in error.errors(include_url=False):
            place, message = _explain(schema, one)
            found.setdefault(place, []).append(message)
        count = f"{len(found)} error{'s' if len(found) > 1 else ''}"
        # Several messages at one place are the members of a union: any of them would do.
        lines = [f"  - {place}: {', or '.join(dict.fromkeys(messages))}" for place, messages in found.items()]
        raise ConfigError(f"{count} in {where}:\n" + "\n".join(lines)) from None


def to_plain(config: Any) -> Any:
    """Returns a config or a `FeatureRequest` as plain dicts and lists."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Any) -> str:
    """Returns a config, or plain values, as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(config if isinstance(config, dict) else to_plain(config)))


def digest(value: Any) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read(schema: type[Section], file: Path, open_files: tuple[Path, ...]) -> DictConfig:
    if file.resolve() in open_files:
        raise ConfigError(f"{file}: its base files lead back to itself")
    try:
        node = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no config file {str(file)!r}") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {file}: {_first_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{file}: expected keys and values, got a list")
    bases = node.pop("base", [])
    merged = OmegaConf.create({})
    for base in [bases] if not isinstance(bases, ListConfig) and bases != [] else bases:
        if not isinstance(base, str):
            raise ConfigError(f"{file}: base must be a path or a list of paths, got {base!r}")
        above = _read(schema, file.parent / base, (*open_files, file.resolve()))
        merged = _merge(merged, above, str(file))
    return _merge(merged, _spread_bare_values(schema, node), str(file))


def _merge(first: DictConfig, second: DictConfig, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(first, second)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"cannot merge {where}: {_first_line(error)}") from error


def _spread_bare_values(schema: Any, node: DictConfig) -> DictConfig:
    """Turns `data: PATH` into `data: {path: PATH}` before merging, so that it keeps the section's other keys."""
    fields = _fields(schema)
    for key in list(node):
        if key in fields:
            node[key] = _spread(fields[key].annotation, _value(node, key))
    return node


def _spread(annotation: Any, value: Any) -> Any:
    sections = _sections(annotation)
    if not sections:
        return value
    if _is_named(annotation):
        if isinstance(value, DictConfig):
            for name in list(value):
                value[name] = _spread(sections[0], _value(value, name))
        return value
    if isinstance(value, DictConfig):
        return _spread_bare_values(sections[0], value)
    main = getattr(sections[0], "main_field", None)
    return {main: value} if isinstance(value, str) and main else value


def _value(node: DictConfig, key: Any) -> Any:
    return node._get_node(key) if OmegaConf.is_interpolation(node, key) else node[key]


def _fields(schema: Any) -> dict[str, Any]:
    return getattr(schema, "model_fields", None) or getattr(schema, "__pydantic_fields__", {})


def _sections(annotation: Any) -> list[Any]:
    """Returns the schemas that an annotation allows: itself, the members of a union, the values of a dict or list."""
    if isinstance(annotation, type) and hasattr(annotation, "__pydantic_fields__"):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _is_named(annotation: Any) -> bool:
    """Tells whether an annotation is a dict of sections under names of the user's choice."""
    parts = (annotation, *get_args(annotation))
    return any(get_origin(part) is dict for part in parts)


def _explain(schema: type[Section], error: dict[str, Any]) -> tuple[str, str]:
    where, there = _walk(schema, [part for part in error["loc"] if not _is_union_tag(part)])
    place = ".".join(str(part) for part in where) or "config"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        _, above = _walk(schema, error["loc"][:-1])
        return place, f"unknown key; {suggest(str(where[-1]), _known_keys(above), first=30)}"
    if error["type"] == "missing":
        return place, "required and not given"
    kinds = [kind for kind in map(_kind, there) if kind]
    if error["type"] == "union_tag_invalid":
        return f"{place}.kind", f"unknown kind; {suggest(error['ctx']['tag'], kinds)}"
    given = error.get("input")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("union_tag_not_found", "model_attributes_type") and kinds:
        message = f"give {place}.kind: {', '.join(kinds[:-1])} or {kinds[-1]}"
    return place, message if isinstance(given, (dict, BaseModel)) else f"{message} (got {given!r})"


def _walk(schema: Any, path: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Follows a location of pydantic's; returns it without the kinds of unions, and the schemas that fit there."""
    place, there = [], [schema]
    for part in path:
        of_kind = [one for one in there if len(there) > 1 and _kind(one) == part]
        if of_kind:
            there = of_kind
            continue
        place.append(part)
        # Names inside a dict of sections, such as trained.NAME, are the user's own: the section stays.
        there = next((_sections(_fields(one)[part].annotation) for one in there if part in _fields(one)), there)
    return place, there


def _kind(section: Any) -> str | None:
    """Returns what tells a member of a union from the others."""
    return _fields(section)["kind"].default if "kind" in _fields(section) else None


def _known_keys(sections: list[Any]) -> list[str]:
    return list(dict.fromkeys(name for section in sections for name in _fields(section)))


def _is_union_tag(part: Any) -> bool:
    # pydantic puts the tried member of a union into the location: literal['none','mean'], constrained-int, ...
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-", "dict[", "function-", "tuple["))
        or part in ("int", "float", "str")
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
