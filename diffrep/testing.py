"""Tiny backbones with random weights, of the real classes: for tests of diffrep and of users' own code."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.convert import save_official
from diffrep.backbones.opening import OFFICIAL
from diffrep.errors import BackendUnavailable, UnknownNameError

_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}
_JOINT = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "num_attention_heads": 2, "attention_head_dim": 8}
# Kind -> (class of diffusers, its arguments).
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "unet2d": (
        "UNet2DModel",
        {
            "sample_size": 16,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
    ),
    "unet2d-condition": ("UNet2DConditionModel", _UNET),
    "sdxl": (
        "UNet2DConditionModel",
        _UNET
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 34,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        },
    ),
    "transformer2d": (
        "Transformer2DModel",
        _HEADS
        | {
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "norm_type": "ada_norm",
            "num_embeds_ada_norm": 1000,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        _HEADS
        | {
            "num_layers": 3,
            "attention_head_dim": 12,  # the size conditions want a width divisible by three
            "cross_attention_dim": 24,
            "caption_channels": 12,
            "patch_size": 2,
            "use_additional_conditions": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        _JOINT
        | {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 3,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        _JOINT
        | {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        _HEADS
        | {
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "patch_size": 1,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        _HEADS | {"out_channels": 8, "num_layers": 3, "patch_size": 2, "num_embeds_ada_norm": 10},
    ),
}
_DIT = {"input_size": 8, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
# Kind -> config of an official checkpoint.
TINY_OFFICIAL: dict[str, dict[str, Any]] = {
    "sit": _DIT,
    "repa": _DIT | {"z_dims": [6], "projector_dim": 8, "encoder_depth": 2},
    "adm": {
        "image_size": 16,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_head_channels": 16,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "edm": {
        "precond": "edm",
        "model_type": "SongUNet",
        "img_resolution": 16,
        "img_channels": 3,
        "label_dim": 10,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    },
}
KINDS = (*TINY, *TINY_OFFICIAL)
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
_DC = {
    "in_channels": 3,
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (4, 8, 8),
    "decoder_block_out_channels": (4, 8, 8),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "scaling_factor": 0.41407,
}
_FLOWS = ("sd3", "flux", "sana")
# Kind -> (pipeline, network's kind, its text encoders with width and tokenizer). CLIP's projections add up to 10.
PIPELINES: dict[str, tuple[str, str, tuple[tuple[str, int], ...]]] = {
    "sd15": ("StableDiffusionPipeline", "unet2d-condition", (("CLIPTextModel", 12),)),
    "sdxl": ("StableDiffusionXLPipeline", "sdxl", (("CLIPTextModel", 4), ("CLIPTextModelWithProjection", 8))),
    "sd3": (
        "StableDiffusion3Pipeline",
        "sd3",
        (("CLIPTextModelWithProjection", 4), ("CLIPTextModelWithProjection", 6), ("T5EncoderModel", 12)),
    ),
    "flux": ("FluxPipeline", "flux", (("CLIPTextModel", 10), ("T5EncoderModel", 12))),
    "pixart": ("PixArtAlphaPipeline", "pixart", (("T5EncoderModel", 12),)),
    "sana": ("SanaPipeline", "sana", (("Gemma2Model", 12),)),
}
_SDXL_PROJECTION = 10
# Scaling and shift of each pipeline's own autoencoder.
_FACTORS: dict[str, dict[str, Any]] = {
    "sd15": {"scaling_factor": 0.18215},
    "sdxl": {"scaling_factor": 0.13025, "force_upcast": True},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "pixart": {"scaling_factor": 0.18215},
}


def save_tiny(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a folder that `load_backbone` opens, with a tiny network of random weights.

    Args:
        kind: One of `KINDS`: "unet2d" (pixels, one channel), a network on latents of RGB images ("unet2d-condition",
            "sdxl", "transformer2d", "pixart", "sd3", "flux", "sana", "dit": pipeline folders with VAE and scheduler),
            or an official network ("sit", "repa": latents are given; "adm", "edm": RGB pixels).
        folder: Where to write.
        seed: Seeds the weights.

    Raises:
        UnknownNameError: There is no such kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("tiny backbone", kind, KINDS)
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in TINY_OFFICIAL:
            network = OFFICIAL[kind].build(TINY_OFFICIAL[kind], None)
            _fill(network)
            save_official(network, kind, TINY_OFFICIAL[kind], folder)
            return folder
        name = TINY[kind][0]
        network = _network(kind)
        network.save_pretrained(folder / ("unet" if "UNet" in name else "transformer"))
        if kind == "unet2d":
            diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
            return folder
        diffusers.AutoencoderKL(**_VAE).save_pretrained(folder / "vae")
        if kind in _FLOWS:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        else:
            betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
            scheduler = diffusers.DDIMScheduler(**betas)
        scheduler.save_pretrained(folder / "scheduler")
    return folder


def save_tiny_pipeline(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a whole text-to-image pipeline of diffusers, with tokenizers and text encoders, all tiny and random.

    Its tokenizers know lower-case letters; each is a token.

    Args:
        kind: One of `PIPELINES`: "sd15", "sdxl", "sd3", "flux", "pixart" or "sana".
        folder: Where to write.
        seed: Seeds the weights.

    Raises:
        UnknownNameError: There is no such kind.
        BackendUnavailable: transformers is not installed.
    """
    if kind not in PIPELINES:
        raise UnknownNameError("tiny pipeline", kind, PIPELINES)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "a pipeline's text encoders need transformers: pip install 'diffrep[text]'"
        ) from error
    folder = Path(folder)
    name, network, encoders = PIPELINES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {"unet" if "UNet" in TINY[network][0] else "transformer": _network(network)}
        vae = diffusers.AutoencoderDC(**_DC) if kind == "sana" else diffusers.AutoencoderKL(**_VAE, **_FACTORS[kind])
        parts["vae"], parts["scheduler"] = vae, _scheduler(kind)
        for index, (encoder, width) in enumerate(encoders, start=1):
            end = "" if index == 1 else f"_{index}"
            tokenizer = _TOKENIZERS[encoder[:4]](folder / f"tokenizer{end}")
            parts[f"tokenizer{end}"] = tokenizer
            parts[f"text_encoder{end}"] = _text_encoder(encoder, width, kind, tokenizer)
    if kind == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, name)(**parts).save_pretrained(folder)
    return folder


