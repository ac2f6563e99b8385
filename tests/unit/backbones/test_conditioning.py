"""Conditions: the forms a user may give them in, the messages for others, and what the networks are called with."""

import json

import diffusers
import numpy as np
import pytest
import torch

from diffrep import load_backbone
from diffrep.backbones.conditioning import ClassLabels, OneHotLabels, PromptEmbeddings, Unconditional, select_rows
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.testing import save_tiny, tiny_backbone

CPU = torch.device("cpu")
LABELS = ClassLabels(11, null=10)
STRICT = ClassLabels(10, null=None)
ONE_HOT = OneHotLabels(4)
PLAIN = PromptEmbeddings({"prompt_embeds": (None, 12)})
POOLED = PromptEmbeddings(
    {"prompt_embeds": (None, 12), "pooled_prompt_embeds": (10,), "time_ids": (6,)}, ("time_ids",)
)
MASKED = PromptEmbeddings({"prompt_embeds": (None, 12), "prompt_attention_mask": (None,)}, ("prompt_attention_mask",))


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def called_with(net, cond, height, width, batch=2):
    """What the network is called with, and what it gives."""
    kept = {}

    def keep(_, args, kwargs, out):
        kept.update(kwargs, args=args, out=out[0])

    handle = net.network.register_forward_hook(keep, with_kwargs=True)
    x = rows(batch, net.in_channels, height, width)
    kept["answer"] = net.denoise(x, 0.5, cond)
    handle.remove()
    return x, kept


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_backbone("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny_backbone("flux", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return {kind: tiny_backbone(kind, tmp_path_factory.mktemp(kind)) for kind in ("unet2d-condition", "pixart", "sd3")}


# Class labels


@pytest.mark.parametrize(
    ("cond", "expected"),
    [
        (None, [10]),
        ({}, [10]),
        (3, [3]),
        ([3, 4], [3, 4]),
        ((3, 4), [3, 4]),
        (np.array([3, 4], dtype=np.uint8), [3, 4]),
        (torch.tensor(3), [3]),
        (torch.tensor([3]), [3]),
        (torch.tensor([3, 10], dtype=torch.int32), [3, 10]),
        ({"labels": torch.tensor([3, 4])}, [3, 4]),
    ],
)
def test_class_labels_in_every_form(cond, expected):
    found = LABELS(cond, 2, CPU)
    assert found["labels"].dtype == torch.int64
    assert found["labels"].tolist() == expected
    assert LABELS(found, 2, CPU)["labels"].tolist() == expected  # its own result is accepted again


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ("cat", "cannot read cond 'cat'; give integer labels (B,) from 0 to 10"),
        (["cat", "dog"], "cannot read cond"),
        (3.0, "must be integer labels (B,), got torch.float32"),
        (True, "must be integer labels (B,), got torch.bool"),
        (torch.zeros(2, 11), "got torch.float32 (2, 11)"),
        (torch.zeros(2, 1, dtype=torch.int64), "got torch.int64 (2, 1)"),
        (-1, "outside 0 to 10: -1 to -1"),
        ([0, 11], "outside 0 to 10: 0 to 11"),
        ([1, 2, 3], "3 rows for a batch of 2; give 1 or 2"),
        ([], "got torch.float32 (0,)"),
        (torch.zeros(0, dtype=torch.int64), "0 rows for a batch of 2"),
        ({"label": torch.tensor([1])}, "unknown part of cond 'label'; did you mean 'labels'?"),
        ({"labels": torch.tensor([1]), "prompt_embeds": rows(1, 5, 12)}, "unknown part of cond 'prompt_embeds'"),
    ],
)
def test_class_labels_that_are_none(cond, message):
    with pytest.raises(ConfigError) as error:
        LABELS(cond, 2, CPU)
    assert message in str(error.value)


