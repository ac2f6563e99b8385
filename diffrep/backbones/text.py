"""Prompts to embeddings, by the text encoders of a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffrep.backbones import folders
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


# Parts that may be null in the index: Stable Diffusion 3 without T5.
WITHOUT = ("text_encoder_3", "tokenizer_3")


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
            ConfigError: The folder has no text encoders.
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
        for name, part in self._pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)
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
    import diffusers

    index = folders.read_json(folder / "model_index.json")
    parts = {name: value[0] is not None for name, value in index.items() if isinstance(value, list)}
    _check_text_parts(folder, parts)
    kept = ("text_encoder", "tokenizer", "scheduler")
    given: dict[str, Any] = {name: None for name in parts if not (parts[name] and name.startswith(kept))}
    if parts.get("text_encoder_3") is False:
        # Stable Diffusion 3 puts zeros in T5's place and asks the network's config how wide; no weights are read.
        given["transformer"] = folders.load_model(folder / "transformer", torch.device("meta"), dtype)
    if "safety_checker" in parts:
        given["requires_safety_checker"] = False
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **given)
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the text encoders in {folder}: {error}") from error


def _check_text_parts(folder: Path, parts: dict[str, bool]) -> None:
    """Raises ConfigError for text encoders or tokenizers that the index or the folder lacks."""
    needed = [name for name in parts if name.startswith(("text_encoder", "tokenizer")) and name not in WITHOUT]
    absent = [name for name in needed if not parts[name] or not (folder / name).is_dir()]
    if absent or not needed:
        raise ConfigError(
            f"prompts cannot be encoded: {folder} has no {', '.join(absent) or 'text_encoder'}; give cond as "
            "embeddings, or a folder of the whole pipeline"
        )
