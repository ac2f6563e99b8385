"""Attention maps: the softmax weights of one attention module, averaged over its heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffrep.errors import LayerError
from diffrep.taps.address import Address
from diffrep.taps.outputs import Joined, input_stream, kinds

# Scores are made for as many queries at a time as keep them under this many numbers (64 MiB in fp32).
SCORES_AT_ONCE = 1 << 24

# Attention processors of diffusers that put text and image in one sequence -> whether the text comes first. Of all
# others the order is not known, and they are refused.
TEXT_FIRST = {
    "JointAttnProcessor2_0": False,
    "FusedJointAttnProcessor2_0": False,
    "FluxAttnProcessor": True,
    "AttnAddedKVProcessor2_0": True,
}


class AttentionMaps(TorchFunctionMode):
    """Reads attention maps on the way, as a context around a forward pass.

    The map of a module is (B, N, K) in fp32: how much each image token looks at each key token, as softmax weights
    averaged over the heads. Rows sum to 1 where the keys are all there are. Which keys:

    - self-attention: the image tokens;
    - cross-attention: the text tokens;
    - joint attention of text and image (SD3, and both kinds of Flux block): the text tokens, index 0 the first. The
      softmax runs over text and image, so rows sum to the share that goes to the text. SD3 orders a sequence
      [image, text], Flux [text, image].

    While a named module runs, calls of `F.scaled_dot_product_attention` are seen here before they run, with queries
    and keys already normalised and rotated. The weights are worked out beside the network, one head and a few queries
    at a time, and only the wanted columns of their running mean are kept, so a map for every head is never held. The
    call then runs as it would have, so that the network's output stays the same to the bit. A module that attends
    several times in one call (IP-adapters) is read at the first.

    Not for functions under `torch.compile`.

    Args:
        keep: Takes the index of an address and its map; may raise to end the pass.
    """

    def __init__(self, keep: Callable[[int, torch.Tensor], None]):
        super().__init__()
        self._keep = keep
        self._inside = False
        self._running: list[_Running] = []
        self._seen: set[str] = set()

    def hooks(
        self, path: str, module: nn.Module, wanted: Sequence[tuple[int, Address]], joined: Joined | None
    ) -> list[Callable[[], Any]]:
        """Makes the hooks of one attention module.

        Args:
            path: Its address.
            module: The module.
            wanted: Indices and addresses of the maps to read from it.
            joined: The block around it that joins text and image, if there is one.

        Returns:
            Functions that put the hooks on the module and return their handles.
        """

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside:
                call = _Running(path, wanted, len(input_stream(args, kwargs, path)), done=path in self._seen)
                call.image, call.text, call.text_first = _tokens(path, module, args, kwargs, joined)
                self._running.append(call)

        def end(*_: Any) -> None:
            if self._inside and not self._running.pop().done:
                raise LayerError(
                    f"no softmax attention ran in {path!r}: linear attention has no map; with another attention "
                    "backend use attention=sdpa"
                )

        return [
            partial(module.register_forward_pre_hook, begin, with_kwargs=True),
            partial(module.register_forward_hook, end),
        ]

    def __enter__(self) -> AttentionMaps:
        self._inside, self._running, self._seen = True, [], set()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._running and not self._running[-1].done:
            call = self._running[-1]
            call.done = True
            self._seen.add(call.path)
            for index, weights in call.maps(*args, **kwargs):
                self._keep(index, weights)
        return func(*args, **kwargs)


def _tokens(
    path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], joined: Joined | None
) -> tuple[int, int | None, bool | None]:
    """Returns how many image and text tokens a call of an attention module has, and whether the text comes first."""
    if joined is not None:
        return joined.total - joined.text, joined.text, True
    hidden = input_stream(args, kwargs, path)
    image = hidden.shape[1] if hidden.ndim == 3 else hidden[0, 0].numel()
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    text = kwargs.get("encoder_hidden_states", given.get("encoder_hidden_states"))
    text = text[0] if isinstance(text, tuple) else text  # IP-adapters bring (text, image prompts)
    order = [TEXT_FIRST[kind] for kind in kinds(getattr(module, "processor", None)) if kind in TEXT_FIRST]
    return image, None if text is None else text.shape[1], order[0] if order else None


@dataclass
class _Running:
    """A named attention module while it runs; `text` is None where it is not given any."""

    path: str
    wanted: Sequence[tuple[int, Address]]
    batch: int
    image: int = 0
    text: int | None = None
    text_first: bool | None = None
    done: bool = False

    def maps(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> list[tuple[int, torch.Tensor]]:
        """Works out all wanted maps; arguments as `F.scaled_dot_product_attention` has them."""
        queries, keys = self._spans(query, key)
        if attn_mask is not None:
            attn_mask = self._by_head(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
        columns = self._columns(len(keys))
        weights = mean_weights(
            self._by_head(query), self._by_head(key), queries, [keys[c] for c in columns], attn_mask, is_causal, scale
        )
        place = {column: i for i, column in enumerate(columns)}
        return [
            (index, weights[:, :, [place[token] for token in address.tokens]] if address.tokens else weights)
            for index, address in self.wanted
        ]

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns (B, heads, N, d) of (B, heads, N, d) or of (B * heads, N, d)."""
        if tensor.ndim == 3 and len(tensor) % self.batch == 0:
            tensor = tensor.unflatten(0, (self.batch, -1))
        if tensor.ndim != 4 or len(tensor) != self.batch:
            raise LayerError(
                f"layer '{self.path}:attention': attention over {tuple(tensor.shape)} in a batch of {self.batch}; "
                "only (B, heads, N, C) and (B * heads, N, C) can be read"
            )
        return tensor

    def _spans(self, query: torch.Tensor, key: torch.Tensor) -> tuple[range, range]:
        """Returns which positions of the query and key sequences are the image's queries and the wanted keys."""
        lengths = (query.shape[-2], key.shape[-2])
        if self.text is None or lengths == (self.image, self.text):
            return range(lengths[0]), range(lengths[1])
        both = self.image + self.text
        if lengths[1] != both or lengths[0] not in (self.image, both) or self.text_first is None:
            raise LayerError(
                f"layer '{self.path}:attention': {lengths[0]} queries attend to {lengths[1]} keys, for {self.image} "
                f"image and {self.text} text tokens, in an order that is not known; joint attention is read of the "
                f"processors {', '.join(TEXT_FIRST)}"
            )
        before_image, before_text = (self.text, 0) if self.text_first else (0, self.image)
        start = before_image if lengths[0] == both else 0
        return range(start, start + self.image), range(before_text, before_text + self.text)

    def _columns(self, keys: int) -> list[int]:
        for _, address in self.wanted:
            if max(address.tokens, default=0) >= keys:
                raise LayerError(f"layer {str(address)!r}: there are {keys} key tokens; indices are 0 to {keys - 1}")
        if all(address.tokens for _, address in self.wanted):
            return sorted({token for _, address in self.wanted for token in address.tokens})
        return list(range(keys))