def test_a_network_without_a_null_class_wants_a_label():
    for cond in (None, {}):
        with pytest.raises(ConfigError, match="class-conditional; give cond, labels from 0 to 9"):
            STRICT(cond, 2, CPU)
    assert STRICT(9, 2, CPU)["labels"].tolist() == [9]
    with pytest.raises(ConfigError, match="outside 0 to 9"):
        STRICT(10, 2, CPU)


# One-hot labels


@pytest.mark.parametrize(
    ("cond", "expected"),
    [
        (None, [[0, 0, 0, 0]]),
        ({}, [[0, 0, 0, 0]]),
        (2, [[0, 0, 1, 0]]),
        ([2, 0], [[0, 0, 1, 0], [1, 0, 0, 0]]),
        (torch.tensor([2, 0]), [[0, 0, 1, 0], [1, 0, 0, 0]]),
        (torch.tensor([[0, 0, 1, 0]]), [[0, 0, 1, 0]]),
        (torch.tensor([[False, False, True, False]]), [[0, 0, 1, 0]]),
        (torch.tensor([0.5, 0.5, 0, 0]), [[0.5, 0.5, 0, 0]]),
        (torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.float64), [[0, 0, 1, 0], [1, 0, 0, 0]]),
        ({"labels": torch.tensor([[0.0, 0, 0, 1]])}, [[0, 0, 0, 1]]),
    ],
)
def test_one_hot_labels_in_every_form(cond, expected):
    found = ONE_HOT(cond, 2, CPU)
    assert found["labels"].dtype == torch.float32
    assert found["labels"].tolist() == expected
    assert ONE_HOT(found, 2, CPU)["labels"].tolist() == expected


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ("cat", "cannot read cond 'cat'; give one-hot labels (B, 4) or integer labels (B,)"),
        (4, "outside 0 to 3: 4 to 4"),
        (-1, "outside 0 to 3"),
        (torch.zeros(5), "got torch.float32 (1, 5)"),
        (torch.zeros(2, 3), "got torch.float32 (2, 3)"),
        (torch.zeros(2, 1, 4), "got torch.float32 (2, 1, 4)"),
        (torch.zeros(3, 4), "3 rows for a batch of 2"),
        ({"lables": torch.zeros(2, 4)}, "did you mean 'labels'?"),
    ],
)
def test_one_hot_labels_that_are_none(cond, message):
    with pytest.raises(ConfigError) as error:
        ONE_HOT(cond, 2, CPU)
    assert message in str(error.value)


# No condition


def test_unconditional_networks_take_none():
    assert Unconditional()(None, 2, CPU) == Unconditional()({}, 2, CPU) == Unconditional().example() == {}
    for cond in (0, "cat", "", [], torch.zeros(2), {"labels": torch.zeros(2)}):
        with pytest.raises(ConfigError, match="unconditional; leave cond out"):
            Unconditional()(cond, 2, CPU)


# Embeddings


def test_embeddings_for_one_and_for_each():
    one, two = rows(5, 12), rows(2, 5, 12)
    assert torch.equal(PLAIN(one, 2, CPU)["prompt_embeds"], one[None])
    assert torch.equal(PLAIN(two, 2, CPU)["prompt_embeds"], two)
    assert torch.equal(PLAIN(two.numpy(), 2, CPU)["prompt_embeds"], two)
    assert torch.equal(PLAIN(one.tolist(), 2, CPU)["prompt_embeds"], one[None])
    assert torch.equal(PLAIN({"prompt_embeds": two}, 2, CPU)["prompt_embeds"], two)
    assert torch.equal(PLAIN(PLAIN(two, 2, CPU), 2, CPU)["prompt_embeds"], two)
    mixed = POOLED({"prompt_embeds": two, "pooled_prompt_embeds": rows(10)}, 2, CPU)
    assert {name: len(row) for name, row in mixed.items()} == {"prompt_embeds": 2, "pooled_prompt_embeds": 1}


