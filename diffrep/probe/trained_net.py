"""The networks of the trained heads: how each kind is built from a config, fed, judged and scored."""

from __future__ import annotations

from functools import partial
from math import prod

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from diffrep import dist
from diffrep.config import TrainedConfig
from diffrep.errors import ConfigError
from diffrep.heads import AttentionHead, AttentionPool, ConvHead, DifFormer, Head, LinearHead, MatryoshkaHead, MLPHead
from diffrep.heads.aggregation import AggregationHead
from diffrep.probe.logistic import divisor
from diffrep.probe.trained_data import CHUNK, Pair, Samples

# What may stand before each kind's first layer; the first is what a head without a choice has.
NORMS = {
    "aggregation": ("none",),
    "attention": ("batch",),
    "conv": ("batch",),
    "diffssl-attention": ("none",),
    "difformer": ("layer", "batch", "none"),
    "linear": ("batch", "layer", "standard", "none"),
    "mlp": ("batch", "layer", "standard", "none"),
    "matryoshka": ("none",),
}
FLAT = ("linear", "mlp", "matryoshka")
# What reads several layers and levels as a mapping of maps.
MAPPED = ("aggregation", "difformer")
# Most groups of the aggregation network's group norms, which is the published number, and least channels of one: with
# one channel a group a norm would take away the mean that is pooled.
GROUPS, GROUP = 32, 4
# Samples are scored in blocks of this many whatever the batch size and the number of processes, because the last bits
# of a matrix product depend on its shape.
BLOCK = 256


def norm_of(kind: str, config: TrainedConfig) -> str:
    """Returns the norm of a head's input; None stands for the first it can have.

    Raises:
        ConfigError: The head cannot have the norm that is asked for.
    """
    able = NORMS[kind]
    if config.norm is None:
        return able[0]
    if config.norm in able:
        return config.norm
    raise ConfigError(f"norm={config.norm} is not possible for the head {kind!r}; it takes {', '.join(able)}")


def check_shapes(kind: str, shapes: dict[Pair, tuple[int, ...]], config: TrainedConfig) -> None:
    """Raises ConfigError when a head cannot read features of these shapes."""
    if len(shapes) > 1 and kind not in (*FLAT, *MAPPED):
        names = ", ".join("@".join(pair) for pair in shapes)
        raise ConfigError(
            f"the head {kind!r} reads one layer and level, not {names}; kind=difformer and kind=aggregation read "
            "several"
        )
    for (layer, _), shape in shapes.items():
        if len(shape) != 3 and (kind not in FLAT or config.flip):
            what = f"the head {kind!r} reads" if kind not in FLAT else "flip=true mirrors"
            raise ConfigError(
                f"{what} maps (C, h, w), and {layer} is stored as {shape}; extract with request.pool=none, or with "
                "request.pool=k for maps of k x k cells, and without request.tokens"
            )


