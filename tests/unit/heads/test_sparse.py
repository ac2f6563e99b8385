import pytest
import torch

from diffrep.errors import CheckpointError, ConfigError
from diffrep.heads.sparse import TopKSAE, info_nce


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def csr_state(dim=6, latents=24):
    weight = torch.randn(latents, dim)
    return {
        "pre_bias": torch.randn(dim),
        "latent_bias": torch.randn(latents),
        "encoder.weight": weight,
        "decoder.linear.weight": weight,
        "stats_last_nonzero": torch.zeros(latents, dtype=torch.int64),
        "pre_trained_backbone.fc.weight": torch.zeros(3, 3),
    }


@pytest.mark.parametrize("relu", [True, False])
def test_only_k_latents_are_kept_and_a_relu_drops_the_negative_among_them(relu):
    sae = TopKSAE(6, 24, 4, relu=relu)
    sae.b_enc.data.fill_(-10)  # all latents are negative
    codes = sae.encode(torch.randn(5, 6))
    assert (codes != 0).sum(1).tolist() == [0 if relu else 4] * 5
    assert (sae.encode(torch.randn(5, 6), k=7) != 0).sum(1).max() == (0 if relu else 7)


@pytest.mark.parametrize("tied", [True, False])
def test_the_sum_of_rows_is_the_matrix_product_in_values_and_gradients(tied):
    sae, x = TopKSAE(6, 24, 4, tied=tied).double(), torch.randn(5, 6, dtype=torch.float64)
    dense = sae.decode(sae.encode(x))
    torch.testing.assert_close(sae(x), dense)
    wanted = torch.autograd.grad(dense.square().sum(), list(sae.parameters()))
    torch.testing.assert_close(torch.autograd.grad(sae(x).square().sum(), list(sae.parameters())), wanted)


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_csr_keys(wrapped):
    state = csr_state()
    sae = TopKSAE.from_state({wrapped + key: value for key, value in state.items()}, k=4)
    assert sae.tied
    assert sae.relu
    x = torch.randn(5, 6)
    values, index = ((x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]).topk(4)
    codes = torch.zeros(5, 24).scatter(1, index, values.relu())
    torch.testing.assert_close(sae(x), codes @ state["encoder.weight"] + state["pre_bias"])


def test_openai_keys_with_a_decoder_of_its_own():
    state = csr_state() | {"decoder.weight": torch.randn(6, 24)}
    sae = TopKSAE.from_state(state, k=4)
    assert not sae.tied
    assert torch.equal(sae.dictionary, state["decoder.weight"].T)


def test_its_own_state_comes_back():
    sae = TopKSAE(6, 24, 4, tied=True)
    again = TopKSAE.from_state(sae.state_dict(), k=4)
    assert again.tied
    x = torch.randn(5, 6)
    assert torch.equal(again(x), sae(x))


def test_saved_and_loaded_as_a_folder(tmp_path):
    sae = TopKSAE(6, 24, 4, relu=True, aux_k=3)
    sae.save_pretrained(tmp_path)
    again = TopKSAE.from_pretrained(tmp_path)
    assert (again.k, again.relu, again.aux_k) == (4, True, 3)
    x = torch.randn(5, 6)
    assert torch.equal(again(x), sae(x))


def test_dead_latents_are_counted_in_training_and_learn_from_what_is_left_over():
    sae = TopKSAE(6, 24, 2, relu=True, aux_k=8, dead_after=3)
    sae.b_enc.data[10:] = -100  # these never fire
    x = torch.randn(50, 6)
    for _ in range(2):
        assert sae.loss(x)["aux"] == 0  # nobody is dead yet
    loss = sae.loss(x)
    assert (sae.idle[10:] == 3).all()
    assert (sae.idle[:10] == 0).any()
    sae.b_enc.data[10:] = 0
    loss = sae.eval().loss(x)
    assert loss["aux"] > 0
    (gradient,) = torch.autograd.grad(loss["aux"], sae.W_enc)
    assert gradient[:, 10:].abs().sum() > 0
    assert gradient[:, sae.idle < 3].abs().sum() == 0
    assert (sae.idle[10:] == 3).all()  # evaluation counts nothing


def test_aux_k_may_be_zero_or_exceed_the_dead():
    x = torch.randn(50, 6)
    assert "aux" not in TopKSAE(6, 24, 2).loss(x)
    sae = TopKSAE(6, 24, 2, aux_k=24, dead_after=1)
    sae.b_enc.data[20:] = -100
    assert torch.isfinite(sae.loss(x)["total"])


def test_terms_are_weighed():
    sae, x, view = TopKSAE(6, 24, 2, multi_k=8), torch.randn(50, 6), torch.randn(50, 6)
    terms = sae.loss(x, view, normalized=False, multi_weight=0.5, contrast_weight=0.1)
    torch.testing.assert_close(terms["error"], torch.nn.functional.mse_loss(sae(x), x))
    torch.testing.assert_close(terms["multi"], torch.nn.functional.mse_loss(sae.decode(sae.encode(x, 8)), x))
    torch.testing.assert_close(terms["total"], terms["error"] + 0.5 * terms["multi"] + 0.1 * terms["contrast"])
    assert terms["contrast"] > sae.loss(x, contrast_weight=0.1)["contrast"]  # equal views are the easier pairs


def test_a_batch_without_variance_has_no_loss():
    assert TopKSAE(6, 24, 2).loss(torch.ones(3, 6))["total"] == 0


def test_info_nce_is_that_of_its_definition():
    first, second = torch.randn(3, 5), torch.randn(3, 5)
    vectors = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    similar = (vectors @ vectors.T / 0.2).exp()
    losses = []
    for i in range(6):
        partner = (i + 3) % 6
        others = sum(similar[i, j] for j in range(6) if j not in (i, partner))
        losses.append(-(similar[i, partner] / (similar[i, partner] + others)).log())
    torch.testing.assert_close(info_nce(first, second, 0.2), torch.stack(losses).mean())


def test_the_projected_gradient_is_orthogonal_to_the_rows():
    for tied in (True, False):
        sae = TopKSAE(6, 24, 4, tied=tied)
        sae.normalize_dictionary()
        sae.loss(torch.randn(20, 6))["total"].backward()
        sae.project_gradient()
        gradient = sae.W_enc.grad.T if tied else sae.W_dec.grad
        torch.testing.assert_close((gradient * sae.dictionary).sum(1), torch.zeros(24), atol=1e-6, rtol=0)


def test_errors():
    with pytest.raises(ConfigError, match="k is 25; with 24 latents it lies between 1 and 24"):
        TopKSAE(6, 24, 25)
    with pytest.raises(ConfigError, match="multi_k is 3; with 24 latents it lies between 4 and 24"):
        TopKSAE(6, 24, 4, multi_k=3)
    with pytest.raises(CheckpointError, match=r"no sparse autoencoder: keys \['fc.weight'\]"):
        TopKSAE.from_state({"fc.weight": torch.ones(1)}, 4)
    state = TopKSAE(6, 24, 4).state_dict()
    state.pop("b_enc")
    with pytest.raises(CheckpointError, match="not those of a sparse autoencoder"):
        TopKSAE.from_state(state, 4)
