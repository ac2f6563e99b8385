"""Linear heads trained with SGD, all of a reading in one pass over its features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional as F

from diffrep.config.probe import SGDConfig
from diffrep.errors import ConfigError
from diffrep.heads import LinearHead
from diffrep.probe.logistic import one_hot, standardisation

BATCH_EPS = 1e-6  # as in `heads.MLPHead`
CHUNK = 4096  # samples scored at once


@dataclass(frozen=True)
class LinearSpec:
    """Settings of one head, and its key: two heads are the same only if all that was configured is the same.

    DINOv2 (`dinov2/eval/linear.py`) keys heads by the effective learning rate rounded to five decimals and so loses 8
    of its 52 heads at a batch of 32.

    Attributes:
        norm: "none", "batch", "layer" or "standard".
        lr: Learning rate as configured.
        weight_decay: L2 weight decay.
    """

    norm: str
    lr: float
    weight_decay: float

    def effective_lr(self, config: SGDConfig) -> float:
        """Returns the learning rate of the first step; lr is for a batch of 256 where `scale_lr` is on (DINOv2)."""
        return self.lr * config.batch_size / 256 if config.scale_lr else self.lr


def linear_specs(config: SGDConfig) -> tuple[LinearSpec, ...]:
    """Returns every combination of norm, learning rate and weight decay."""
    return tuple(LinearSpec(*setting) for setting in product(config.norms, config.lrs, config.weight_decays))


class SGDHeads:
    """Linear heads of one reading, trained together.

    A step reads one minibatch, normalises it once for each norm and does one product for all heads of a norm. Each
    head follows `torch.optim.SGD` with momentum, weight decay on weights and biases alike, and a learning rate that
    falls to 0 along a cosine, step by step, as in DINOv2. All heads start from the same weights, so that none depends
    on its company. The loss is the mean cross-entropy, or, for several labels a sample, the mean over samples of the
    binary cross-entropies' sum over labels.

    Args:
        specs: The heads.
        config: What they share: momentum, epochs or iterations, batch size, first weights.
        seed: Seeds the first weights and the order of samples.
        device: Where to train; features are moved there minibatch by minibatch.

    Raises:
        ConfigError: Batch norm is to learn from batches of one sample.
    """

    def __init__(
        self, specs: tuple[LinearSpec, ...], config: SGDConfig, seed: int, device: str | torch.device = "cpu"
    ):
        if config.batch_size == 1 and any(spec.norm == "batch" for spec in specs):
            raise ConfigError('norm "batch" needs a batch_size of 2 or more, got 1; use norm "standard" instead')
        self.specs, self.config, self.seed, self.device = specs, config, seed, torch.device(device)

    def fit(self, features: torch.Tensor, labels: torch.Tensor, classes: int | None = None) -> SGDHeads:
        """Trains the heads.

        Args:
            features: (N, ...).
            labels: (N,) int64, or (N, L) of 0 and 1 for several labels a sample.
            classes: Number of classes; None counts them in `labels`.
        """
        x, config = features.flatten(1), self.config
        if classes is None:
            classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
        target = one_hot(labels, classes).float()
        start = config.init_std * torch.randn(
            x.shape[1], classes, generator=torch.Generator().manual_seed(self.seed)
        )  # on the CPU, so that every device starts alike
        self.groups = []
        for norm in dict.fromkeys(spec.norm for spec in self.specs):
            members = [i for i, spec in enumerate(self.specs) if spec.norm == norm]
            specs = [self.specs[i] for i in members]
            normalise = _Norm(norm, x, self.device)
            self.groups.append(_Fused(members, specs, config, normalise, start, labels.ndim == 2, self.device))
        steps = config.iterations or math.ceil(config.epochs * len(x) / config.batch_size)
        for step, rows in enumerate(batches(len(x), config.batch_size, steps, self.seed)):
            batch = x[rows.to(x.device)].to(self.device, torch.float32)
            expected = target[rows.to(target.device)].to(self.device)
            for group in self.groups:
                group.step(batch, expected, (1 + math.cos(math.pi * step / steps)) / 2)
        return self

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Returns scores (S, N, K) of features (N, ...), in the order of `specs`, on the heads' device."""
        parts = []
        for chunk in features.flatten(1).split(CHUNK):
            x = chunk.to(self.device, torch.float32)
            part = torch.empty(len(self.specs), len(x), self.groups[0].classes, device=self.device)
            for group in self.groups:
                part[group.members] = group.scores(x)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def head(self, index: int) -> LinearHead:
        """Returns one head as a module."""
        group = next(group for group in self.groups if index in group.members)
        weights = group.weights[..., group.members.index(index)]
        head = LinearHead(len(weights) - 1, group.classes, norm=group.normalise.name)
        head.load_state_dict(group.normalise.state() | {"fcs.0.weight": weights[:-1].T, "fcs.0.bias": weights[-1]})
        return head.eval()


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields the rows of each step's minibatch, (size,) int64.

    One shuffle follows another and full batches are cut from the stream, as from DINOv2's infinite sampler: no small
    last batch disturbs batch norm or the scale of learning rates. The order depends on the arguments alone.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(rows) < size:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        yield rows[:size]
        rows = rows[size:]