def _network(kind: str) -> nn.Module:
    name, arguments = TINY[kind]
    network = getattr(diffusers, name)(**arguments)
    _fill(network)
    return network


def _scheduler(kind: str) -> Any:
    if kind in ("sd3", "flux"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "sana":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return diffusers.DPMSolverMultistepScheduler(**flow)
    if kind == "pixart":
        return diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if kind == "sdxl":
        return diffusers.EulerDiscreteScheduler(**betas, steps_offset=1)
    return diffusers.PNDMScheduler(**betas, steps_offset=1, skip_prk_steps=True)


def _text_encoder(name: str, width: int, kind: str, tokenizer: Any) -> nn.Module:
    import transformers

    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {end: getattr(tokenizer, end) for end in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name == "T5EncoderModel":
        sizes = {"d_model": width, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)
    elif name == "Gemma2Model":
        config = transformers.Gemma2Config(hidden_size=width, num_key_value_heads=1, head_dim=6, **shape, **ends)
    else:
        projected = _SDXL_PROJECTION if kind == "sdxl" else width
        config = transformers.CLIPTextConfig(hidden_size=width, projection_dim=projected, **shape, **ends)
    return getattr(transformers, name)(config).eval()


def _clip_tokenizer(folder: Path) -> Any:
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    ends = ("<|startoftext|>", "<|endoftext|>")
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), *ends]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer(folder: Path) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return _saved_tokenizer(tokenizer, transformers.T5TokenizerFast, folder, extra_ids=0)


def _gemma_tokenizer(folder: Path) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, normalizers, processors

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", 2)])
    return _saved_tokenizer(tokenizer, transformers.GemmaTokenizerFast, folder)


def _saved_tokenizer(tokenizer: Any, kind: Any, folder: Path, **options: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return kind.from_pretrained(folder, **options)


_TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "CLIP": _clip_tokenizer,
    "T5En": _t5_tokenizer,
    "Gemm": _gemma_tokenizer,
}


def _fill(network: nn.Module) -> None:
    # Zero-initialised layers (adaLN, output projections) would hide mistakes upstream of them.
    for name, parameter in network.named_parameters():
        if name == "pos_embed":
            continue  # a fixed table
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for block in getattr(network, "transformer_blocks", ()):
        if getattr(block.norm1, "emb", None) is not None:  # DiT in diffusers: one embedder, a copy in every block
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())


def tiny_backbone(kind: str, folder: str | Path, **options: object) -> Backbone:
    """Writes a tiny pipeline and loads it; `options` go to `load_backbone`."""
    return load_backbone(save_tiny(kind, folder), device="cpu", **options)


def save_images(folder: str | Path, per_class: int = 6, classes: int = 3, size: int = 16, seed: int = 0) -> Path:
    """Writes an image folder, train/ and test/, whose classes differ in brightness: PNG, grey, `size` x `size`."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    for split in ("train", "test"):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            for index in range(per_class):
                pixels = rng.integers(0, 60, (size, size)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return folder
