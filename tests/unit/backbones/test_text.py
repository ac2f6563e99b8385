"""Prompts through the real text encoders at tiny size: what the network is given is what its pipeline gives it."""

import gc
import json
import shutil
import sys

import diffusers
import pytest
import torch

from diffrep import FeatureRequest, load_backbone
from diffrep.backbones.text import PromptEncoder
from diffrep.errors import BackendUnavailable, CheckpointError, ConfigError, UnknownNameError
from diffrep.extract import extract
from diffrep.testing import PIPELINES, save_tiny, save_tiny_pipeline

transformers = pytest.importorskip("transformers")
ENCODERS = (
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
    transformers.T5EncoderModel,
    transformers.Gemma2Model,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: save_tiny_pipeline(kind, root / kind) for kind in PIPELINES}


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(folders, kind):
    return folders[kind]


@pytest.fixture(scope="module")
def pipeline(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def net(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture
def passes():
    """Names of the text encoders that ran, one entry for each forward pass."""
    ran = []

    def note(module, _, __):
        if is_encoder(module):
            ran.append(type(module).__name__)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield ran
    handle.remove()


def encode(pipeline, kind, text):
    """The pipeline's own embeddings of one prompt, without guidance."""
    plain = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        if kind == "sd15":
            return {"prompt_embeds": pipeline.encode_prompt(text, **plain)[0]}
        if kind in ("pixart", "sana"):
            embeddings, mask = pipeline.encode_prompt(text, **plain)[:2]
            return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}
        if kind == "flux":
            embeddings, pooled, _ = pipeline.encode_prompt(text, text, device=torch.device("cpu"))
        elif kind == "sdxl":
            embeddings, _, pooled, _ = pipeline.encode_prompt(text, text, **plain)
        else:
            embeddings, _, pooled, _ = pipeline.encode_prompt(text, text, text, **plain)
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def latents(net, batch=2):
    side = 16 if type(net).__name__ == "Flux" else net.sample_size
    return torch.randn(batch, net.in_channels, side, side, generator=torch.Generator().manual_seed(0))


def is_encoder(module):
    # A CLIP with a projection holds one without, which is no encoder of its own.
    return isinstance(module, ENCODERS) and type(module).__name__ in (module.config.architectures or ())


def is_network(module):
    """U-Nets, transformers and autoencoders."""
    return isinstance(module, diffusers.ModelMixin)


def alive(kind):
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module) and kind(thing)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert found[name].dtype == rows.dtype
        torch.testing.assert_close(found[name], rows, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("text", ["", "a cat", "Two  DOGS, " + "and so on " * 60])
def test_a_prompt_is_what_the_pipeline_makes_of_it(net, pipeline, kind, text):
    assert_same(net.condition(text, 1), encode(pipeline, kind, text))


def test_no_condition_is_the_empty_prompt(net, pipeline, kind):
    found = net.condition(None, 3)
    assert_same(found, encode(pipeline, kind, ""))
    assert all(rows.any() for rows in found.values())  # SDXL's guidance would put zeros here


def test_a_prompt_for_each_image(net, pipeline, kind):
    texts = ["a cat", "", "a cat", "a dog"]
    parts = [encode(pipeline, kind, text) for text in texts]
    assert_same(net.condition(texts, 4), {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    assert_same(net.condition(tuple(texts), 4), net.condition(texts, 4))
    with pytest.raises(ConfigError, match="4 rows for a batch of 3; give 1 or 3"):
        net.condition(texts, 3)


def test_prompts_and_their_embeddings_give_the_same_features(net, pipeline, kind):
    x, time, block = latents(net), net.schedule.level("sigma=0.7").time, net.blocks()[-1]
    by_prompt = net.capture(x, time, [block], cond=["a cat", "a dog"])[block]
    parts = [encode(pipeline, kind, text) for text in ("a cat", "a dog")]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert torch.equal(by_prompt, net.capture(x, time, [block], cond=rows)[block])
    single = {name: row[0] for name, row in parts[0].items()}
    both = net.capture(x, time, [block], cond=single)[block]
    torch.testing.assert_close(both, net.capture(x, time, [block], cond="a cat")[block])
    if kind == "sd15":
        assert torch.equal(by_prompt, net.capture(x, time, [block], cond=rows["prompt_embeds"])[block])
    assert not torch.allclose(by_prompt[1], both[1], atol=1e-5)


def test_the_network_answers_as_inside_its_pipeline(net, pipeline, kind):
    """The last step of the real pipeline, without guidance, on an image that is not square."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    kept = {}

    def keep(_, args, kwargs, out):
        kept.update(kwargs, out=out[0])
        kept.update(zip(("hidden_states", "timestep"), args, strict=False))

    options = {"guidance_scale": 1.0}
    if kind == "flux":
        options = {}  # takes its guidance as an input: the pipeline's default is the backbone's
    if kind == "pixart":
        network.register_to_config(sample_size=128)  # what makes this pipeline pass the size conditions
    if kind in ("pixart", "sana"):
        options["use_resolution_binning"] = False
    if kind == "sana":
        options["complex_human_instruction"] = None
    handle = network.register_forward_hook(keep, with_kwargs=True)
    size = {"height": 32, "width": 64} if kind == "sana" else {"height": 16, "width": 32}
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", num_inference_steps=2, output_type="latent", **size, **options)
    handle.remove()
    x, expected = kept["hidden_states"], kept["out"]
    if kind == "flux":
        sides = (*size.values(), pipeline.vae_scale_factor)
        x, expected = (pipeline._unpack_latents(tokens, *sides) for tokens in (x, expected))
    time = kept["timestep"].reshape(-1)[0]
    torch.testing.assert_close(net.denoise(x, time, cond="a cat"), expected, atol=1e-6, rtol=1e-5)


def test_each_prompt_is_encoded_once(folder, kind, passes):
    net = load_backbone(folder, device="cpu")
    encoders = len(PIPELINES[kind][2])
    net.condition(["a cat", "a dog", "a cat"], 3)
    assert len(passes) == 2 * encoders
    net.condition("a cat", 1)
    net.denoise(latents(net), 0.5, cond=["a dog", "a cat"])
    assert len(passes) == 2 * encoders
    net.condition(None, 1)
    assert len(passes) == 3 * encoders


@pytest.mark.parametrize("kind", ["sdxl", "sana"])
def test_text_encoders_come_with_the_first_prompt_alone_and_go_when_dropped(folders, kind, passes):
    folder = folders[kind]
    net = load_backbone(folder, device="cpu")
    before, networks = len(alive(is_encoder)), len(alive(is_network))
    kept = net.condition("a cat", 1)
    assert len(alive(is_encoder)) == before + len(PIPELINES[kind][2])
    assert len(alive(is_network)) == networks, "a second copy of the network or of the autoencoder"
    net.conditioner.encoder.drop()
    assert len(alive(is_encoder)) == before
    passes.clear()
    assert_same(net.condition("a cat", 1), kept)
    assert not passes
    assert not torch.equal(net.condition("a dog", 1)["prompt_embeds"], kept["prompt_embeds"])
    assert len(passes) == len(PIPELINES[kind][2])


def test_features_with_a_prompt_for_each_image(net, kind):
    side = 16 * net.codec.downscale if kind == "flux" else net.image_size
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    block, level = net.blocks()[-1], "sigma=0.7"
    request = FeatureRequest(block, [level], draws=2, pool="mean", dtype="float32")
    ids, texts = ["a", "b", "c"], ["a cat", "", "a dog"]
    found = net.extract(images, request, ids=ids, cond=texts)[block, level]
    apart = extract(net, images, request, ids=ids, cond=texts, batch_size=2)[block, level]
    torch.testing.assert_close(apart, found, atol=1e-5, rtol=1e-4)
    bare = net.extract(images, request, ids=ids)[block, level]
    torch.testing.assert_close(found[1], bare[1], atol=1e-5, rtol=1e-4)
    assert (found - bare).abs().amax(1)[[0, 2]].min() > 1e-5


def test_half_precision(folder, kind):
    net = load_backbone(folder, device="cpu", dtype="bfloat16")
    reference = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    found = net.condition("a cat", 1)
    assert_same(found, encode(reference, kind, "a cat"))
    assert found["prompt_embeds"].dtype == torch.bfloat16
    if "prompt_attention_mask" in found:
        assert found["prompt_attention_mask"].dtype == torch.int64
    assert net.denoise(latents(net), net.schedule.level("sigma=0.7").time, cond="a cat").isfinite().all()


@pytest.mark.parametrize(
    ("kind", "length"), [("sd15", 77), ("sdxl", 77), ("sd3", 77 + 256), ("flux", 512), ("pixart", 120), ("sana", 300)]
)
def test_lengths_are_the_published_ones(folders, kind, length):
    net = load_backbone(folders[kind], device="cpu")
    assert net.condition("a cat", 1)["prompt_embeds"].shape == (1, length, 12)
    assert net.conditioner.example()["prompt_embeds"].shape == (1, length, 12)


def test_pixart_sigma_reads_300_tokens(folders, tmp_path):
    folder = shutil.copytree(folders["pixart"], tmp_path / "sigma")
    edit_index(folder, _class_name="PixArtSigmaPipeline")
    assert load_backbone(folder, device="cpu").condition("a cat", 1)["prompt_attention_mask"].shape == (1, 300)


def test_masked_tokens_do_not_count(folders):
    for kind in ("pixart", "sana"):
        net = load_backbone(folders[kind], device="cpu")
        x, cond = latents(net), net.condition("a cat", 1)
        mask = cond["prompt_attention_mask"]
        noisy = cond["prompt_embeds"] + 9 * (1 - mask)[..., None]
        for form in (mask, mask.bool(), mask.float()):
            found = net.denoise(x, 0.5, cond={"prompt_embeds": noisy, "prompt_attention_mask": form})
            torch.testing.assert_close(found, net.denoise(x, 0.5, cond="a cat"))
        assert not torch.allclose(net.denoise(x, 0.5, cond={"prompt_embeds": noisy}), found, atol=1e-4)


def test_stable_diffusion_3_without_t5(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "small")
    edit_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    net = load_backbone(folder, device="cpu")
    networks = alive(is_network)
    found = net.condition("a cat", 1)
    new = [module for module in alive(is_network) if not any(module is other for other in networks)]
    assert [module.device.type for module in new] == ["meta"]  # the pipeline asks it for a width; it holds no data
    whole = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert_same(found, encode(whole, "sd3", "a cat"))
    assert not found["prompt_embeds"][:, 77:].any()


def edit_index(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    index |= entries
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v != "drop"}))


@pytest.mark.parametrize(
    ("kind", "entries", "gone", "message"),
    [
        ("sd15", {}, ["text_encoder"], "has no text_encoder; give cond as embeddings"),
        ("flux", {}, ["text_encoder_2", "tokenizer_2"], "has no text_encoder_2, tokenizer_2; give"),
        ("flux", {"text_encoder": [None, None]}, ["text_encoder"], "has no text_encoder; give"),
        ("sana", {}, ["tokenizer"], "has no tokenizer; give"),
        ("sd15", {"text_encoder": "drop", "tokenizer": "drop"}, [], "give cond, prompt embeddings.*(B, T, 12)"),
    ],
)
def test_without_text_encoders_the_message_asks_for_embeddings(folders, tmp_path, kind, entries, gone, message):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    edit_index(folder, **entries)
    for name in gone:
        shutil.rmtree(folder / name)
    net = load_backbone(folder, device="cpu")
    with pytest.raises(ConfigError, match=message):
        net.condition(None, 1)
    with pytest.raises(ConfigError, match="embeddings"):
        net.condition("a cat", 1)
    rows = {name: torch.zeros(1, *row.shape[1:]) for name, row in net.conditioner.example().items()}
    assert net.denoise(latents(net, 1), 0.5, cond=rows).isfinite().all()


def test_a_network_without_a_pipeline_asks_for_embeddings(tmp_path):
    net = load_backbone(save_tiny("sdxl", tmp_path), device="cpu")
    for cond in (None, "a cat", ["a cat"]):
        with pytest.raises(ConfigError, match=r"no text encoder at hand; give .*pooled_prompt_embeds \(B, 10\)"):
            net.condition(cond, 1)


def test_without_transformers(folders, tmp_path, monkeypatch):
    net = load_backbone(folders["sd15"], device="cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'diffrep\[text\]', or give cond as embeddings"):
        net.condition("a cat", 1)
    assert net.condition(torch.zeros(5, 12), 1)["prompt_embeds"].shape == (1, 5, 12)
    with pytest.raises(BackendUnavailable, match=r"diffrep\[text\]"):
        save_tiny_pipeline("sd15", tmp_path)


def test_damaged_text_encoders(folders, tmp_path):
    folder = shutil.copytree(folders["pixart"], tmp_path / "pixart")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    net = load_backbone(folder, device="cpu")
    with pytest.raises(CheckpointError, match="cannot load the text encoders in"):
        net.condition("a cat", 1)


def test_prompts_are_not_encoded_without_data(folders):
    net = load_backbone(folders["sd15"], device="meta")
    with pytest.raises(ConfigError, match="meta device"):
        net.condition("a cat", 1)


def test_unknown_kinds(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'sdxl'"):
        save_tiny_pipeline("sdxxl", tmp_path)
    with pytest.raises(ConfigError, match="KandinskyPipeline cannot be encoded; known: StableDiffusionXL"):
        PromptEncoder("KandinskyPipeline", lambda: tmp_path)
