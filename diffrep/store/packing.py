"""Tensors as the bytes of a safetensors file, without a copy of them in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import torch
import xxhash

from diffrep.errors import StoreError
from diffrep.store.layout import CHECKSUM

# The names that safetensors gives them, in the order in which it puts tensors into a file: each begins at a multiple
# of the size of its elements.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# The tensors begin at a multiple of this: writing and copying at odd places costs a fifth. Readers skip the spaces.
ALIGNED = 64
# Bytes that are hashed, and then written while the cache still has them. A thread that hashes beside the writing takes
# more of both processors, and of small units several times as long.
CHUNK = 1 << 20


class Packed:
    """A safetensors file in parts, with its size and checksum: the tensors in the order of `save_file`.

    Args:
        tensors: By name. A contiguous tensor of the CPU is written from where it lies, another is copied when its turn
            comes.
        metadata: Strings for the header.

    Attributes:
        size: Of the file, in bytes.

    Raises:
        StoreError: A tensor has an element type that a file cannot hold.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise StoreError(f"{name}: {tensor.dtype} cannot be stored; allowed are {', '.join(DTYPES.values())}")
        order = list(DTYPES)
        self._tensors = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0].encode()))
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, tensor in self._tensors:
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        self._header = struct.pack("<Q", len(text)) + text
        self.size = len(self._header) + end
        self._hash = xxhash.xxh3_128()

    def parts(self) -> Iterator[memoryview]:
        """Gives the file; `checksum` is known when it is through."""
        self._hash = xxhash.xxh3_128()
        for content in self._contents():
            for start in range(0, len(content), CHUNK):
                part = content[start : start + CHUNK]
                self._hash.update(part)
                yield part

    @property
    def checksum(self) -> str:
        """Checksum of the parts that were given."""
        return CHECKSUM + self._hash.hexdigest()

    def _contents(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for _, tensor in self._tensors:
            if tensor.numel():  # an empty one may have strides that no view takes
                plain = tensor.detach().cpu().contiguous().reshape(-1)
                yield memoryview(plain.view(torch.uint8).numpy())
