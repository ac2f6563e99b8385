import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffrep.config.probe import SGDConfig
from diffrep.errors import ConfigError
from diffrep.probe.sgd import LinearSpec, SGDHeads, batches, linear_specs

NORMS = ("none", "batch", "layer", "standard")
DINO_LRS = tuple(m * 10.0**e for e in (-5, -4, -3, -2) for m in (1, 2, 5)) + (0.1,)


def blobs(count, classes=3, dim=12, seed=0):
    """Gaussian clouds of unequal scale, one a class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    x = (centres[labels] + rng.normal(size=(count, dim))) * np.linspace(0.5, 2, dim) + 1
    return torch.tensor(x).float(), torch.from_numpy(labels)


def norm_of(name, x):
    """The norm as a module, or a function with the training samples' moments."""
    if name == "batch":
        return nn.BatchNorm1d(x.shape[1], eps=1e-6, affine=False)
    if name == "layer":
        return nn.LayerNorm(x.shape[1], elementwise_affine=False)
    mean, std = (x.mean(0), x.std(0, correction=0)) if name == "standard" else (0, 1)
    return lambda values: (values - mean) / std


def train_alone(spec, config, seed, x, y, queries):
    """One head as one would train it by hand: autograd, torch.optim.SGD and its cosine schedule."""
    classes = y.shape[1] if y.ndim == 2 else 3
    steps = config.iterations or -(-config.epochs * len(x) // config.batch_size)
    norm, linear = norm_of(spec.norm, x), nn.Linear(x.shape[1], classes)
    start = torch.randn(x.shape[1], classes, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        linear.weight.copy_(config.init_std * start.T)
        linear.bias.zero_()
    lr = spec.lr * config.batch_size / 256 if config.scale_lr else spec.lr
    optimizer = torch.optim.SGD(linear.parameters(), lr, config.momentum, weight_decay=spec.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    for rows in batches(len(x), config.batch_size, steps, seed):
        scores = linear(norm(x[rows]))
        if y.ndim == 2:
            loss = F.binary_cross_entropy_with_logits(scores, y[rows].float(), reduction="sum") / len(rows)
        else:
            loss = F.cross_entropy(scores, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if isinstance(norm, nn.Module):
        norm.eval()
    return linear(norm(queries)).detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("several_labels", [False, True])
def test_every_head_is_what_torchs_sgd_makes_of_it_alone(momentum, several_labels):
    config = SGDConfig(
        norms=NORMS, lrs=(0.01, 0.3, 1.0), weight_decays=(0.0, 0.05), momentum=momentum, epochs=3, batch_size=32
    )
    x, y = blobs(100)
    if several_labels:
        y = torch.stack([y == 0, y > 0, x[:, 0] > 1, x[:, 1] > 0], dim=1).long()
    queries, _ = blobs(40, seed=1)
    specs = linear_specs(config)
    heads = SGDHeads(specs, config, seed=3).fit(x, y)
    found = heads.scores(queries)
    assert found.shape == (len(specs), 40, 4 if several_labels else 3)
    for i, spec in enumerate(specs):
        alone = train_alone(spec, config, 3, x, y, queries)
        torch.testing.assert_close(found[i], alone, atol=2e-5, rtol=1e-4, msg=lambda text, s=spec: f"{s}: {text}")
        head = heads.head(i)
        assert head.kind == spec.norm
        torch.testing.assert_close(head(queries), found[i], atol=1e-5, rtol=1e-5)


def test_company_changes_nothing_not_even_a_head_that_diverges():
    x, y = blobs(90)
    config = SGDConfig(norms=NORMS, lrs=(0.1, 1e30), weight_decays=(0.0, 0.1), batch_size=16, epochs=2)
    specs = linear_specs(config)
    together = SGDHeads(specs, config, seed=0).fit(x, y).scores(x)
    assert not torch.isfinite(together[specs.index(LinearSpec("none", 1e30, 0.1))]).all()
    for i, spec in enumerate(specs):
        if spec.lr == 0.1:
            torch.testing.assert_close(together[i], SGDHeads((spec,), config, seed=0).fit(x, y).scores(x)[0])


def test_dinov2s_52_heads_at_batch_32_stay_52():
    config = SGDConfig(norms=("none", "batch"), lrs=DINO_LRS, weight_decays=(0.0, 1e-4), batch_size=32, epochs=2)
    specs = linear_specs(config)
    rates = {spec.effective_lr(config) for spec in specs}
    assert len(specs) == len(set(specs)) == 52
    assert len({f"{rate:.5f}" for rate in rates}) < len(rates) == 13, "DINOv2's keys would collide"
    x, y = blobs(96)
    heads = SGDHeads(specs, config, seed=0).fit(x, y)
    scores = heads.scores(x)[[i for i, spec in enumerate(specs) if spec.weight_decay == 0]].flatten(1)
    apart = (scores[:, None] - scores).abs().amax(-1) + torch.eye(len(scores))
    assert apart.min() > 1e-5


def test_learning_rates_scale_with_the_batch_only_when_asked():
    spec = LinearSpec("batch", 0.1, 0.0)
    assert spec.effective_lr(SGDConfig(batch_size=64)) == pytest.approx(0.025)
    assert spec.effective_lr(SGDConfig(batch_size=64, scale_lr=False)) == 0.1


def test_batches_are_full_and_show_every_sample_equally_often():
    drawn = list(batches(10, 4, 5, seed=0))
    assert [len(rows) for rows in drawn] == [4] * 5
    assert torch.bincount(torch.cat(drawn)).tolist() == [2] * 10
    assert torch.cat(drawn)[:10].sort().values.tolist() == list(range(10))
    assert [len(rows) for rows in batches(3, 8, 2, seed=0)] == [8, 8]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = list(batches(10, 4, 5, seed=0))
    assert torch.equal(torch.cat(again), torch.cat(drawn))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.cat(list(batches(10, 4, 5, seed=1))), torch.cat(drawn))


def test_iterations_replace_epochs_and_chunks_change_nothing(monkeypatch):
    x, y = blobs(60)
    specs = (LinearSpec("batch", 0.1, 0.0), LinearSpec("standard", 0.1, 0.0))
    by_epochs = SGDHeads(specs, SGDConfig(batch_size=20, epochs=2), 0).fit(x, y)
    by_steps = SGDHeads(specs, SGDConfig(batch_size=20, iterations=6), 0).fit(x.half().view(60, 3, 2, 2), y, 3)
    whole = by_epochs.scores(x)
    torch.testing.assert_close(by_steps.scores(x), whole, atol=5e-3, rtol=5e-3)
    monkeypatch.setattr("diffrep.probe.sgd.CHUNK", 7)
    torch.testing.assert_close(by_epochs.scores(x), whole)


def test_a_class_that_no_training_sample_has():
    x, y = blobs(60)
    scores = SGDHeads((LinearSpec("batch", 0.5, 0.0),), SGDConfig(epochs=5, batch_size=16), 0).fit(x, y, 5).scores(x)
    assert scores.shape == (1, 60, 5)
    assert (scores[0].argmax(1) == y).float().mean() > 0.9


def test_batch_norm_refuses_batches_of_one():
    with pytest.raises(ConfigError, match='norm "batch" needs a batch_size of 2 or more'):
        SGDHeads((LinearSpec("batch", 0.1, 0.0),), SGDConfig(batch_size=1), 0)


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_heads():
    x, y = blobs(100)
    config = SGDConfig(norms=NORMS, lrs=(0.1, 0.5), epochs=3, batch_size=32)
    specs = linear_specs(config)
    on_cpu = SGDHeads(specs, config, 0).fit(x, y)
    on_gpu = SGDHeads(specs, config, 0, "cuda").fit(x, y)
    torch.testing.assert_close(on_gpu.scores(x).cpu(), on_cpu.scores(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(on_gpu.head(0)(x), on_gpu.scores(x)[0].cpu(), atol=1e-4, rtol=1e-4)
