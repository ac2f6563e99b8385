"""Prompts to embeddings, by the text encoders of a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffrep.errors import BackendUnavailable, CheckpointError, ConfigError

# What each pipeline's `encode_prompt` returns, without the negative prompt's part. None is not for the network.
OUTPUTS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionXL": ("prompt_embeds", None, "pooled_prompt_embeds", None),
    "StableDiffusion3": ("prompt_embeds", None, "pooled_prompt_embeds", None),
    "StableDiffusion": ("prompt_embeds", None),
    "Flux": ("prompt_embeds", "pooled_prompt_embeds", None),
    "PixArt": ("prompt_embeds", "prompt_attention_mask", None, None),
    "Sana": ("prompt_embeds", "prompt_attention_mask", None, None),
}


class PromptEncoder:
    """Encodes each unique prompt once and keeps the result; the encoders are loaded at the first new prompt.

    Args:
        pipeline: Name of the pipeline's class, as in `model_index.json`.
        folder: Returns the pipeline's folder, with text encoders and tokenizers in it.
        dtype: Element type that the encoders run in.

    Raises:
        ConfigError: No pipeline class of that kind is known.
    """

    def __init__(self, pipeline: str, folder: Callable[[], Path], dtype: torch.dtype = torch.float32):
        kind = next((name for name in OUTPUTS if pipeline.startswith(name)), None)
        if kind is None:
            raise ConfigError(f"prompts of {pipeline} cannot be encoded; known: {', '.join(OUTPUTS)}")
        self.outputs = OUTPUTS[kind]
        self.folder = folder
        self.dtype = dtype
        self._kept: dict[str, dict[str, torch.Tensor]] = {}
        self._pipeline: Any = None

    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Returns the tensors of the prompts, one row each, on `device`.

        Raises:
            BackendUnavailable: transformers is not installed.
            CheckpointError: The text encoders cannot be loaded.
        """
        if device.type == "meta":
            raise ConfigError("prompts cannot be encoded on the meta device")
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._kept:
                self._kept[prompt] = self._encode(prompt, device)
        names = self._kept[prompts[0]]
        return {name: torch.cat([self._kept[prompt][name] for prompt in prompts]).to(device) for name in names}

    def drop(self) -> None:
        """Frees the text encoders; what was encoded stays."""
        self._pipeline = None

    @torch.no_grad()
    def _encode(self, prompt: str, device: torch.device) -> dict[str, torch.Tensor]:
        if self._pipeline is None:
            self._pipeline = _load(self.folder(), self.dtype)
        self._pipeline.to(device)
        encode = self._pipeline.encode_prompt
        wanted = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        known = inspect.signature(encode).parameters
        # The second and third encoder of SDXL, SD3 and FLUX read the same prompt when theirs is None.
        wanted |= {name: None for name in ("prompt_2", "prompt_3") if name in known}
        found = encode(prompt=prompt, **{name: value for name, value in wanted.items() if name in known})
        named = zip(self.outputs, found, strict=False)
        return {name: tensor.cpu() for name, tensor in named if name is not None and tensor is not None}


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "encoding prompts needs transformers: pip install 'diffrep[text]', or give cond as embeddings"
        ) from error
    import json

    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    kept = ("text_encoder", "tokenizer", "scheduler")
    absent = {name: None for name, value in index.items() if isinstance(value, list) and not name.startswith(kept)}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **absent)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load the text encoders in {folder}: {error}") from error
