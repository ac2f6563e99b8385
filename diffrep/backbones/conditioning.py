"""What a network is conditioned on besides time, and what stands in when the user gives nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffrep.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from diffrep.backbones.text import PromptEncoder

# What a user may pass as `cond`.
Cond = torch.Tensor | int | str | Sequence[int] | Sequence[str] | Mapping[str, torch.Tensor] | None
# What a network is called with: named tensors, each with one row for all or one row for each sample.
Condition = dict[str, torch.Tensor]


class Conditioner(ABC):
    """Turns a user's `cond` into the named tensors that the network takes."""

    @abstractmethod
    def __call__(self, cond: Cond, batch: int, device: torch.device) -> Condition:
        """Returns the condition for a batch; its own result is accepted again.

        Raises:
            ConfigError: `cond` does not fit the network.
        """

    @abstractmethod
    def example(self) -> Condition:
        """Returns a condition for a batch of one on the meta device."""

    def release(self) -> None:  # noqa: B027 - most hold nothing
        """Frees what is needed only for conditions not seen so far."""


class Ready(dict):
    """A condition that a backbone has checked and brought to its device: looking again would mean waiting for a GPU.

    Args:
        rows: The tensors by name.
        owner: What they fit: the backbone's conditioner, device and element type.
    """

    def __init__(self, rows: Condition, owner: tuple[Conditioner, torch.device, torch.dtype]):
        super().__init__(rows)
        self.owner = owner

    def serves(self, batch: int) -> bool:
        """Tells whether there is one row for all, or one for each sample of a batch."""
        return all(len(rows) in (1, batch) for rows in self.values())


def select_rows(condition: Condition, index: Sequence[int]) -> Condition:
    """Returns the condition of chosen samples; a single row goes on serving all."""
    rows = {name: rows if len(rows) == 1 else rows[list(index)] for name, rows in condition.items()}
    return Ready(rows, condition.owner) if isinstance(condition, Ready) else rows


class Unconditional(Conditioner):
    """Networks that take nothing but time."""

    def __call__(self, cond: Cond, batch: int, device: torch.device) -> Condition:
        """Checks that nothing is given."""
        if cond is not None and not (isinstance(cond, Mapping) and not cond):
            raise ConfigError("this network is unconditional; leave cond out")
        return {}

    def example(self) -> Condition:
        """Returns nothing."""
        return {}


@dataclass(frozen=True)
class ClassLabels(Conditioner):
    """Networks with a table of class embeddings.

    Attributes:
        rows: Number of rows of the table.
        null: Row that stands for "no class"; None when the network has none, and a label must be given.
    """

    rows: int
    null: int | None

    def __call__(self, cond: Cond, batch: int, device: torch.device) -> Condition:
        """Returns `labels` (B,) int64; a single label serves the whole batch."""
        cond = _labels(cond)
        if cond is None:
            if self.null is None:
                raise ConfigError(f"this network is class-conditional; give cond, labels from 0 to {self.rows - 1}")
            return {"labels": torch.full((1,), self.null, device=device)}
        labels = _tensor(cond, f"integer labels (B,) from 0 to {self.rows - 1}", device)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1:
            raise ConfigError(f"cond must be integer labels (B,), got {labels.dtype} {tuple(labels.shape)}")
        _check_labels(labels, self.rows)
        return {"labels": _rows(labels.reshape(-1).long(), batch)}

    def example(self) -> Condition:
        """Returns one label."""
        return {"labels": torch.zeros(1, dtype=torch.int64, device="meta")}


@dataclass(frozen=True)
class OneHotLabels(Conditioner):
    """Networks that take a vector of class weights, all zeros for "no class" (EDM).

    Attributes:
        classes: Length of the vector.
    """

    classes: int

    def __call__(self, cond: Cond, batch: int, device: torch.device) -> Condition:
        """Returns `labels` (B, classes); integer labels become one-hot rows."""
        cond = _labels(cond)
        if cond is None:
            return {"labels": torch.zeros(1, self.classes, device=device)}
        form = f"one-hot labels (B, {self.classes}) or integer labels (B,)"
        labels = _tensor(cond, form, device)
        if not labels.is_floating_point() and labels.dtype != torch.bool and labels.ndim <= 1:
            _check_labels(labels, self.classes)
            labels = torch.nn.functional.one_hot(labels.reshape(-1).long(), self.classes).float()
        labels = labels[None] if labels.ndim == 1 else labels
        if labels.ndim != 2 or labels.shape[1] != self.classes:
            raise ConfigError(f"cond must be {form}, got {labels.dtype} {tuple(labels.shape)}")
        return {"labels": _rows(labels.float(), batch)}

    def example(self) -> Condition:
        """Returns no class."""
        return {"labels": torch.zeros(1, self.classes, device="meta")}