class _Norm:
    """What stands before the linear maps: a function of a minibatch while training, a fixed one afterwards."""

    def __init__(self, name: str, x: torch.Tensor, device: torch.device):
        self.name = name
        if name == "standard":
            self.mean, self.std = (value.to(device) for value in standardisation(x.float()))
        elif name == "batch":
            self.mean, self.var = torch.zeros(x.shape[1], device=device), torch.ones(x.shape[1], device=device)
            self.steps = 0

    def __call__(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """Normalises (B, D) and appends a column of ones for the biases."""
        if self.name == "standard":
            x = (x - self.mean) / self.std
        elif self.name == "batch":
            x = F.batch_norm(x, self.mean, self.var, training=training, momentum=0.1, eps=BATCH_EPS)
            self.steps += training
        elif self.name == "layer":
            x = F.layer_norm(x, x.shape[1:])
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the norm's part of the state dict of a `LinearHead`."""
        if self.name == "standard":
            return {"mean": self.mean, "std": self.std}
        if self.name == "batch":
            steps = torch.tensor(self.steps)
            return {"norm.running_mean": self.mean, "norm.running_var": self.var, "norm.num_batches_tracked": steps}
        return {}


class _Fused:
    """Heads that share a norm, as one matrix (D + 1, K, S): biases are its last row.

    Heads lie innermost, for the softmax over classes then runs over contiguous rows, ten times as fast as over a last
    dimension of ten.
    """

    def __init__(
        self,
        members: list[int],
        specs: list[LinearSpec],
        config: SGDConfig,
        normalise: _Norm,
        start: torch.Tensor,
        multilabel: bool,
        device: torch.device,
    ):
        self.members, self.normalise, self.multilabel = members, normalise, multilabel
        self.classes, self.momentum = start.shape[1], config.momentum
        start = F.pad(start, (0, 0, 0, 1)).to(device)
        self.weights = start[..., None].repeat(1, 1, len(specs))
        self.velocity = torch.zeros_like(self.weights)
        self.lr = torch.tensor([spec.effective_lr(config) for spec in specs], device=device)
        self.decay = torch.tensor([spec.weight_decay for spec in specs], device=device)
        self.decays = any(spec.weight_decay for spec in specs)

    def step(self, batch: torch.Tensor, expected: torch.Tensor, scale: float) -> None:
        """Takes one step on a minibatch (B, D) with targets (B, K); `scale` multiplies the learning rates."""
        x = self.normalise(batch, training=True)
        scores = self._scores(x)
        found = scores.sigmoid() if self.multilabel else scores.softmax(1)
        residual = found.sub_(expected[..., None]).div_(len(x)).flatten(1)
        # velocity = momentum * velocity + gradient: the product itself adds up.
        flat = self.velocity.view(len(self.velocity), -1)
        torch.addmm(flat, x.T, residual, beta=self.momentum, out=flat)
        if self.decays:
            self.velocity.addcmul_(self.weights, self.decay)
        self.weights.addcmul_(self.velocity, self.lr, value=-scale)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Returns scores (S, N, K) of features (N, D)."""
        return self._scores(self.normalise(x, training=False)).permute(2, 0, 1)

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weights.view(len(self.weights), -1)).view(len(x), self.classes, -1)
