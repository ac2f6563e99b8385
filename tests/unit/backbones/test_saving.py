import pytest
import torch
from safetensors.torch import save_file

from diffrep import load_backbone
from diffrep.backbones.saving import options_of, save_backbone
from diffrep.config import BackboneConfig
from diffrep.errors import CheckpointError, ConfigError
from diffrep.noise import DiscreteSchedule


def moved(folder, **options):
    """A backbone whose weights are no longer the folder's."""
    backbone = load_backbone(folder, device="cpu", **options)
    generator = torch.Generator().manual_seed(5)
    for weight in backbone.network.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return backbone


@pytest.mark.parametrize(
    "kind", ["unet2d", "unet2d-condition", "transformer2d", "sd3", "diffusers-dit", "dit", "sit", "repa", "adm", "edm"]
)
def test_backbones_are_saved_as_they_are(folder_of, tmp_path, kind):
    family = kind if kind == "diffusers-dit" else None
    backbone = moved(folder_of("dit" if family else kind), family=family)
    state = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    save_backbone(backbone, backbone.network, tmp_path)
    again = load_backbone(tmp_path, device="cpu", **options_of(backbone))
    assert type(again) is type(backbone)
    assert again.schedule.describe() == backbone.schedule.describe()
    assert again.codec.describe() == backbone.codec.describe()
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} was changed by saving"
        assert torch.equal(again.network.state_dict()[name], tensor), name
    assert again.weights_hash == backbone.weights_hash


def test_schedules_are_saved_as_they_are(folder_of, tmp_path):
    adm = load_backbone(folder_of("adm"), device="cpu", schedule=DiscreteSchedule.cosine())
    save_backbone(adm, adm.network, tmp_path / "adm")
    saved = load_backbone(tmp_path / "adm", device="cpu").schedule
    torch.testing.assert_close(torch.tensor(saved.alphas_cumprod), torch.tensor(adm.schedule.alphas_cumprod))
    sit = load_backbone(folder_of("sit"), device="cpu")
    sit.schedule = type(sit.schedule)("cosine", data_time=1)
    save_backbone(sit, sit.network, tmp_path / "sit")
    assert load_backbone(tmp_path / "sit", device="cpu").schedule == sit.schedule


def test_what_cannot_be_saved(tmp_path):
    pixels = load_backbone("pixels", family="pixels", device="cpu")
    with pytest.raises(ConfigError, match="a ModuleBackbone, which cannot be written as a folder"):
        save_backbone(pixels, pixels.network, tmp_path)


@pytest.mark.parametrize("kind", ["unet2d-condition", "sit", "edm"])
def test_weights_of_a_file_take_the_place_of_the_folders(folder_of, tmp_path, kind):
    backbone = moved(folder_of(kind))
    file = tmp_path / "clean.safetensors"
    save_file(backbone.network.state_dict(), file)
    again = load_backbone(folder_of(kind), weights=file, device="cpu")
    assert again.weights_hash == backbone.weights_hash != load_backbone(folder_of(kind), device="cpu").weights_hash
    assert again.codec.describe() == backbone.codec.describe()
    assert load_backbone(**BackboneConfig(source=folder_of(kind), weights=file, device="meta").model_dump()).layers()


def test_weights_that_do_not_fit(folder_of, tmp_path):
    file = tmp_path / "clean.safetensors"
    state = load_backbone(folder_of("unet2d"), device="cpu").network.state_dict()
    state["extra"] = state.pop("conv_in.bias")
    state["conv_out.bias"] = torch.zeros(5)
    save_file(state, file)
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match="missing: conv_in.bias.*unexpected: extra.*shape: conv_out.bias"):
            load_backbone(folder_of("unet2d"), weights=file, device=device)
    with pytest.raises(CheckpointError, match="look like a U-Net of diffusers.*not sit"):
        load_backbone(folder_of("sit"), weights=file, device="cpu")
    with pytest.raises(CheckpointError, match="no such file"):
        load_backbone(folder_of("unet2d"), weights=tmp_path / "none.safetensors", device="cpu")
    with pytest.raises(ConfigError, match="weights and init_seed"):
        load_backbone(folder_of("unet2d"), weights=file, init_seed=0, device="cpu")