def test_embeddings_for_a_network_that_needs_one_tensor_go_without_a_name():
    assert list(MASKED(rows(5, 12), 2, CPU)) == ["prompt_embeds"]
    with pytest.raises(ConfigError, match=r"several tensors; give cond as prompt embeddings: prompt_emb"):
        POOLED(rows(5, 12), 2, CPU)


GOOD = {"prompt_embeds": rows(2, 5, 12), "pooled_prompt_embeds": rows(2, 10)}


@pytest.mark.parametrize(
    ("conditioner", "cond", "message"),
    [
        (PLAIN, None, "no text encoder at hand; give cond, prompt embeddings: prompt_embeds (B, T, 12)"),
        (PLAIN, "cat", "prompts were given and there is no text encoder at hand"),
        (PLAIN, ["cat", "dog"], "prompts were given and there is no text encoder at hand"),
        (PLAIN, 3, "cond is a label, 3, and this network takes prompts"),
        (PLAIN, [3, 4], "cond's prompt_embeds is (2,)"),
        (PLAIN, ["cat", 4], "cannot read cond"),
        (PLAIN, rows(5, 11), "cond's prompt_embeds is (5, 11); give prompt embeddings: prompt_embeds (B, T, 12)"),
        (PLAIN, rows(3, 5, 12), "3 rows for a batch of 2"),
        (PLAIN, rows(1, 2, 5, 12), "cond's prompt_embeds is (1, 2, 5, 12)"),
        (PLAIN, {"prompt_embed": rows(5, 12)}, "unknown part of cond 'prompt_embed'; did you mean 'prompt_embeds'?"),
        (PLAIN, {"labels": rows(5, 12)}, "unknown part of cond 'labels'; known: prompt_embeds."),
        (PLAIN, {"prompt_embeds": "cat"}, "cannot read cond 'cat'; give prompt embeddings"),
        (PLAIN, {"prompt_embeds": None}, "cannot read cond None; give prompt embeddings"),
        (PLAIN, {}, "cond lacks prompt_embeds; give"),
        (POOLED, {"prompt_embeds": rows(5, 12)}, "cond lacks pooled_prompt_embeds; give"),
        (POOLED, GOOD | {"pooled_prompt_embeds": rows(3, 10)}, "3 rows for a batch of 2"),
        (POOLED, GOOD | {"pooled_prompt_embeds": rows(2, 9)}, "cond's pooled_prompt_embeds is (2, 9)"),
        (POOLED, GOOD | {"time_ids": torch.zeros(5)}, "cond's time_ids is (5,); give"),
        (
            MASKED,
            {"prompt_embeds": rows(5, 12), "prompt_attention_mask": torch.ones(6)},
            "different lengths, {'prompt_embeds': 5, 'prompt_attention_mask': 6}",
        ),
    ],
)
def test_embeddings_that_do_not_fit(conditioner, cond, message):
    with pytest.raises(ConfigError) as error:
        conditioner(cond, 2, CPU)
    assert message in str(error.value)


def test_unknown_parts_are_unknown_names():
    for conditioner in (LABELS, ONE_HOT, PLAIN):
        with pytest.raises(UnknownNameError):
            conditioner({"promt": 1}, 2, CPU)


def test_examples_are_conditions():
    for conditioner in (LABELS, STRICT, ONE_HOT, PLAIN, POOLED, MASKED, Unconditional()):
        example = conditioner.example()
        assert all(row.device.type == "meta" for row in example.values())
        real = {name: torch.zeros(row.shape, dtype=row.dtype) for name, row in example.items()}
        assert conditioner(real, 1, CPU).keys() == example.keys()


def test_a_single_row_goes_on_serving_all():
    chosen = select_rows({"a": torch.arange(3), "b": torch.tensor([7])}, [2, 0, 2])
    assert {name: row.tolist() for name, row in chosen.items()} == {"a": [2, 0, 2], "b": [7]}


# Through the networks


