"""The alarm: where our table says the image stream is, the installed diffusers must have it."""

import inspect

import diffusers
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.unets import unet_2d_blocks
from diffusers.models.unets.unet_2d_blocks import get_down_block, get_mid_block, get_up_block

from diffrep.taps import Address, capture
from diffrep.taps.attention import TEXT_FIRST
from diffrep.taps.outputs import TUPLE_INDEX, image_reader
from diffrep.taps.points import MODULATED_CHILD

REASON = f"diffusers {diffusers.__version__} returns another order than the table in diffrep/taps/outputs.py"
WIDTH, SIDE, TEXT = 32, 8, 5

UNET_BLOCKS = {
    name: kind
    for name, kind in vars(unet_2d_blocks).items()
    if inspect.isclass(kind)
    and kind.__module__ == unet_2d_blocks.__name__
    and name.endswith(("Block2D", "Block2DCrossAttn", "Block2DSimpleCrossAttn"))
}
DOWN = [name for name in UNET_BLOCKS if "Down" in name and "Encoder" not in name]
UP = [name for name in UNET_BLOCKS if "Up" in name and "Decoder" not in name]
MID = [name for name in UNET_BLOCKS if "Mid" in name]
# Blocks of autoencoders, which diffrep does not read, and which return a tensor.
CODEC = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"]

COMMON = {"in_channels": WIDTH, "temb_channels": 16, "resnet_eps": 1e-5, "resnet_act_fn": "swish", "resnet_groups": 8}
ATTENTION = {"cross_attention_dim": 12, "num_attention_heads": 4, "attention_head_dim": 8}


def run(block, **inputs):
    """Calls a block with what its forward names of a U-Net's running state."""
    names = inspect.signature(block.forward).parameters
    return block.requires_grad_(False).eval()(**{name: value for name, value in inputs.items() if name in names})


def check_unet_block(block, output, side):
    """The tensor of our table is the one, of all members, that has the shape of the hidden state."""
    shape = (2, WIDTH, side, side)
    kind = type(block).__name__
    assert tuple(image_reader(block, kind)(output).shape) == shape, REASON
    if isinstance(output, torch.Tensor):
        assert kind not in TUPLE_INDEX, REASON
        return
    members = [isinstance(member, torch.Tensor) and tuple(member.shape) == shape for member in output]
    assert members.count(True) == 1, REASON
    assert members.index(True) == TUPLE_INDEX[kind], REASON


def state():
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(2, WIDTH, SIDE, SIDE),
        "temb": torch.randn(2, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
    }


def test_every_unet_block_is_known_here():
    assert sorted(DOWN + UP + MID + CODEC) == sorted(UNET_BLOCKS), f"{REASON}: it has other blocks"
    assert len(DOWN) > 8
    assert len(UP) > 8
    assert MID == ["UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"]


@pytest.mark.parametrize("last", [False, True], ids=["downsampled", "last"])
@pytest.mark.parametrize("name", DOWN)
def test_down_blocks(name, last):
    block = get_down_block(
        name, num_layers=1, out_channels=WIDTH, add_downsample=not last, downsample_padding=1, **COMMON, **ATTENTION
    )
    output = run(block, skip_sample=torch.randn(2, 3, SIDE, SIDE), **state())
    check_unet_block(block, output, SIDE if last else SIDE // 2)


@pytest.mark.parametrize("name", UP)
def test_up_blocks(name):
    layers = 3 if name.startswith("K") else 1
    block = get_up_block(
        name,
        num_layers=layers,
        out_channels=WIDTH,
        prev_output_channel=WIDTH,
        add_upsample=True,
        **COMMON,
        **ATTENTION,
    )
    residuals = tuple(torch.randn(2, WIDTH, SIDE, SIDE) for _ in block.resnets)
    output = run(
        block, res_hidden_states_tuple=residuals, skip_sample=torch.randn(2, 3, SIDE // 2, SIDE // 2), **state()
    )
    check_unet_block(block, output, 2 * SIDE)


@pytest.mark.parametrize("name", MID)
def test_mid_blocks(name):
    block = get_mid_block(name, **COMMON, **ATTENTION)
    check_unet_block(block, run(block, **state()), SIDE)


def registered():
    TransformerBlockRegistry._register()
    return {kind.__name__: metadata for kind, metadata in TransformerBlockRegistry._registry.items()}


@pytest.mark.parametrize("name", ["JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"])
def test_diffusers_own_table_says_the_same_of_two_streams(name):
    metadata = registered()[name]
    assert metadata.return_hidden_states_index == TUPLE_INDEX[name], REASON
    assert metadata.return_encoder_hidden_states_index is not None, REASON


def test_diffusers_own_table_agrees_wherever_both_have_a_class():
    both = set(registered()) & set(TUPLE_INDEX)
    assert both == {name for name in TUPLE_INDEX if name.endswith("TransformerBlock")}
    assert all(registered()[name].return_hidden_states_index == TUPLE_INDEX[name] for name in both), REASON
    assert registered()["BasicTransformerBlock"].return_encoder_hidden_states_index is None, REASON


BLOCKS = {
    "unet_text": ["mid_block.attentions.0", "mid_block.attentions.0.transformer_blocks.0"],
    "dit": ["transformer_blocks.1"],
    "pixart": ["transformer_blocks.1"],
    "sana": ["transformer_blocks.1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.0.attn", "transformer_blocks.1", "transformer_blocks.1.attn"],
    "sd35": ["transformer_blocks.0", "transformer_blocks.0.attn2"],
    "flux": ["transformer_blocks.0", "transformer_blocks.0.attn", "single_transformer_blocks.1"],
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in BLOCKS.items() for path in paths])
def test_the_stream_has_the_length_of_the_image(tiny, name, path):
    net, tokens = tiny(name), 64 if name == "sana" else 16
    found = capture(net.network, [Address(path)], net)[Address(path)]
    assert found.shape in ((2, tokens, 16), (2, 16, 4, 4)), REASON


@pytest.mark.parametrize("path", BLOCKS["flux"])
def test_the_stream_follows_the_image(tiny, path):
    """Without positions, image tokens in another order give the same stream in another order."""
    net = tiny("flux")
    found = capture(net.network, [Address(path)], net)[Address(path)]
    net.inputs["hidden_states"] = net.inputs["hidden_states"].flip(1)
    flipped = capture(net.network, [Address(path)], net)[Address(path)]
    torch.testing.assert_close(flipped, found.flip(1), rtol=0, atol=1e-5, msg=REASON)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("unet_text", "BasicTransformerBlock"), ("pixart", "BasicTransformerBlock"), ("sana", "SanaTransformerBlock")],
)
def test_blocks_outside_the_table_return_a_tensor(tiny, name, kind):
    outputs = []
    for module in tiny(name).network.modules():
        if type(module).__name__ == kind:
            module.register_forward_hook(lambda _, __, output: outputs.append(output))
    tiny(name)()
    assert outputs
    assert all(isinstance(output, torch.Tensor) for output in outputs), REASON


def test_blocks_and_processors_we_name_exist():
    from diffusers.models import attention, attention_processor
    from diffusers.models.transformers import sana_transformer, transformer_flux

    places = (attention, attention_processor, sana_transformer, transformer_flux, unet_2d_blocks)
    known = {name for place in places for name in vars(place)}
    assert {*TUPLE_INDEX, *MODULATED_CHILD, *TEXT_FIRST, "BasicTransformerBlock"} <= known
