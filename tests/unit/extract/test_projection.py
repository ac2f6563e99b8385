"""Principal components of features."""

import pytest
import torch
from safetensors.torch import load_file

from diffrep.config import ExtractConfig, validate
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.extract.job import run_extract
from diffrep.extract.projection import fit_pca
from diffrep.testing import save_images


def features(count=200):
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    scales = torch.tensor([9.0, 4, 2, 1, 0.5, 0.1])
    return torch.randn(count, 6, generator=generator) * scales @ axes + 50, axes


def test_the_components_are_those_of_the_covariance(tmp_path):
    vectors, axes = features()
    share = fit_pca(vectors, tmp_path / "pca.safetensors", 3)
    found = load_file(tmp_path / "pca.safetensors")
    torch.testing.assert_close(found["mean"], vectors.mean(0))
    components = found["components"]
    torch.testing.assert_close(components @ components.T, torch.eye(3))
    centred = (vectors - vectors.mean(0)).double()
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((components.double() @ right[:3].T).abs(), torch.eye(3).double(), atol=1e-6, rtol=0)
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()
    assert share == pytest.approx(float(singular[:3].square().sum() / singular.square().sum()), rel=1e-6)


def test_of_maps_each_position_counts(tmp_path):
    vectors, _ = features(600)
    maps = vectors.reshape(150, 2, 2, 6).permute(0, 3, 1, 2)
    assert fit_pca(maps, tmp_path / "maps", 4) == pytest.approx(fit_pca(vectors, tmp_path / "vectors", 4))
    one, other = (load_file(tmp_path / name) for name in ("maps", "vectors"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-5)


def test_of_a_store(tmp_path):
    backbone = {"source": "pixels", "family": "prepare", "device": "cpu"}
    values = {"backbone": backbone, "data": str(save_images(tmp_path / "images")), "out": str(tmp_path / "store")}
    values["request"] = {"layers": ["latents"], "levels": ["clean"], "dtype": "float32"}
    store = run_extract(validate(ExtractConfig, values))
    fit_pca(store, tmp_path / "store.safetensors", 2, layer="latents", split="train")
    fit_pca(store.tensor("latents", "clean", "train"), tmp_path / "tensor.safetensors", 2)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("store", "tensor"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match="name the layer .* latents"):
        fit_pca(store, tmp_path / "x", 2)
    with pytest.raises(UnknownNameError, match="latents"):
        fit_pca(store, tmp_path / "x", 2, layer="latent")


def test_no_more_components_than_there_are(tmp_path):
    vectors, _ = features()
    for given, width, message in (
        (vectors, 7, "6 channels have 1 to 6"),
        (vectors, 0, "1 to 6"),
        (vectors[:3], 3, "1 to 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_pca(given, tmp_path / "pca.safetensors", width)
    assert not (tmp_path / "pca.safetensors").exists()