def test_strings_for_networks_without_text(tmp_path):
    with pytest.raises(ConfigError, match="cannot read cond 'cat'; give integer labels"):
        tiny_backbone("dit", tmp_path / "dit").denoise(rows(1, 4, 8, 8), 10, cond="cat")
    with pytest.raises(ConfigError, match="unconditional"):
        tiny_backbone("unet2d", tmp_path / "unet").denoise(rows(1, 1, 16, 16), 10, cond="cat")
    with pytest.raises(ConfigError, match="one-hot labels"):
        tiny_backbone("edm", tmp_path / "edm").denoise(rows(1, 3, 16, 16), 1.0, cond="cat")


def test_floats_take_the_networks_dtype_and_integers_stay(tmp_path):
    net = load_backbone(save_tiny("pixart", tmp_path), device="cpu", dtype="bfloat16")
    mask = torch.tensor([1, 1, 1, 0, 0])
    found = net.condition({"prompt_embeds": rows(5, 12).double(), "prompt_attention_mask": mask}, 2)
    assert {name: row.dtype for name, row in found.items()} == {
        "prompt_embeds": torch.bfloat16,
        "prompt_attention_mask": torch.int64,
    }
    for form in (mask, mask.bool(), mask.float()):
        cond = found | {"prompt_attention_mask": form}
        whole = net.denoise(rows(2, 4, 8, 8), 100, cond)
        assert torch.equal(whole, net.denoise(rows(2, 4, 8, 8), 100, found))


def test_rows_are_not_mixed_up(text):
    for net in text.values():
        cond = {name: rows(3, *row.shape[1:]) for name, row in net.conditioner.example().items()}
        x = rows(3, 4, 8, 8)
        whole = net.denoise(x, 0.5, cond)
        for index in range(3):
            alone = net.denoise(x[index : index + 1], 0.5, select_rows(cond, [index]))
            torch.testing.assert_close(whole[index : index + 1], alone, atol=1e-5, rtol=1e-4)


def sdxl_pipeline(net):
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return diffusers.StableDiffusionXLPipeline(unet=net.network, **dict.fromkeys(parts), add_watermarker=False)


def test_sdxl_sizes_are_those_of_an_uncropped_image(sdxl):
    cond = {"prompt_embeds": rows(5, 12), "pooled_prompt_embeds": rows(10)}
    _, kept = called_with(sdxl, cond, 8, 12)
    size = (8 * sdxl.codec.downscale, 12 * sdxl.codec.downscale)
    expected = sdxl_pipeline(sdxl)._get_add_time_ids(size, (0, 0), size, torch.float32, 10)
    assert torch.equal(kept["added_cond_kwargs"]["time_ids"], expected.expand(2, -1))
    assert torch.equal(kept["added_cond_kwargs"]["text_embeds"], cond["pooled_prompt_embeds"].expand(2, -1))
    given = torch.tensor([1024.0, 768, 0, 128, 512, 512])
    _, kept = called_with(sdxl, cond | {"time_ids": given}, 8, 12)
    assert torch.equal(kept["added_cond_kwargs"]["time_ids"], given.expand(2, -1))
    _, other = called_with(sdxl, cond | {"time_ids": given.long()}, 8, 12)
    assert torch.equal(other["answer"], kept["answer"])


def test_pixart_sizes_are_those_of_the_image(text):
    """What `PixArtAlphaPipeline` computes; the pipeline itself runs in test_text."""
    _, kept = called_with(text["pixart"], rows(5, 12), 8, 12)
    height, width = 8 * text["pixart"].codec.downscale, 12 * text["pixart"].codec.downscale
    expected = {"resolution": [[height, width]] * 2, "aspect_ratio": [[height / width]] * 2}
    for name, value in expected.items():
        torch.testing.assert_close(kept["added_cond_kwargs"][name], torch.tensor(value, dtype=torch.float32))