def build_head(kind: str, shapes: dict[Pair, tuple[int, ...]], classes: int, config: TrainedConfig) -> Head:
    """Builds a head for features of these shapes, its weights drawn from torch's generator."""
    norm, shape = norm_of(kind, config), next(iter(shapes.values()))
    width, depth, heads, dropout = config.width, config.depth, config.heads, config.dropout
    dim = sum(prod(one) for one in shapes.values())
    if kind == "linear":
        return LinearHead(dim, classes, norm=norm)
    if kind == "mlp":
        return MLPHead(dim, classes, list(config.hidden), norm=norm)
    if kind == "matryoshka":
        # Features of a frozen network come in no order: what is nested is a projection that is learned.
        return MatryoshkaHead(dim, classes, list(config.nesting), config.tied, project=config.nesting[-1])
    if kind == "attention":
        return AttentionPool(shape[0], list(shape[1:]), classes, width, depth, heads, dropout)
    if kind == "conv":
        return ConvHead(shape[0], classes, width, dropout)
    if kind == "diffssl-attention":
        layers = (
            f"Use_CLS_Token:True:{width},Reshape,Dense:{shape[0]}:{width}:identity,Insert_CLS_Token,"
            f"Attention:{width}:{heads}:4:{depth},Extract_CLS_Token,Dense:{width}:{classes}:identity"
        )
        return AttentionHead(layers, dropout)
    layers = {layer: list(one) for (layer, _), one in shapes.items()}
    levels = list(dict.fromkeys(level for _, level in shapes))
    if kind == "aggregation":
        channels = {layer: one[0] for layer, one in layers.items()}
        return AggregationHead(channels, levels, classes, width, _groups(width // 4), dropout=dropout)
    side = max(max(one[1:]) for one in layers.values())  # the maps are pooled already
    return DifFormer(layers, levels, classes, side, width, heads, depth, norm=norm, dropout=dropout)


def scores_of(kind: str, head: nn.Module, features: dict[Pair, torch.Tensor]) -> list[torch.Tensor]:
    """Returns a head's scores (n, K) in fp32; those of every length for a Matryoshka head, the whole last."""
    if kind in MAPPED:
        found = head(features)
    else:
        found = head(joined(features) if len(features) > 1 else next(iter(features.values())))
    return [one.float() for one in (found if kind == "matryoshka" else [found])]


def _groups(channels: int) -> int:
    """Returns the most groups of group norms over this many channels, within `GROUPS` and `GROUP`."""
    able = [number for number in range(1, GROUPS + 1) if channels % number == 0 and channels // number >= GROUP]
    return max(able, default=1)


def joined(features: dict[Pair, torch.Tensor]) -> torch.Tensor:
    """Returns features of several pairs flattened and side by side, (n, D) fp32."""
    return torch.cat([one.flatten(1).float() for one in features.values()], dim=1)


def loss_sum(scores: list[torch.Tensor], labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Returns the sum over samples, and over the lengths of a Matryoshka head, of the loss.

    It is the cross-entropy, or with several labels a sample the mean over labels of their binary cross-entropies.

    Args:
        scores: Scores (n, K) of each length.
        labels: (n,) int64, or (n, K) 0 and 1.
        smoothing: Share of the target that goes evenly to all classes, or to both answers.
    """
    if labels.ndim == 1:
        return sum(F.cross_entropy(one, labels, reduction="sum", label_smoothing=smoothing) for one in scores)
    target = labels.float() * (1 - smoothing) + smoothing / 2
    return sum(F.binary_cross_entropy_with_logits(one, target, reduction="none").mean(1).sum() for one in scores)


def evaluate(
    kind: str, head: nn.Module, samples: Samples, rows: np.ndarray, classes: int, device: torch.device
) -> torch.Tensor:
    """Returns the scores (G, M, K) fp32 of M samples, in their order, on every process; G is 1 but for Matryoshka.

    The processes share the blocks, and each writes its scores to the samples' own places: every sample is counted
    once, and the numbers do not depend on how many processes there are.
    """
    state = dist.state()
    lengths = len(head.nesting) if kind == "matryoshka" else 1
    found = torch.zeros(lengths, len(rows), classes, device=device)
    was_training = head.training
    head.eval()
    with torch.no_grad():
        for start in range(state.process_index * BLOCK, len(rows), state.num_processes * BLOCK):
            part = samples.read(rows[start : start + BLOCK])
            part = {pair: one.to(device) for pair, one in part.items()}
            found[:, start : start + BLOCK] = torch.stack(scores_of(kind, head, part))
    head.train(was_training)
    if state.num_processes > 1:
        distributed.all_reduce(found)  # each place is zero on all processes but one
    return found.cpu()


def set_standard(head: MLPHead, samples: Samples, rows: np.ndarray) -> None:
    """Sets the mean and deviation that a head with norm "standard" divides by to those of these samples."""
    parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    mean = sum(joined(samples.read(part)).sum(0, dtype=torch.float64) for part in parts) / len(rows)
    squares = sum((joined(samples.read(part)) - mean).square().sum(0) for part in parts)
    head.mean.copy_(mean)
    head.std.copy_(divisor((squares / len(rows)).sqrt()))


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Returns the batch norms inside a module."""
    return [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]


def share_batch_norms(module: nn.Module) -> None:
    """Lets batch norms take the statistics of a step's samples on all processes, also on CPUs, where torch cannot.

    So the number of processes does not change what is learned. Parameters, buffers and keys stay as they are.
    """
    for norm in batch_norms(module):
        norm.forward = partial(_shared_batch_norm, norm)


def unshare_batch_norms(module: nn.Module) -> None:
    """Undoes `share_batch_norms`."""
    for norm in batch_norms(module):
        vars(norm).pop("forward", None)


def _shared_batch_norm(norm: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalises (B, C) or (B, C, h, w); B may differ between processes and be 0 on some."""
    if not norm.training:
        return type(norm).forward(norm, x)
    axes, shape = [axis for axis in range(x.ndim) if axis != 1], [1, -1] + [1] * (x.ndim - 2)
    values = x.float()
    count = values.new_tensor([values.numel() // values.shape[1]])
    sums = _Sum.apply(torch.cat([values.sum(axes), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / total
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * total / (total - 1), norm.momentum)
        norm.num_batches_tracked += 1
    normed = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normed = normed * norm.weight.view(shape) + norm.bias.view(shape)
    return normed.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(_: object, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total
