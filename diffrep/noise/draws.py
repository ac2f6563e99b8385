"""The forward process, and noise that is a function of the sample."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def mix(clean: torch.Tensor, eps: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Forward process, one level a row.

    Args:
        clean: Clean samples (B, C, H, W).
        eps: Unit Gaussian noise (B, C, H, W).
        signal: Signal coefficients (B,).
        noise: Noise coefficients (B,).

    Returns:
        signal * clean + noise * eps, (B, C, H, W) in the dtype of `clean`; the coefficients are applied in fp32.
    """
    shape = (-1, *[1] * (clean.ndim - 1))
    return (signal.float().view(shape) * clean.float() + noise.float().view(shape) * eps.float()).to(clean.dtype)


def sample_noise(
    shape: tuple[int, ...], seed: int, sample_id: str, level: str, draw: int, purpose: str = "noise"
) -> torch.Tensor:
    """Draws unit Gaussian noise that depends on nothing but its arguments.

    A 64-bit BLAKE2b digest keys numpy's counter-based Philox generator. torch's CPU generator is not used because it
    keeps only the low 32 bits of its seed.

    Args:
        shape: Shape of the result.
        seed: The request's seed.
        sample_id: The sample's id.
        level: Canonical key of the noise level.
        draw: Index of the draw.
        purpose: "noise" or "posterior": separate streams.

    Returns:
        fp32 CPU tensor of `shape`.
    """
    text = "\x1f".join((purpose, str(seed), sample_id, level, str(draw)))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def image_digest(image: torch.Tensor) -> str:
    """Returns the id of an image (C, H, W) that has no other: the SHA-256 of its values."""
    content = image.detach().cpu().contiguous().view(torch.uint8)  # numpy has no bfloat16
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
