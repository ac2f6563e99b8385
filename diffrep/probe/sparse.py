"""Training of a TopK sparse autoencoder, and what its latents stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from diffrep.config.feedback import SparseConfig
from diffrep.errors import ConfigError, DataError, DiffrepError
from diffrep.heads.sparse import TopKSAE

CHUNK = 1024  # samples at once: with 81,920 latents their activations take 335 MB
# Revelio: latents that fire on no more samples than this are not ranked; labels are judged on so many top images.
RARE, JUDGED = 10, 10


class SparseTrainer:
    """Optimiser steps of an autoencoder, as Revelio takes them.

    Args:
        sae: What is trained.
        config: How.
    """

    def __init__(self, sae: TopKSAE, config: SparseConfig):
        self.sae, self.config = sae, config
        self.unit_norm = not sae.tied if config.unit_norm is None else config.unit_norm
        self.optimizer = torch.optim.Adam(sae.parameters(), config.lr, eps=config.eps)
        self.steps = 0

    def step(self, x: torch.Tensor, view: torch.Tensor | None = None) -> dict[str, float]:
        """Takes one step on features (N, D) and their second view; returns the terms of the loss, see `TopKSAE.loss`.

        Rows are brought to unit length before a step and not after it: the last step leaves them a little off.
        """
        config = self.config
        warm = 1.0 if not config.warmup else min(1.0, (self.steps + 2) / config.warmup)
        self.optimizer.param_groups[0]["lr"] = config.lr * warm
        if self.unit_norm:
            self.sae.normalize_dictionary()
        terms = self.sae.loss(
            x,
            view,
            config.normalized,
            config.multi_weight,
            config.aux_weight,
            config.contrast,
            config.temperature,
        )
        self.optimizer.zero_grad()
        terms["total"].backward()
        if self.unit_norm:
            self.sae.project_gradient()
        self.optimizer.step()
        self.steps += 1
        return {name: term.item() for name, term in terms.items()}


def train_sparse(
    features: torch.Tensor, config: SparseConfig, seed: int = 0, views: torch.Tensor | None = None
) -> TopKSAE:
    """Trains an autoencoder; on one device, the same seed gives the same weights.

    Args:
        features: (N, D), of any float type; the training runs on their device in fp32.
        config: Size, loss and optimiser.
        seed: Seeds initial weights and the order of the samples.
        views: (N, D), the same samples seen again (another noise draw), for the contrastive term; None contrasts each
            sample with itself.

    Raises:
        DataError: The features are no finite matrix of two rows or more, or `views` has another shape.
        ConfigError: `views` would not be used, or k and the number of latents do not go together.
        DiffrepError: The loss is not finite.
    """
    _check(features, views, config)
    count, dim = features.shape
    latents = config.latents or config.expansion * dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        multi = config.multi_k and min(config.multi_k * config.k, latents)
        aux = min(config.aux_k, latents)
        sae = TopKSAE(dim, latents, config.k, config.tied, config.relu, multi, aux, config.dead_after)
    sae.b_dec.data = features.double().mean(0).float().cpu()  # the autoencoder explains what differs from the mean
    sae.to(features.device)
    trainer = SparseTrainer(sae, config)
    bar = tqdm(_batches(count, config, seed), "sparse", config.steps, unit="step")
    for number, rows in enumerate(bar):
        rows = rows.to(features.device)
        terms = trainer.step(features[rows].float(), None if views is None else views[rows].float())
        if not terms["total"] < float("inf"):
            raise DiffrepError(f"the loss is {terms['total']} at step {number}; lower lr or scale the features")
        if number % 20 == 0:
            bar.set_postfix({name: f"{term:.4f}" for name, term in terms.items()})
    return sae.eval()


@torch.no_grad()
def measure_sparse(sae: TopKSAE, features: torch.Tensor) -> dict[str, float]:
    """Measures an autoencoder by the latents that top-k leaves.

    Args:
        sae: The autoencoder.
        features: (N, D).

    Returns:
        "fvu", the share of the features' variance that is not reconstructed; "dead", the share of latents that are
        zero for every sample; "l0", the mean number of latents that are not.
    """
    mean = features.double().mean(0).float()
    error, variance, kept = 0.0, 0.0, torch.zeros(sae.b_enc.shape, dtype=torch.int64, device=features.device)
    for part in features.split(CHUNK):
        part = part.float()
        codes = sae.encode(part)
        error += (sae.decode(codes) - part).double().square().sum().item()
        variance += (part - mean).double().square().sum().item()
        kept += (codes != 0).sum(0)
    return {
        "fvu": error / variance,
        "dead": (kept == 0).double().mean().item(),
        "l0": kept.sum().item() / len(features),
    }


@dataclass(frozen=True)
class Latents:
    """What each latent of an autoencoder responds to.

    Attributes:
        mean: (L,) mean activation over the samples on which it fires; NaN where it never does.
        count: (L,) samples on which it fires.
        sparsity: (L,) their share.
        order: (L,) latents from the strongest mean activation to the weakest, those that fire on no more than ten
            samples last.
        index: (L, top) samples on which it fires most strongly, strongest first; -1 beyond those on which it fires.
        value: (L, top) its activations there.
        ids: Ids of these samples, for each latent; empty where none were given.
        entropy: (L,) entropy in nats of the labels of the first ten samples; 0 when all are of one class.
        purity: (L,) share of the most frequent label among them.
        label_std: (L,) standard deviation of the class numbers among them, which Revelio reports. It depends on how
            classes are numbered; it is here for comparison with published values, and `entropy` for judging.

    The last three are NaN where a latent never fires, and all NaN without labels; one sample has no deviation.
    """

    mean: torch.Tensor
    count: torch.Tensor
    sparsity: torch.Tensor
    order: torch.Tensor
    index: torch.Tensor
    value: torch.Tensor
    ids: list[list[str]]
    entropy: torch.Tensor
    purity: torch.Tensor
    label_std: torch.Tensor


@torch.no_grad()
def describe_latents(
    sae: TopKSAE,
    features: torch.Tensor,
    labels: torch.Tensor | None = None,
    ids: Sequence[str] | None = None,
    top: int = 20,
    selected: bool = True,
) -> Latents:
    """Finds what the latents respond to. An activation is the positive part of a latent.

    Args:
        sae: The autoencoder.
        features: (N, D).
        labels: (N,) int64.
        ids: N ids.
        top: Samples listed for each latent.
        selected: Look at the latents that top-k leaves. False looks at all, as Revelio's scripts do, by which a latent
            may be described by samples whose code it is no part of.

    Raises:
        DataError: `labels` or `ids` are not as many as the features.
    """
    for name, given in (("labels", labels), ("ids", ids)):
        if given is not None and len(given) != len(features):
            raise DataError(f"{len(given)} {name} for {len(features)} features")
    latents, top = len(sae.b_enc), min(top, len(features))
    total, count = torch.zeros(latents, dtype=torch.float64), torch.zeros(latents, dtype=torch.int64)
    value, index = torch.zeros(latents, 0), torch.zeros(latents, 0, dtype=torch.int64)
    for start in tqdm(range(0, len(features), CHUNK), "latents", unit="chunk"):
        part = features[start : start + CHUNK].float()
        active = (sae.encode(part) if selected else sae.preactivations(part)).relu().cpu()
        total, count = total + active.sum(0, dtype=torch.float64), count + (active > 0).sum(0)
        strongest, places = active.T.topk(min(top, len(part)), dim=1)
        value, index = torch.cat([value, strongest], 1), torch.cat([index, places + start], 1)
        value, chosen = value.topk(min(top, value.shape[1]), dim=1)
        index = index.gather(1, chosen)
    index = index.masked_fill(value <= 0, -1)
    mean = (total / count).float()
    ranked = torch.where(count > RARE, mean, 0).argsort(descending=True, stable=True)
    names = [] if ids is None else [[ids[i] for i in row if i >= 0] for row in index.tolist()]
    judged = _judge_labels(index, labels) if labels is not None else torch.full((latents, 3), torch.nan)
    return Latents(mean, count, count / len(features), ranked, index, value, names, *judged.unbind(1))


def _judge_labels(index: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns entropy, purity and deviation (L, 3) of the labels of each latent's first samples."""
    rows = []
    for places in index[:, :JUDGED]:
        found = labels.cpu()[places[places >= 0]]
        if not len(found):
            rows.append([torch.nan] * 3)
            continue
        shares = found.unique(return_counts=True)[1] / len(found)
        spread = found.float().std().item() if len(found) > 1 else torch.nan
        rows.append([torch.special.entr(shares).sum().item(), shares.max().item(), spread])
    return torch.tensor(rows)


def _batches(count: int, config: SparseConfig, seed: int) -> Iterator[torch.Tensor]:
    """Gives the rows of each step; permutations stand one after another, so a batch may span two of them."""
    generator = torch.Generator().manual_seed(seed)
    size, order = min(config.batch_size, count), torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:size], order[size:]
        yield rows


def _check(features: torch.Tensor, views: torch.Tensor | None, config: SparseConfig) -> None:
    if features.ndim != 2 or len(features) < 2 or not features.is_floating_point():
        raise DataError(
            f"a sparse autoencoder takes floats (N, D) of two samples or more, got {features.dtype} "
            f"{tuple(features.shape)}; pool maps first"
        )
    if views is not None and views.shape != features.shape:
        raise DataError(f"views must be {tuple(features.shape)} like the features, got {tuple(views.shape)}")
    for name, given in (("features", features), ("views", views)):
        if given is not None and not torch.isfinite(given).all():
            raise DataError(f"the {name} hold NaN or infinity")
    if views is not None and not config.contrast:
        raise ConfigError("views were given and would not be used; set contrast, such as 0.1, or leave them out")
