"""TopKSAE against Revelio's k-SAE: its forward, three training steps and the statistics of its latents."""

import pytest
import torch
from safetensors.torch import load_file

from diffrep.config.feedback import SparseConfig
from diffrep.heads.sparse import TopKSAE
from diffrep.probe.sparse import SparseTrainer, describe_latents

K = 6


@pytest.fixture(scope="module")
def stored(golden):
    return load_file(golden / "sparse" / "revelio_ksae.safetensors")


def autoencoder(stored, prefix):
    state = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    return TopKSAE.from_state(state, K)


def test_forward_and_loss(stored):
    sae, x = autoencoder(stored, "sd0."), stored["input"]
    assert not sae.tied
    assert not sae.relu
    torch.testing.assert_close(sae.preactivations(x), stored["hidden_pre"], atol=1e-6, rtol=0)
    codes = sae.encode(x)
    torch.testing.assert_close(codes, stored["latent_topk_dense"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sae(x), stored["reconstruction"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sae.decode(codes), stored["reconstruction"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sae.loss(x)["total"][None], stored["loss"], atol=2e-6, rtol=0)


def test_three_training_steps(stored):
    sae = autoencoder(stored, "sd0.")
    sae.b_dec.data = stored["b_dec_after_init_mean"].clone()
    torch.testing.assert_close(stored["input"].mean(0), sae.b_dec.data, atol=1e-6, rtol=0)
    trainer, losses, rates = SparseTrainer(sae, SparseConfig(k=K)), [], []
    for rows in stored["input"][:48].split(16):
        losses.append(trainer.step(rows)["total"])
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert losses == pytest.approx(stored["train_losses"].tolist(), abs=2e-6)
    assert rates == pytest.approx(stored["train_lrs"].tolist(), rel=1e-12)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(value, stored[f"sd3.{name}"], atol=1e-6, rtol=0)


def test_statistics_of_latents(stored):
    """Of all latents before top-k, as published; only the choice of the top samples is the peer's own code."""
    sae = autoencoder(stored, "sd3.")
    found = describe_latents(sae, stored["input"], stored["labels"], selected=False)
    torch.testing.assert_close(found.mean, stored["mean_acts"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sparsity, stored["sparsity"], atol=1e-6, rtol=0)
    assert torch.equal(found.order, stored["neuron_order"])
    assert torch.equal(found.index, stored["max_act_indices"])
    torch.testing.assert_close(found.value, stored["max_act_values"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.label_std[found.order], stored["label_std_top10"], atol=1e-6, rtol=0)
