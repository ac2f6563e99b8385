"""EDM's two networks (Karras et al., 2022), with the constructor arguments and state-dict keys of NVlabs/edm.

`SongUNet` is DDPM++ and NCSN++ (Song et al., 2021), `DhariwalUNet` is ADM (Dhariwal and Nichol, 2021). Weights start
at torch's defaults, not at the published initialisation: these modules are for reading published weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.edm_layers import (
    EDMBlock,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    ResampledConv,
    norm,
)
from diffrep.errors import ConfigError, UnknownNameError


class _EDMUNet(nn.Module):
    """What both networks share: the plan of blocks, and the pass through them."""

    attend_in_all_decoder_blocks: bool

    def _build(
        self,
        stem_channels: int,
        widths: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        block: Callable[..., EDMBlock],
    ) -> None:
        sizes = [self.img_resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels, skips = stem_channels, []
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            name, attention = f"{size}x{size}", size in attn_resolutions
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(self.in_channels, channels, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, resample="down")
                self._add_encoder_branch(name, channels)
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{name}_block{index}"] = block(channels, width, attention=attention)
                channels = width
                skips.append(channels)
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            name, attention = f"{size}x{size}", size in attn_resolutions
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, resample="up")
            for index in range(num_blocks + 1):
                attend = attention and (self.attend_in_all_decoder_blocks or index == num_blocks)
                self.dec[f"{name}_block{index}"] = block(channels + skips.pop(), width, attention=attend)
                channels = width
            self._add_decoder_branch(name, channels, first=level == len(widths) - 1, last=level == 0)

    def _add_encoder_branch(self, name: str, channels: int) -> None:
        """Adds the modules that carry the input image down, if there are any."""

    def _add_decoder_branch(self, name: str, channels: int, first: bool, last: bool) -> None:
        """Adds the modules that carry an output image up, if there are any."""

    def _run(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the last block's map, and the output image where the decoder makes one."""
        skips, image = [], x
        for name, module in self.enc.items():
            if name.endswith("aux_down"):
                image = module(image)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + module(image)
            elif name.endswith("aux_residual"):
                x = skips[-1] = image = (x + module(image)) / math.sqrt(2)
            else:
                x = module(x, emb) if isinstance(module, EDMBlock) else module(x)
                skips.append(x)
        image, normed = None, None
        for name, module in self.dec.items():
            if name.endswith("aux_up"):
                image = module(image)
            elif name.endswith("aux_norm"):
                normed = module(x)
            elif name.endswith("aux_conv"):
                drawn = module(F.silu(normed))
                image = drawn if image is None else image + drawn
            else:
                x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return x, image

    def _check_labels(self, class_labels: Tensor | None, augment_labels: Tensor | None) -> None:
        for name, labels, width in (
            ("class_labels", class_labels, self.label_dim),
            ("augment_labels", augment_labels, self.augment_dim),
        ):
            if labels is not None and (labels.ndim != 2 or width == 0 or labels.shape[1] != width):
                allowed = f"must be (B, {width})" if width else "must be left out of this network, which takes none"
                raise ConfigError(f"{name} {allowed}, got {tuple(labels.shape)}")

    def _classes(self, class_labels: Tensor | None, like: Tensor) -> Tensor:
        if class_labels is None:
            return like.new_zeros(1, self.label_dim)
        labels = class_labels.to(like.dtype)
        if self.training and self.label_dropout:
            kept = torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout
            labels = labels * kept.to(labels.dtype)
        return labels