def test_flux_packs_as_its_pipeline_does(flux):
    cond = {"prompt_embeds": rows(5, 12), "pooled_prompt_embeds": rows(10)}
    x, kept = called_with(flux, cond, 8, 12)
    pipeline = diffusers.FluxPipeline
    assert torch.equal(kept["hidden_states"], pipeline._pack_latents(x, 2, 4, 8, 12))
    assert torch.equal(kept["answer"], pipeline._unpack_latents(kept["out"], 16, 24, 2))
    assert torch.equal(kept["img_ids"], pipeline._prepare_latent_image_ids(2, 4, 6, CPU, torch.float32))
    assert torch.equal(kept["txt_ids"], torch.zeros(5, 3))
    assert kept["guidance"].tolist() == [3.5, 3.5]  # the pipeline's default
    _, kept = called_with(flux, cond | {"guidance": 2}, 8, 12)
    assert kept["guidance"].tolist() == [2, 2]
    _, kept = called_with(flux, cond | {"guidance": torch.tensor([1.0, 2.0])}, 8, 12)
    assert kept["guidance"].tolist() == [1, 2]


def test_flux_takes_even_sides(flux):
    cond = {"prompt_embeds": rows(5, 12), "pooled_prompt_embeds": rows(10)}
    for sides in ((7, 8), (8, 7)):
        with pytest.raises(ConfigError, match=f"multiples of its patch, 2, got {sides[0]} x {sides[1]}"):
            flux.denoise(rows(1, 4, *sides), 0.5, cond)


def test_flux_schnell_has_no_guidance(tmp_path):
    folder = save_tiny("flux", tmp_path)
    network = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    diffusers.FluxTransformer2DModel.from_config(network.config, guidance_embeds=False).save_pretrained(
        folder / "transformer"
    )
    net = load_backbone(folder, device="cpu")
    cond = {"prompt_embeds": rows(5, 12), "pooled_prompt_embeds": rows(10)}
    assert called_with(net, cond, 8, 8)[1]["guidance"] is None
    with pytest.raises(UnknownNameError, match="unknown part of cond 'guidance'"):
        net.denoise(rows(1, 4, 8, 8), 0.5, cond | {"guidance": 2.0})


@pytest.mark.parametrize(
    ("kind", "part", "change", "message"),
    [
        ("sana", "transformer", {"guidance_embeds": True}, "Sana-Sprint"),
        (
            "sdxl",
            "unet",
            {"addition_embed_type": "text", "encoder_hid_dim": 12},
            "encoder_hid_dim_type='text_proj', addition_emb",
        ),
        ("unet2d-condition", "unet", {"num_class_embeds": 10}, "with num_class_embeds=10 is not supported"),
        ("unet2d", "unet", {"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
    ],
)
def test_networks_with_other_conditions_are_refused(tmp_path, kind, part, change, message):
    folder = save_tiny(kind, tmp_path)
    place = folder / part
    config = read_config(place)
    getattr(diffusers, config["_class_name"]).from_config(config | change).save_pretrained(place)
    with pytest.raises(ConfigError, match=message):
        load_backbone(folder, device="cpu")


def read_config(place):
    return json.loads((place / "config.json").read_text())


def test_a_class_conditional_unet(tmp_path):
    folder = save_tiny("unet2d", tmp_path)
    config = read_config(folder / "unet")
    diffusers.UNet2DModel.from_config(config | {"num_class_embeds": 10}).save_pretrained(folder / "unet")
    net = load_backbone(folder, device="cpu")
    x = rows(2, 1, 16, 16)
    with pytest.raises(ConfigError, match="labels from 0 to 9"):
        net.denoise(x, 10)
    answers = net.denoise(x, 10, cond=[1, 2])
    torch.testing.assert_close(answers[1:], net.denoise(x[1:], 10, cond=2), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers[:1], net.denoise(x[:1], 10, cond=2), atol=1e-4)
