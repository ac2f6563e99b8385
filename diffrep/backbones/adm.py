"""ADM, the U-Net of guided diffusion (Dhariwal and Nichol, 2021), with openai/guided-diffusion's state-dict keys.

In half precision the network is cast as a whole; its norms and the sinusoids of the time are computed in fp32 all the
same. The published code keeps the embeddings and the last layer in fp32 too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.adm_layers import (
    GROUPS,
    SAMPLERS,
    AttentionBlock,
    EmbedSequential,
    GroupNorm32,
    ResBlock,
    zeroed,
)
from diffrep.backbones.timestep import timestep_embedding
from diffrep.errors import ConfigError, UnknownNameError, suggest

__all__ = ["ADM_VARIANTS", "ADMUNet", "adm_arguments", "adm_noise_schedule"]

IMAGENET_CLASSES = 1000


class ADMUNet(nn.Module):
    """ADM's U-Net, in the vocabulary of guided-diffusion's UNetModel over images (its `dims` is 2).

    The outputs of `input_blocks.N`, `middle_block` and `output_blocks.N` are plain tensors; an upsampler is the last
    child of the last output block of its level, so that block's output is already doubled. Weights start as
    published: torch's defaults, and zeros in the last convolution of every residual branch and of the network.

    Args:
        image_size: Side of the images it was trained on; other multiples of 2^(levels - 1) run too.
        in_channels: Channels of the input.
        model_channels: Base width; the sinusoids of the time are as wide.
        out_channels: Channels of the output: twice the input's where variances are learned.
        num_res_blocks: Residual blocks of each level, one more on the way up.
        attention_resolutions: Downsampling factors (not pixels) of the levels that are attended.
        dropout: Inside the residual blocks, in training.
        channel_mult: Width of each level over the base width.
        conv_resample: Convolve in the samplers, where they are no residual blocks.
        num_classes: Classes; None for an unconditional network.
        num_heads: Attention heads, where `num_head_channels` is -1.
        num_head_channels: Channels of an attention head, or -1.
        num_heads_upsample: `num_heads` on the way up; -1 for the same.
        use_checkpoint: Ignored: checkpointing trades time for memory and changes no number.
        use_scale_shift_norm: The embedding scales and shifts, in place of only shifting.
        resblock_updown: Residual blocks change the map's size.
        use_fp16: Ignored, as it changes no number in fp32: cast the whole network with `to` instead.
        use_new_attention_order: See `AttentionBlock`.

    Raises:
        ConfigError: Widths are no multiples of 32, or not of the heads.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_checkpoint: bool = False,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_fp16: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes = model_channels, num_classes
        self.multiple = 2 ** (len(channel_mult) - 1)
        widths = [int(mult * model_channels) for mult in channel_mult]
        if not widths or any(width % GROUPS for width in widths):
            raise ConfigError(f"model_channels times channel_mult must be multiples of {GROUPS}, got {widths}")
        emb_channels = 4 * model_channels
        residual = partial(
            ResBlock, emb_channels=emb_channels, dropout=dropout, use_scale_shift_norm=use_scale_shift_norm
        )
        attention = partial(
            AttentionBlock, num_head_channels=num_head_channels, use_new_attention_order=use_new_attention_order
        )

        def block(channels: int, width: int, level: int, heads: int) -> list[nn.Module]:
            attend = 2**level in attention_resolutions
            return [residual(channels, width), *([attention(width, heads)] if attend else [])]

        def resampler(channels: int, resample: str) -> nn.Module:
            if resblock_updown:
                return residual(channels, channels, resample=resample)
            return SAMPLERS[resample](channels, conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        skips = self._build_way_down(widths, num_res_blocks, partial(block, heads=num_heads), resampler)
        deep = widths[-1]
        self.middle_block = EmbedSequential(residual(deep, deep), attention(deep, num_heads), residual(deep, deep))
        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self._build_way_up(skips, widths, num_res_blocks, partial(block, heads=heads), resampler)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts the noise, and what else `out_channels` holds.

        Args:
            x: Noised images (B, in_channels, H, W), clean in [-1, 1]; cast to the dtype of the weights.
            timesteps: Native times (B,), integers or floats from 0 to 999.
            y: Labels (B,) int64, of a class-conditional network.

        Returns:
            The raw output (B, out_channels, H, W) in the dtype of the weights.

        Raises:
            ConfigError: A side does not fit the network's levels, or `y` does not fit the network.
        """
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            given = f"{x.shape[-2]} x {x.shape[-1]}"
            raise ConfigError(f"the input's sides must be multiples of {self.multiple}, got {given}; resize or pad it")
        if self.num_classes is not None and y is None:
            raise ConfigError(f"this network is class-conditional; give y, labels from 0 to {self.num_classes - 1}")
        if self.num_classes is None and y is not None:
            raise ConfigError("this network is unconditional; leave y out")
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.to(dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

    def _build_way_down(
        self,
        widths: Sequence[int],
        num_res_blocks: int,
        block: Callable[..., list[nn.Module]],
        resampler: Callable[[int, str], nn.Module],
    ) -> list[int]:
        """Makes the input blocks and returns the channels that each gives."""
        given = [widths[0]]
        self.input_blocks = nn.ModuleList([EmbedSequential(nn.Conv2d(self.in_channels, widths[0], 3, padding=1))])
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(EmbedSequential(*block(given[-1], width, level)))
                given.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(EmbedSequential(resampler(width, "down")))
                given.append(width)
        return given

    def _build_way_up(
        self,
        skips: list[int],
        widths: Sequence[int],
        num_res_blocks: int,
        block: Callable[..., list[nn.Module]],
        resampler: Callable[[int, str], nn.Module],
    ) -> None:
        """Makes the output blocks, and the last layers."""
        channels = widths[-1]
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                layers = block(channels + skips.pop(), width, level)
                channels = width
                if level > 0 and index == num_res_blocks:
                    layers.append(resampler(width, "up"))
                self.output_blocks.append(EmbedSequential(*layers))
        last = zeroed(nn.Conv2d(channels, self.out_channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), last)


_RELEASED = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_channels": 256,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
# The released models NxN_diffusion.pt and 256x256_diffusion_uncond.pt, in create_model_and_diffusion's vocabulary.
ADM_VARIANTS: dict[str, dict[str, Any]] = {
    "64": {
        **_RELEASED,
        "image_size": 64,
        "noise_schedule": "cosine",
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "dropout": 0.1,
        "use_new_attention_order": True,
    },
    "128": {**_RELEASED, "image_size": 128, "num_heads": 4},
    "256": {**_RELEASED, "image_size": 256, "num_head_channels": 64},
    "256-uncond": {**_RELEASED, "image_size": 256, "num_head_channels": 64, "class_cond": False},
    "512": {**_RELEASED, "image_size": 512, "num_head_channels": 64},
}
_MULT_OF_SIZE = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
# The published scripts' defaults, which differ from UNetModel's; image_size has none here, since all else hangs on it.
_FLAG_DEFAULTS: dict[str, Any] = {
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "learn_sigma": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_DIFFUSION_FLAGS = (
    "diffusion_steps",
    "noise_schedule",
    "timestep_respacing",
    "use_kl",
    "predict_xstart",
    "rescale_timesteps",
    "rescale_learned_sigmas",
)
_IGNORED = ("use_checkpoint", "use_fp16")
_UNET_KEYS = ["dims", *inspect.signature(ADMUNet).parameters]
_FLAGS = ["image_size", *_FLAG_DEFAULTS, *_DIFFUSION_FLAGS, *_IGNORED]


def adm_arguments(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """Reads what network a config means.

    Args:
        config: A key of `ADM_VARIANTS`; arguments of UNetModel (`model_channels`, ...; `attention_resolutions` are
            downsampling factors); or of create_model_and_diffusion (`num_channels`, ...; `attention_resolutions` are
            pixels), whose missing ones take the published scripts' defaults. The keys tell the two apart.

    Returns:
        Arguments of `ADMUNet`.

    Raises:
        UnknownNameError: There is no such variant.
        ConfigError: Keys are unknown, missing or of both vocabularies, or a value cannot be read.
    """
    config, is_flags = _read(config)
    if not is_flags:
        if config.get("dims", 2) != 2:
            raise ConfigError(f"ADM config: dims is {config['dims']}, and only 2 (images) is supported")
        arguments = {key: value for key, value in config.items() if key not in ("dims", *_IGNORED)}
        lists = [key for key in ("attention_resolutions", "channel_mult") if key in config]
        return arguments | {key: _numbers(key, config[key]) for key in lists}
    size = config["image_size"]
    flags = _FLAG_DEFAULTS | dict(config)
    if flags["channel_mult"] == "" and size not in _MULT_OF_SIZE:
        sizes = ", ".join(map(str, _MULT_OF_SIZE))
        raise ConfigError(f"ADM config: image_size {size} has no default channel_mult, only {sizes} have; give it")
    mult = _MULT_OF_SIZE[size] if flags["channel_mult"] == "" else _numbers("channel_mult", flags["channel_mult"])
    attended = _numbers("attention_resolutions", flags["attention_resolutions"])
    return {key: flags[key] for key in _FLAG_DEFAULTS if key in _UNET_KEYS} | {
        "image_size": size,
        "in_channels": 3,
        "model_channels": flags["num_channels"],
        "out_channels": 6 if flags["learn_sigma"] else 3,
        "attention_resolutions": tuple(size // pixels for pixels in attended),
        "channel_mult": mult,
        "num_classes": IMAGENET_CLASSES if flags["class_cond"] else None,
    }


def adm_noise_schedule(config: str | Mapping[str, Any]) -> str:
    """Returns the name of the 1000-step noise schedule a config means: "linear", or "cosine" where it says so.

    Raises:
        UnknownNameError: There is no such variant or schedule.
        ConfigError: As for `adm_arguments`, or the schedule has another number of steps.
    """
    config, _ = _read(config)
    name, steps = config.get("noise_schedule", "linear"), config.get("diffusion_steps", 1000)
    if name not in ("linear", "cosine"):
        raise UnknownNameError("noise_schedule", str(name), ["linear", "cosine"])
    if steps != 1000:
        raise ConfigError(f"ADM config: diffusion_steps is {steps}, and only schedules of 1000 steps have a name here")
    return name


def _read(config: str | Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Looks up a variant, checks the keys, and says whether they are create_model_and_diffusion's."""
    if isinstance(config, str):
        if config not in ADM_VARIANTS:
            raise UnknownNameError("ADM variant", config, ADM_VARIANTS, "A dict of arguments serves too.")
        config = ADM_VARIANTS[config]
    unet = [key for key in config if key in _UNET_KEYS and key not in _FLAGS]
    flags = [key for key in config if key in _FLAGS and key not in _UNET_KEYS]
    known = _FLAGS if flags and not unet else _UNET_KEYS if unet and not flags else [*_UNET_KEYS, *_FLAGS]
    problems = [f"unknown key {key!r}; {suggest(str(key), known)}" for key in config if key not in known]
    required = ["image_size"] if flags else []
    if unet and flags:
        problems.append(
            f"{', '.join(unet)} belong to UNetModel, {', '.join(flags)} to create_model_and_diffusion; keep to one"
        )
    elif unet:
        parameters = inspect.signature(ADMUNet).parameters.values()
        required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    elif not flags:
        problems.append("give model_channels (UNetModel's keys) or num_channels (create_model_and_diffusion's)")
    problems += [f"{key} is missing" for key in required if key not in config]
    if not isinstance(config.get("image_size", 0), int):
        problems.append(f"image_size must be a whole number of pixels, got {config['image_size']!r}")
    if problems:
        raise ConfigError("ADM config: " + "\n  ".join(["", *problems]).strip())
    return config, bool(flags)


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, (int, float)) else value
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = [0.0]
    if any(number <= 0 for number in numbers):
        raise ConfigError(f"ADM config: {key} must be positive numbers, a list or such as '32,16,8', got {value!r}")
    return tuple(int(number) if number == int(number) else number for number in numbers)
