"""The TopK sparse autoencoder: one class for Revelio's k-SAE and for CSR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.errors import CheckpointError, ConfigError
from diffrep.heads.head import Head

# Names in OpenAI's sparse_autoencoder, from which CSR derives -> (names here, whether the matrix lies transposed).
OPENAI_KEYS = {
    "pre_bias": ("b_dec", False),
    "latent_bias": ("b_enc", False),
    "encoder.weight": ("W_enc", True),
    "decoder.weight": ("W_dec", True),
}
# A latent counts as firing above this, as in CSR.
FIRING = 1e-5


class TopKSAE(Head):
    """A sparse autoencoder that keeps the k greatest latents of each sample.

    pre = (x - b_dec) W_enc + b_enc, z = TopK_k(pre), reconstruction = z W_dec + b_dec (Makhzani and Frey, 2014; Gao et
    al., 2024). As it is by default, untied and without a ReLU, so that negative values may be kept, it is Revelio's
    k-SAE with that repository's keys; with `tied`, `relu`, `multi_k` and `aux_k` it is CSR (Wen et al., 2025).

    Args:
        dim: Length of a feature, D.
        latents: Number of latents, L.
        k: Latents kept of each sample.
        tied: Decode with the encoder's transpose; there is no `W_dec` then.
        relu: Set negative latents among the kept ones to zero.
        multi_k: A second, larger k that the loss reconstructs with too, so that prefixes of many lengths serve; None
            for none. CSR takes 4 k.
        aux_k: Dead latents that the loss lets explain what the live ones leave over; 0 for none.
        dead_after: Training steps without firing after which a latent is dead.

    Attributes:
        idle: (L,) int64, training steps since each latent last fired; not saved.

    Raises:
        ConfigError: k, `multi_k` or `aux_k` lies outside 1 to `latents`.
    """

    applied: ClassVar[str] = "head.encode({features})"

    def __init__(
        self,
        dim: int,
        latents: int,
        k: int,
        tied: bool = False,
        relu: bool = False,
        multi_k: int | None = None,
        aux_k: int = 0,
        dead_after: int = 30,
    ):
        super().__init__()
        for name, value, least in (("k", k, 1), ("multi_k", multi_k or k, k), ("aux_k", aux_k, 0)):
            if not least <= value <= latents:
                raise ConfigError(f"{name} is {value}; with {latents} latents it lies between {least} and {latents}")
        self.k, self.tied, self.relu = k, tied, relu
        self.multi_k, self.aux_k, self.dead_after = multi_k, aux_k, dead_after
        self.W_enc = nn.Parameter(torch.empty(dim, latents))
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(dim))
        self.register_buffer("idle", torch.zeros(latents, dtype=torch.int64), persistent=False)
        if tied:  # the initialisation of nn.Linear, which holds the matrix in CSR
            nn.init.uniform_(self.W_enc, -(dim**-0.5), dim**-0.5)
        else:
            nn.init.kaiming_uniform_(self.W_enc)
            self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(latents, dim)))
            self.normalize_dictionary()

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor], k: int, **options: object) -> TopKSAE:
        """Builds the autoencoder of a published state dict: Revelio's keys, or those of CSR and OpenAI.

        What else a CSR checkpoint holds, its backbone and its counters, is left out.

        Args:
            state: Names and tensors.
            k: Latents kept of each sample, which no checkpoint tells.
            options: Further arguments of the class; `relu` is on for the keys of CSR.

        Raises:
            CheckpointError: The keys are none of these.
        """
        state = {name.removeprefix("module."): value for name, value in state.items()}
        if "encoder.weight" in state:
            options = {"relu": True} | options
            moved = {name: place for name, place in OPENAI_KEYS.items() if name in state}
            state = {new: state[old].T.contiguous() if turn else state[old] for old, (new, turn) in moved.items()}
        if "W_enc" not in state:
            raise CheckpointError(
                f"no sparse autoencoder: keys {sorted(state)[:6]}; expected W_enc, b_enc, b_dec and, untied, W_dec "
                f"(Revelio), or {', '.join(OPENAI_KEYS)} (CSR, OpenAI)"
            )
        sae = cls(*state["W_enc"].shape, k, **{"tied": "W_dec" not in state} | options)
        try:
            sae.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"the weights are not those of a sparse autoencoder: {error}") from error
        return sae

    @property
    def dictionary(self) -> torch.Tensor:
        """What each latent writes, (L, D): `W_dec`, or the transpose of `W_enc` when tied."""
        return self.W_enc.T if self.tied else self.W_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstructs features (N, D)."""
        return self._write(*self._select(self.preactivations(x), self.k))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the latents (N, L) of features (N, D) before any are dropped."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor, k: int | None = None) -> torch.Tensor:
        """Returns the sparse codes (N, L) of features (N, D), with `k` in place of the autoencoder's own."""
        pre = self.preactivations(x)
        return self._dense(pre, *self._select(pre, k or self.k))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the features (N, D) that codes (N, L) stand for."""
        return codes @ self.dictionary + self.b_dec

    def loss(
        self,
        x: torch.Tensor,
        view: torch.Tensor | None = None,
        normalized: bool = True,
        multi_weight: float = 1 / 8,
        aux_weight: float = 1 / 32,
        contrast_weight: float = 0.0,
        temperature: float = 0.2,
    ) -> dict[str, torch.Tensor]:
        """Returns the training loss; in training mode it also counts for how long each latent has not fired.

        Args:
            x: Features (N, D).
            view: Another view (N, D) of the same samples, such as another noise draw, for the contrastive term. None
                contrasts x with itself, as CSR's code does: its positive pairs are then equal, and only the negative
                ones teach.
            normalized: Divide the squared errors by the variance mean((x - mean over the batch)^2), as Revelio does.
            multi_weight: Weight of the reconstruction with `multi_k` latents.
            aux_weight: Weight of the squared error of the dead latents on what is left over, over its variance.
            contrast_weight: Weight of InfoNCE between the codes of the two views (Chen et al., 2020).
            temperature: Of InfoNCE.

        Returns:
            "total" (), and its terms without their weights: "error", "multi", "aux" and "contrast".
        """
        pre = self.preactivations(x)
        values, index = self._select(pre, self.k)
        written = self._write(values, index)
        scale = _variance(x) if normalized else None
        terms = {"error": _error(written, x, scale)}
        total = terms["error"]
        if self.training:
            fired = torch.zeros_like(self.idle).index_add_(
                0, index.flatten(), (values.detach() > FIRING).flatten().long()
            )
            self.idle = torch.where(fired > 0, 0, self.idle + 1)
        if self.multi_k:
            terms["multi"] = _error(self._write(*self._select(pre, self.multi_k)), x, scale)
            total = total + multi_weight * terms["multi"]
        if self.aux_k:
            terms["aux"] = self._aux(pre, x - written.detach())
            total = total + aux_weight * terms["aux"]
        if contrast_weight:
            codes = self._dense(pre, values, index)
            other = codes if view is None else self.encode(view)
            terms["contrast"] = info_nce(codes, other, temperature)
            total = total + contrast_weight * terms["contrast"]
        return {"total": total, **terms}

    @torch.no_grad()
    def normalize_dictionary(self) -> None:
        """Brings every latent's row of the dictionary to unit length."""
        rows = self.dictionary.data
        rows /= rows.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Removes from the dictionary's gradient what is parallel to its unit rows: their length is not learned."""
        rows, grad = self.dictionary.data, self.W_enc.grad.T if self.tied else self.W_dec.grad
        grad -= (grad * rows).sum(1, keepdim=True) * rows

    def _select(self, pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns values and places (N, k) of the greatest latents."""
        values, index = pre.topk(k, dim=-1)
        return (values.relu() if self.relu else values), index

    @staticmethod
    def _dense(pre: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(pre).scatter(-1, index, values)

    def _write(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        # A sum of k rows: the full matrix product would be a thousand times the work at 81,920 latents and k = 32.
        table = self.dictionary.contiguous()
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=values) + self.b_dec

    def _aux(self, pre: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        dead = self.idle >= self.dead_after
        values, index = pre.masked_fill(~dead, -torch.inf).topk(self.aux_k, dim=-1)
        values = values.masked_fill(values.isinf(), 0)  # there may be fewer dead latents than aux_k
        guess = self._write(values.relu() if self.relu else values, index)
        target = residual + self.b_dec.detach()
        return _error(guess, target, _variance(target)) * dead.any()


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE over a batch of pairs, NT-Xent (Chen et al., 2020, SimCLR).

    Each of the 2N vectors is told from the 2N - 2 of other samples by its cosine with its partner.

    Args:
        first: (N, L).
        second: (N, L), partners of `first`.
        temperature: Divides the cosines.
    """
    vectors = F.normalize(torch.cat([first, second]), dim=-1)
    cosines = vectors @ vectors.T / temperature
    cosines = cosines.masked_fill(torch.eye(len(vectors), dtype=torch.bool, device=vectors.device), -torch.inf)
    partner = torch.arange(len(vectors), device=vectors.device).roll(len(first))
    return F.cross_entropy(cosines, partner)


def _variance(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)).square().mean()


def _error(written: torch.Tensor, x: torch.Tensor, variance: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean squared error, over the variance where that is given; 0 where nothing varies."""
    error = (written - x).square().mean()
    if variance is None:
        return error
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0)