@torch.no_grad()
def mean_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    queries: range,
    columns: list[int],
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    at_once: int = SCORES_AT_ONCE,
) -> torch.Tensor:
    """Averages softmax(scale * q k^T + mask) over heads, in fp32, as `F.scaled_dot_product_attention` defines it.

    Args:
        query: (B, heads, Nq, C).
        key: (B, key heads, Nk, C); heads are shared evenly where there are fewer.
        queries: Positions whose rows are wanted.
        columns: Positions of the keys whose weights are wanted.
        mask: (B, heads, Nq, Nk), False or -inf where a query does not see a key.
        causal: Query i sees keys 0 to i.
        scale: None stands for C ** -0.5.
        at_once: Most scores to hold at a time.

    Returns:
        (B, len(queries), len(columns)); zeros for a query that sees no key.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = torch.tensor(columns, device=query.device)
    keys = torch.arange(key.shape[2], device=query.device)
    step = max(1, at_once // (len(query) * key.shape[2]))
    means = []
    with _no_autocast(query.device.type):
        for start in range(queries.start, queries.stop, step):
            rows = slice(start, min(start + step, queries.stop))
            total = query.new_zeros(len(query), rows.stop - rows.start, len(columns), dtype=dtype)
            for head in range(heads):
                scores = query[:, head, rows].to(dtype) * scale @ key[:, head // shared].to(dtype).mT
                if causal:
                    later = keys > torch.arange(rows.start, rows.stop, device=query.device)[:, None]
                    scores.masked_fill_(later, -torch.inf)
                if mask is not None and mask.dtype == torch.bool:
                    scores.masked_fill_(~mask[:, head, rows], -torch.inf)
                elif mask is not None:
                    scores += mask[:, head, rows]
                blind = (scores == -torch.inf).all(-1, keepdim=True)
                total += scores.softmax(-1).masked_fill_(blind, 0).index_select(2, chosen)
            means.append(total / heads)
    return torch.cat(means, 1)


def _no_autocast(device: str) -> Any:
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
