"""Errors that diffrep raises on purpose. Each message says what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffrepError(Exception):
    """Base of all errors below; the command prints it without a traceback and exits with status 2."""


class ConfigError(DiffrepError):
    """A setting or argument is wrong; raised before any work is done."""


class UnknownNameError(ConfigError):
    """A name is not among the known ones; the message lists the closest.

    Args:
        what: Kind of thing that was looked up, for example "backbone".
        name: The name that was given.
        known: All names that exist.
        hint: One more sentence, such as the command that lists them.
    """

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = ""):
        super().__init__(" ".join(filter(None, [f"unknown {what} {name!r}; {suggest(name, list(known))}", hint])))


class LayerError(DiffrepError):
    """A layer address does not exist, cannot be read, or did not fire in the forward pass."""


class CheckpointError(DiffrepError):
    """A checkpoint is missing, truncated, or does not fit the network."""


class DataError(DiffrepError):
    """An image, a label or a whole data set cannot be read."""


class StoreError(DiffrepError):
    """A feature store is missing, incomplete, damaged, or was made by another request."""


class BackendUnavailable(DiffrepError):
    """An optional package or a device is needed and not there."""


class Stopped(DiffrepError):
    """A signal ended the work before it was complete; what was finished stays. The command exits with status 143."""


def suggest(name: str, known: list[str], first: int = 12) -> str:
    """Returns "did you mean ..." with the closest of `known`, or the first few of them when none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:first]) + (f", ... ({len(known)} in all)" if len(known) > first else "")
    return f"known: {shown or 'none'}."


def printable(text: str) -> str:
    """Returns a text that may come from anybody without what a terminal would obey or cannot show."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
