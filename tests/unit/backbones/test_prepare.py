"""Latents and targets in one pass: the family "prepare"."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from diffrep import FeatureRequest, load_backbone
from diffrep.backbones.encoders import open_encoder
from diffrep.backbones.folders import load_codec
from diffrep.config import EncoderConfig, ExtractConfig, validate
from diffrep.errors import ConfigError, DiffrepError, StoreError, UnknownNameError
from diffrep.extract.job import run_extract
from diffrep.store.layout import read_json
from diffrep.testing import save_images

CPU = torch.device("cpu")
VIT = {"model": "vit_tiny_patch16_224", "img_size": 56, "patch_size": 14, "depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    arguments = {name: value for name, value in VIT.items() if name != "model"}
    save_file(timm.create_model(VIT["model"], **arguments).state_dict(), folder / "vit.safetensors")
    save_file(timm.create_model("test_efficientnet").state_dict(), folder / "cnn.safetensors")
    return {
        "vit": {"source": str(folder / "vit.safetensors"), "model": VIT, "preset": "dinov2"},
        "cnn": {"source": str(folder / "cnn.safetensors"), "model": "test_efficientnet"},
    }


@pytest.fixture(scope="module")
def vae(folder_of):
    return folder_of("unet2d-condition") / "vae"


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), per_class=2, size=64)


def prepare(source, **config):
    return load_backbone(source, family="prepare", config=config, device="cpu")


def request(*layers, dtype="float32"):
    return FeatureRequest(layers, "clean", noise="none", dtype=dtype)


def extract(folder, source, config, out, **given):
    backbone = {"source": str(source), "family": "prepare", "config": config, "device": "cpu"}
    values = {"layers": ["blocks"], "levels": ["clean"], "noise": "none"} | given
    values = {"backbone": backbone, "data": str(folder), "request": values, "out": str(out), "unit_size": 5}
    return run_extract(validate(ExtractConfig, values | {"batch_size": 4}))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("moments", [True, False])
def test_one_pass_gives_what_codec_and_encoders_give(vae, encoders, images, moments):
    backbone = prepare(vae, moments=moments, flip=True, encoders=encoders)
    kind = "moments" if moments else "latents"
    taps = [kind, f"{kind}_flip", "targets.vit", "targets.vit_flip", "targets.cnn", "targets.cnn_flip"]
    assert backbone.blocks() == taps
    assert [layer.name for layer in backbone.layers() if layer.name in taps] == taps
    found = backbone.extract(images, request("blocks"))
    codec = load_codec(vae, CPU, torch.float32)
    for ending, shown in (("", images), ("_flip", images.flip(-1))):
        posterior = codec.encode(shown)
        expected = torch.cat([posterior.mean, posterior.std], 1) if moments else posterior.mean
        torch.testing.assert_close(found[kind + ending, "clean"], expected)
        for name, values in encoders.items():
            alone = open_encoder(validate(EncoderConfig, values), CPU)
            torch.testing.assert_close(found[f"targets.{name}{ending}", "clean"], alone(shown))


def test_no_more_runs_than_was_asked_for(vae, encoders, images):
    backbone = prepare(vae, encoders=encoders)
    ran = []

    def note(name):
        return lambda _, args: None if args[0].is_meta else ran.append(name)  # plans run copies of the modules

    for name, network in backbone.network.encoders.items():
        next(network.children()).register_forward_pre_hook(note(name))
    backbone.extract(images, request("latents"))
    assert ran == []
    backbone.extract(images, request("targets.vit"))
    assert ran == ["vit"]


def test_pixels_are_their_own_latents(images):
    found = prepare("pixels", flip=True).extract(images, request("blocks"))
    assert torch.equal(found["latents", "clean"], images * 2 - 1)
    assert torch.equal(found["latents_flip", "clean"], (images * 2 - 1).flip(-1))
    narrow = load_backbone("pixels", family="prepare", device="cpu", dtype="bfloat16")
    assert torch.equal(narrow.extract(images, request("latents"))["latents", "clean"], images * 2 - 1)
    assert prepare("pixels", channels=1).extract(images[:, :1], request("latents"))["latents", "clean"].shape[1] == 1


def test_the_store_knows_how_targets_were_made(image_folder, vae, encoders, tmp_path):
    config = {"moments": True, "encoders": {"vit": encoders["vit"]}}
    store = extract(image_folder, vae, config, tmp_path / "store")
    backbone = prepare(vae, **config)
    assert store.meta["backbone"]["encoders"]["vit"] == backbone.target_encoders["vit"].describe()
    assert (store.meta["backbone"]["codec"]["kind"], store.meta["backbone"]["moments"]) == ("AutoencoderKL", True)
    other = {"moments": True, "encoders": {"vit": encoders["vit"] | {"preset": "jepa", "size": 56}}}
    with pytest.raises(StoreError) as error:
        extract(image_folder, vae, other, tmp_path / "store")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "backbone.encoders.vit.preset",
        "backbone.encoders.vit.size",
    ]


def test_eight_bits(image_folder, encoders, tmp_path):
    config = {"encoders": {"vit": encoders["vit"]}}
    narrow = {"layers": ["targets.vit"], "dtype": "float8_e4m3fn"}
    store = extract(image_folder, "pixels", config, tmp_path / "eight", **narrow)
    wide = extract(image_folder, "pixels", config, tmp_path / "wide", dtype="float32")
    exact = wide["targets.vit", "clean"]
    stored = store["targets.vit", "clean"]
    assert stored.dtype == torch.float8_e4m3fn
    assert torch.equal(stored.float(), exact.to(torch.float8_e4m3fn).float())
    assert ((stored.float() - exact).abs() <= exact.abs() / 16 + 2**-10).all()  # half a step of three bits
    assert torch.equal(torch.from_numpy(store.numpy("targets.vit", "clean")), stored.float())
    rows = torch.tensor([7, 0, 7]).numpy()
    assert torch.equal(store.take("targets.vit", "clean", rows).float(), stored.float()[rows])
    narrow_bytes, wide_bytes = (read_json(one.path / "index.json")["bytes"] for one in (store, wide))
    assert narrow_bytes < 0.3 * wide_bytes


def test_values_beyond_eight_bits(encoders, images):
    backbone = prepare("pixels", encoders={"vit": encoders["vit"]})
    network = backbone.network.encoders["vit"]
    network.norm.weight.data.mul_(1000)
    with pytest.raises(DiffrepError, match="beyond float8_e4m3fn"):
        backbone.extract(images, request("targets.vit", dtype="float8_e4m3fn"))


@pytest.mark.mp
def test_two_processes_make_the_same_store(image_folder, vae, encoders, tmp_path, two_processes):
    config = {"moments": True, "flip": True, "encoders": {"cnn": encoders["cnn"]}}
    alone = extract(image_folder, vae, config, tmp_path / "one")
    text = (tmp_path / "one" / "config.yaml").read_text().replace(str(tmp_path / "one"), str(tmp_path / "two"))
    (tmp_path / "job.yaml").write_text(text)
    run = two_processes.run("extract", tmp_path / "job.yaml")
    assert run.codes == [0, 0], run.err
    units = sorted((tmp_path / "one").rglob("*.safetensors"))
    assert len(units) == 4
    assert len(alone) == 12
    for unit in units:
        twin = tmp_path / "two" / unit.relative_to(tmp_path / "one")
        assert twin.read_bytes() == unit.read_bytes()


def test_what_cannot_be_prepared(vae, encoders, images):
    one = encoders["vit"]
    for source, config, error, message in (
        ("pixels", {"momens": True, "encoders": {"a": {"sorce": "x"}}}, ConfigError, "(?s)sorce.*'source'.*momens"),
        ("pixels", "moments", ConfigError, "a dict of moments, flip, encoders, channels"),
        ("pixels", {"moments": True}, ConfigError, "without a spread; .* 'latents'"),
        (vae, {"channels": 1}, ConfigError, "takes images of 3"),
        ("pixels", {"encoders": {"a.b": one}}, ConfigError, "encoders: 'a.b' cannot be a name"),
        ("pixels", {"encoders": {"keys": one}}, ConfigError, "'keys' cannot be a name here"),
        ("pixels", {"encoders": {"training": one}}, ConfigError, "'training' cannot be a name here"),
        ("pixels", {"encoders": {"a_flip": one}}, ConfigError, "no ending _flip"),
        ("pixels", {"encoders": {"a": "test_vitt"}}, UnknownNameError, "test_vit"),
    ):
        with pytest.raises(error, match=message):
            load_backbone(source, family="prepare", config=config, device="cpu")
    with pytest.raises(ConfigError, match="init_seed"):
        load_backbone("pixels", family="prepare", init_seed=0, device="cpu")
    with pytest.raises(ConfigError, match="takes no .*codec"):
        load_backbone("pixels", family="prepare", codec=vae, device="cpu")
    with pytest.raises(UnknownNameError, match="did you mean 'prepare'"):
        load_backbone(vae, family="prepared", device="cpu")
    backbone = prepare("pixels", encoders={"vit": one})
    with pytest.raises(ConfigError, match="multiples of 16, such as 48 and 64"):
        backbone.extract(images[..., :60, :60], request("targets.vit"))