class SongUNet(_EDMUNet):
    """DDPM++ and NCSN++ as EDM trains them (Song et al., 2021; Karras et al., 2022).

    Args:
        img_resolution: Side of the images it was trained on; it names the blocks.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes; 0 for an unconditional network.
        augment_dim: Width of the augmentation labels; 0 for none.
        model_channels: Base width.
        channel_mult: Width of each level over the base width.
        channel_mult_emb: Width of the embedding over the base width.
        num_blocks: Blocks of each level.
        attn_resolutions: Sides of the maps that are attended.
        dropout: Inside the blocks, in training.
        label_dropout: Probability of dropping the class, in training.
        embedding_type: Of the noise level: "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: Width of the noise level's embedding over the base width: 1 (DDPM++) or 2 (NCSN++).
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip": how the input image reaches lower levels.
        decoder_type: "standard", or "skip": the output image is a sum over the levels.
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).

    Raises:
        UnknownNameError: A type is not one of those above.
    """

    attend_in_all_decoder_blocks = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        _one_of("embedding_type", embedding_type, ("positional", "fourier"))
        _one_of("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _one_of("decoder_type", decoder_type, ("standard", "skip"))
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.encoder_type, self.decoder_type, self.resample_filter = encoder_type, decoder_type, tuple(resample_filter)
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        positional = embedding_type == "positional"
        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True) if positional else FourierEmbedding(noise_channels)
        )
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        block = partial(
            EDMBlock,
            emb_channels=emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=self.resample_filter,
            project_resampled=True,
            adaptive_scale=False,
        )
        self._image_channels = in_channels
        self._build(model_channels, [model_channels * m for m in channel_mult], num_blocks, attn_resolutions, block)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Runs the raw network F of EDM's equation 7; see `Preconditioning` for D.

        Args:
            x: Scaled input (B, in_channels, H, W) in the weights' dtype.
            noise_labels: c_noise (B,); embedded in fp32.
            class_labels: One-hot (B, label_dim); None means zeros, no class.
            augment_labels: (B, augment_dim); None means not augmented.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ConfigError: Labels do not fit the network.
        """
        self._check_labels(class_labels, augment_labels)
        # The network was trained with the sines first; `map_noise` gives the cosines first.
        emb = self.map_noise(noise_labels).unflatten(1, (2, -1)).flip(1).flatten(1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None:
            emb = emb + self.map_label(self._classes(class_labels, emb) * math.sqrt(self.label_dim))
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        return self._run(x, emb)[1]

    def _add_encoder_branch(self, name: str, channels: int) -> None:
        image = self._image_channels
        if self.encoder_type == "skip":
            self.enc[f"{name}_aux_down"] = Resample(False, self.resample_filter)
            self.enc[f"{name}_aux_skip"] = nn.Conv2d(image, channels, 1)
        elif self.encoder_type == "residual":
            conv = ResampledConv(image, channels, 3, False, self.resample_filter, filter_last=True)
            self.enc[f"{name}_aux_residual"] = conv
            self._image_channels = channels

    def _add_decoder_branch(self, name: str, channels: int, first: bool, last: bool) -> None:
        if self.decoder_type == "skip" and not first:
            self.dec[f"{name}_aux_up"] = Resample(True, self.resample_filter)
        if self.decoder_type == "skip" or last:
            self.dec[f"{name}_aux_norm"] = norm(channels, 1e-6)
            self.dec[f"{name}_aux_conv"] = nn.Conv2d(channels, self.out_channels, 3, padding=1)


class DhariwalUNet(_EDMUNet):
    """ADM as EDM trains it (Dhariwal and Nichol, 2021; Karras et al., 2022); heads are 64 channels wide.

    Args:
        img_resolution: Side of the images it was trained on; it names the blocks.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes; 0 for an unconditional network.
        augment_dim: Width of the augmentation labels; 0 for none.
        model_channels: Base width.
        channel_mult: Width of each level over the base width.
        channel_mult_emb: Width of the embedding over the base width.
        num_blocks: Blocks of each level.
        attn_resolutions: Sides of the maps that are attended; levels below 64 channels have no heads, so no attention.
        dropout: Inside the blocks, in training.
        label_dropout: Probability of dropping the class, in training.
    """

    attend_in_all_decoder_blocks = True

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        emb_channels = model_channels * channel_mult_emb
        widths = [model_channels * m for m in channel_mult]
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None
        block = partial(EDMBlock, emb_channels=emb_channels, dropout=dropout)
        self._build(widths[0], widths, num_blocks, attn_resolutions, block)
        self.out_norm = norm(widths[0], 1e-5)
        self.out_conv = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Runs the raw network F; arguments, result and errors as for `SongUNet.forward`."""
        self._check_labels(class_labels, augment_labels)
        emb = self.map_noise(noise_labels).to(self.map_layer0.weight.dtype)
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._classes(class_labels, emb))
        x, _ = self._run(x, F.silu(emb))
        return self.out_conv(F.silu(self.out_norm(x)))


def _one_of(argument: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise UnknownNameError(argument, given, known)
