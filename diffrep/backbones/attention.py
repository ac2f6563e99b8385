"""Kernels of softmax attention: probed, counted, and refused with the reason when they cannot run.

Every family here ends in `torch.nn.functional.scaled_dot_product_attention`, so one switch serves all: torch's own
kernel selection for "flash", and a function mode that calls xformers in its place. The switches of diffusers reach
some classes only, and do nothing on the others without a word.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from diffrep.errors import BackendUnavailable, ConfigError, UnknownNameError

NAMES = ("auto", "sdpa", "xformers", "flash")
# How torch and xformers begin to say that a kernel does not take these tensors.
NO_KERNEL = ("No available kernel", "No operator found")


class AttentionBackend(AbstractContextManager):
    """Runs the attention inside a `with` block on one kernel.

    Args:
        name: "xformers" or "flash".

    Raises:
        BackendUnavailable: On leaving the block, in place of the kernel's refusal (of a mask, or of a head's width).
    """

    def __init__(self, name: str):
        self.name = name
        self._entered: list[AbstractContextManager] = []

    def __enter__(self) -> AttentionBackend:
        context = self.kernel()
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._entered.pop().__exit__(kind, error, trace)
        if isinstance(error, RuntimeError) and str(error).lstrip().startswith(NO_KERNEL):
            raise BackendUnavailable(
                f"attention={self.name} does not take this network's attention: {_reason(error)}; use attention=sdpa"
            ) from error

    def kernel(self) -> AbstractContextManager:
        """Returns what does the work, whose errors are its own."""
        return _Replaced(_xformers_attention) if self.name == "xformers" else _flash()


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend | None:
    """Returns the kernel, or None for torch's own choice ("auto" and "sdpa").

    Raises:
        BackendUnavailable: The kernel cannot run here; the message says why.
        UnknownNameError: There is no such kernel.
    """
    if name not in NAMES:
        raise UnknownNameError("attention backend", name, NAMES)
    if name in ("auto", "sdpa"):
        return None
    if name == "xformers":
        _need_xformers(device)
    backend = AttentionBackend(name)
    # What the package says of itself is not enough: wheels without kernels import well and fail in the first call.
    probe = torch.zeros(1, 2, 16, 32, device=device, dtype=dtype)
    try:
        with torch.no_grad(), backend.kernel():
            scaled_dot_product_attention(probe, probe, probe)
    except (RuntimeError, ValueError) as error:
        raise BackendUnavailable(
            f"attention={name} cannot run on {device} in {str(dtype).removeprefix('torch.')}: {_reason(error)}; "
            "use attention=sdpa"
        ) from error
    return backend


def count_attention(network: torch.nn.Module, forward: Any) -> int:
    """Returns how many softmax attentions one forward pass runs, for the check that a backend changes anything."""
    counter = _Counter()
    with torch.no_grad(), counter:
        forward(network)
    return counter.calls


class _Counter(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


class _Replaced(TorchFunctionMode):
    """Calls another function wherever softmax attention is called."""

    def __init__(self, attention: Callable[..., torch.Tensor]):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self.attention if function is scaled_dot_product_attention else function
        return function(*args, **(kwargs or {}))


@contextmanager
def _flash() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), _Replaced(_flash_attention):
        yield


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
) -> torch.Tensor:
    return scaled_dot_product_attention(*map(_rows, (query, key, value)), *args, **options)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    # The kernels read whole rows; networks that keep channels before places (EDM) hand over transposed ones.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _xformers_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    if is_causal or enable_gqa or dropout_p or query.ndim not in (3, 4):
        raise ConfigError(
            "causal, grouped or dropped-out attention, and any but (B, heads, N, d) and (B, N, d), has no form in "
            "xformers here; use attention=sdpa"
        )
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    headless = query.ndim == 3
    if headless:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    # torch has (B, heads, N, d), xformers (B, N, heads, d).
    rows = (_rows(tensor.transpose(1, 2)) for tensor in (query, key, value))
    out = memory_efficient_attention(*rows, attn_bias=bias, scale=scale).transpose(1, 2)
    return out.squeeze(1) if headless else out


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Returns a mask of torch's, boolean or added, as xformers takes it: (B, heads, N, K)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    # Its kernels load eight numbers at a time, so each row starts at a multiple of eight in memory.
    length = key.shape[-2]
    rows = mask.expand(*mask.shape[:-1], length).contiguous()
    mask = torch.nn.functional.pad(rows, (0, -length % 8))[..., :length].expand(*query.shape[:-1], length)
    return mask.unsqueeze(1) if query.ndim == 3 else mask


def _reason(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300)


def _need_xformers(device: torch.device) -> None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"attention=xformers: xformers cannot be imported ({error}); pip install 'diffrep[xformers]', or use "
            "attention=sdpa"
        ) from error
    if device.type != "cuda":
        raise BackendUnavailable(f"attention=xformers needs a GPU and the network is on {device}; use attention=sdpa")
