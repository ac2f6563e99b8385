import math

import pytest
import torch

from diffrep.config import load_config
from diffrep.config.feedback import SparseConfig
from diffrep.errors import ConfigError, DataError
from diffrep.heads.sparse import TopKSAE
from diffrep.probe.sparse import describe_latents, measure_sparse, train_sparse

CONFIG = SparseConfig(k=2, latents=32, steps=150, batch_size=64, lr=5e-3, warmup=20)


@pytest.fixture(scope="module")
def features():
    """Sums of two of eight directions: what a sparse code of two latents can say."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, 16, generator=generator)
    chosen = torch.rand(300, 8, generator=generator).topk(2).indices
    return directions[chosen].sum(1)


def test_training_explains_the_features(features):
    before = measure_sparse(train_sparse(features, CONFIG.model_copy(update={"steps": 1})), features)
    after = measure_sparse(train_sparse(features, CONFIG), features)
    assert before["fvu"] > 0.5
    assert after["fvu"] < 0.3
    assert after["l0"] == 2
    assert 0 <= after["dead"] < 1


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(features):
    config = CONFIG.model_copy(update={"steps": 5})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (train_sparse(features, config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["W_enc"], other["W_enc"])


def test_csr_with_two_views_draws_them_together(features):
    noise = 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    config = SparseConfig.csr(k=2, latents=32, aux_k=8, steps=100, batch_size=64, lr=5e-3, contrast=1.0)
    assert (config.tied, config.relu, config.multi_k, config.eps) == (True, True, 4, 6.25e-10)

    def agreement(sae):
        with torch.no_grad():
            return torch.cosine_similarity(sae.encode(features), sae.encode(features + noise)).mean()

    sae = train_sparse(features, config, views=features + noise)
    assert sae.multi_k == 8
    assert agreement(sae) > agreement(train_sparse(features, config.model_copy(update={"steps": 1})))


def test_aux_k_is_at_most_the_number_of_latents(features):
    assert train_sparse(features, SparseConfig.csr(k=2, latents=32, steps=2)).aux_k == 32


def test_latents_are_described_by_what_top_k_leaves():
    """Latents 0 and 1 answer to one class each, 2 to both but never wins, 3 to nothing."""
    sae = TopKSAE(2, 4, 1)
    state = {"W_enc": torch.tensor([[1.0, 0, 0.5, 0], [0, 1.0, 0.5, 0]]), "b_enc": torch.tensor([0, 0, 0, -1.0])}
    sae.load_state_dict(state | {"W_dec": torch.zeros(4, 2), "b_dec": torch.zeros(2)})
    labels = torch.tensor([0, 1, 1] * 8)
    features = torch.eye(2)[labels] * torch.linspace(1, 2, 24)[:, None]
    found = describe_latents(sae, features, labels, [f"s{i}" for i in range(24)], top=3)
    assert found.count.tolist() == [8, 16, 0, 0]
    assert found.sparsity.tolist() == pytest.approx([8 / 24, 16 / 24, 0, 0])
    assert found.order[0] == 1  # latent 0 fires too rarely to be ranked
    assert found.index.tolist() == [[21, 18, 15], [23, 22, 20], [-1] * 3, [-1] * 3]
    assert found.ids == [["s21", "s18", "s15"], ["s23", "s22", "s20"], [], []]
    assert found.purity[:2].tolist() == [1, 1]
    assert found.entropy[:2].tolist() == [0, 0]
    assert found.mean[:2].tolist() == pytest.approx([features[labels == c, c].mean().item() for c in (0, 1)])
    assert found.mean[2:].isnan().all()
    assert found.entropy[2:].isnan().all()
    every = describe_latents(sae, features, labels, top=20, selected=False)
    assert every.count.tolist() == [8, 16, 24, 0]
    shares = torch.bincount(labels[every.index[2, :10]]) / 10
    assert every.entropy[2].item() == pytest.approx(-(shares * shares.log()).sum().item())
    assert every.purity[2].item() == pytest.approx(shares.max().item())
    assert every.ids == []


def test_without_labels_nothing_is_judged():
    found = describe_latents(TopKSAE(4, 8, 2), torch.randn(5, 4))
    assert found.index.shape == (8, 5)
    assert all(math.isnan(value) for value in found.entropy.tolist())


def test_errors(features):
    with pytest.raises(DataError, match=r"two samples or more, got torch.float32 \(3, 4, 2, 2\)"):
        train_sparse(torch.zeros(3, 4, 2, 2), CONFIG)
    broken = features.clone()
    broken[3, 2] = math.nan
    with pytest.raises(DataError, match="the features hold NaN"):
        train_sparse(broken, CONFIG)
    with pytest.raises(ConfigError, match="views were given and would not be used"):
        train_sparse(features, CONFIG, views=features)
    with pytest.raises(DataError, match="views must be"):
        train_sparse(features, SparseConfig.csr(), views=features[:3])
    with pytest.raises(ConfigError, match="k is 40; with 32 latents"):
        train_sparse(features, CONFIG.model_copy(update={"k": 40}))
    with pytest.raises(DataError, match="2 labels for 300 features"):
        describe_latents(TopKSAE(16, 8, 2), features, torch.zeros(2))
    with pytest.raises(ConfigError, match="contrast"):
        load_config(SparseConfig, [], ["contrasts=1"])