@dataclass(frozen=True)
class PromptEmbeddings(Conditioner):
    """Networks conditioned on a prompt, and on what else goes with it.

    Attributes:
        shapes: For each tensor the shape of one row, None for a free length: {"prompt_embeds": (None, 768)}.
        optional: Names of `shapes` that may be left out.
        encoder: Turns prompts into these tensors; None when only embeddings can be given.
        length: Tokens of the prompt in `example`.
    """

    shapes: dict[str, tuple[int | None, ...]]
    optional: tuple[str, ...] = ()
    encoder: PromptEncoder | None = None
    length: int = 77

    def __call__(self, cond: Cond, batch: int, device: torch.device) -> Condition:
        """Returns the tensors, named as the diffusers pipelines name them; one row serves the whole batch.

        Args:
            cond: A prompt or one for each sample (needs the encoder); the embeddings (T, C) or (B, T, C) where they
                are all the network needs; or a dict of tensors. None is the empty prompt.
            batch: Number of samples.
            device: Where the network is.
        """
        if cond is None and self.encoder is None:
            raise ConfigError(f"this network is text-conditional and has no text encoder at hand; give cond, {self}")
        if cond is None or isinstance(cond, str):
            cond = [cond or ""]
        if isinstance(cond, Sequence) and len(cond) and all(isinstance(text, str) for text in cond):
            if self.encoder is None:
                raise ConfigError(f"prompts were given and there is no text encoder at hand; give {self}")
            cond = self.encoder(list(cond), device)
        if isinstance(cond, int):
            raise ConfigError(f"cond is a label, {cond}, and this network takes prompts; give one, or {self}")
        if not isinstance(cond, Mapping):
            if self._required() != ["prompt_embeds"]:
                raise ConfigError(f"this network needs several tensors; give cond as {self}")
            cond = {"prompt_embeds": _tensor(cond, str(self), device)}
        unknown = [name for name in cond if name not in self.shapes]
        if unknown:
            raise UnknownNameError("part of cond", unknown[0], self.shapes)
        missing = [name for name in self._required() if name not in cond]
        if missing:
            raise ConfigError(f"cond lacks {', '.join(missing)}; give {self}")
        rows = {name: self._row(name, _tensor(cond[name], str(self), device), batch) for name in cond}
        lengths = {name: row.shape[1] for name, row in rows.items() if self.shapes[name][:1] == (None,)}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"cond's tensors are of prompts of different lengths, {lengths}; give {self}")
        return rows

    def __str__(self) -> str:
        parts = []
        for name, shape in self.shapes.items():
            sizes = ", ".join(["B", *("T" if size is None else str(size) for size in shape)])
            parts.append(f"{name} ({sizes})" + (" (optional)" if name in self.optional else ""))
        return "prompt embeddings: " + ", ".join(parts)

    def example(self) -> Condition:
        """Returns the required tensors, for a prompt of `length` tokens."""
        return {
            name: torch.zeros(1, *(self.length if size is None else size for size in self.shapes[name]), device="meta")
            for name in self._required()
        }

    def release(self) -> None:
        """Frees the text encoders; prompts that were encoded stay."""
        if self.encoder is not None:
            self.encoder.drop()

    def _required(self) -> list[str]:
        return [name for name in self.shapes if name not in self.optional]

    def _row(self, name: str, given: torch.Tensor, batch: int) -> torch.Tensor:
        shape = self.shapes[name]
        rows = given[None] if given.ndim == len(shape) else given
        fits = rows.ndim == len(shape) + 1 and all(
            want in (None, have) for want, have in zip(shape, rows.shape[1:], strict=True)
        )
        if not fits:
            raise ConfigError(f"cond's {name} is {tuple(given.shape)}; give {self}")
        return _rows(rows, batch)


def _labels(cond: Cond) -> Any:
    """Returns the labels in a dict; anything else as it is."""
    if not isinstance(cond, Mapping):
        return cond
    unknown = [name for name in cond if name != "labels"]
    if unknown:
        raise UnknownNameError("part of cond", unknown[0], ["labels"])
    return cond.get("labels")


def _tensor(cond: Any, form: str, device: torch.device) -> torch.Tensor:
    try:
        return torch.as_tensor(cond, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot read cond {cond!r}; give {form}") from error


def _check_labels(labels: torch.Tensor, rows: int) -> None:
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < rows):
        raise ConfigError(f"cond has labels outside 0 to {rows - 1}: {int(labels.min())} to {int(labels.max())}")


def _rows(cond: torch.Tensor, batch: int) -> torch.Tensor:
    if len(cond) not in (1, batch):
        raise ConfigError(f"cond holds {len(cond)} rows for a batch of {batch}; give 1 or {batch}")
    return cond
