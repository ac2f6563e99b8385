import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.nn import functional as F

from diffrep.errors import LayerError
from diffrep.taps import Address, Site, capture, dry_run, parse_address, site_of, to_meta
from diffrep.taps.outputs import TUPLE_INDEX, kinds


class ConvAttention(nn.Module):
    """Attention over a map with a fused 1x1 convolution whose channels run (head, q k v, channel), as in ADM."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)

    def split_qkv(self, qkv):
        parts = qkv.unflatten(1, (self.heads, 3, -1)).permute(2, 0, 4, 1, 3)
        return parts.flatten(3).unbind(0)

    def forward(self, x):
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in self.split_qkv(self.qkv(x.flatten(2))))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).reshape(x.shape)


class AdaBlock(nn.Module):
    """A block in the form of the official DiT's."""

    def __init__(self, width):
        super().__init__()
        self.attn = TimmBlock(width, 2).attn
        self.norm1 = nn.LayerNorm(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return x + self.attn(self.norm1(x) * (1 + scale) + shift)


def read(tiny, *names, **options):
    addresses = [parse_address(name, tiny.network) for name in names]
    return list(capture(tiny.network, addresses, tiny, **options).values())


@pytest.mark.parametrize(
    "text",
    [
        "transformer_blocks.0",
        "transformer_blocks.0:input",
        "transformer_blocks.0:adaln",
        "transformer_blocks.0.attn1:q",
        "transformer_blocks.0.attn1:attention",
        "transformer_blocks.0.attn1:attention[4,1]",
    ],
)
def test_text_is_canonical(tiny, text):
    network = tiny("dit").network
    address = parse_address(text, network)
    assert str(address) == text
    assert parse_address(str(address), network) == address
    assert {address: 1}[parse_address(text, network)] == 1


def test_other_spellings_become_canonical(tiny):
    network = tiny("dit").network
    assert str(parse_address("transformer_blocks.0:output", network)) == "transformer_blocks.0"
    address = parse_address("transformer_blocks.0.attn1:attention[ 1, 4 ]", network)
    assert str(address) == "transformer_blocks.0.attn1:attention[1,4]"
    assert address == Address("transformer_blocks.0.attn1", "attention", (1, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transformer_blocks.0:q", "no attention module.*transformer_blocks.0 holds transformer_blocks.0.attn1$"),
        ("transformer_blocks.0:attention", "holds transformer_blocks.0.attn1$"),
        ("transformer_blocks.0.ff:k", "transformer_blocks.0.ff holds no attention module"),
        ("transformer_blocks.0.ff:adaln", "no adaptive norm.*holds no block with one"),
        ("transformer_blocks.0.attn1:attention[1,1]", "each named once"),
        ("transformer_blocks.0.attn1:attention[]", "indices between brackets"),
        ("transformer_blocks.0.attn1:attention[-1]", "indices between brackets"),
        ("transformer_blocks.0.attn1:attention[1", "indices between brackets"),
        ("transformer_blocks.0.attn1:q[1]", "only the point 'attention' takes tokens"),
        ("transformer_blocks.0.attn1:query", "points are output, input, q, k, v, adaln, attention"),
        ("transformer_blocks.0.attn1:", "unknown point ''"),
        ("transformer_blocks.9", "no layer 'transformer_blocks.9'.*did you mean"),
        ("transformer_blocks", "name a member, such as 'transformer_blocks.0'"),
        ("transformer_blocks.0.attn1.heads", "no layer"),
    ],
)
def test_wrong_addresses(tiny, text, message):
    with pytest.raises(LayerError, match=message):
        parse_address(text, tiny("dit").network)


def test_attention_inside_is_named_shortly(tiny):
    with pytest.raises(LayerError, match=r"attn1, .*attn2, .* \(4 in all\)"):
        parse_address("up_blocks.0:v", tiny("unet_text").network)
    with pytest.raises(LayerError, match="no adaptive norm"):
        parse_address("up_blocks.0.attentions.0.transformer_blocks.0:adaln", tiny("unet_text").network)


def test_parsing_does_not_list_the_network(tiny):
    network = tiny("unet_text").network
    calls = []
    network.named_modules = lambda *_: calls.append(1) or iter(())
    try:
        parse_address("up_blocks.0.attentions.0.transformer_blocks.0.attn2:k", network)
    finally:
        del network.named_modules
    assert not calls, "100 addresses on a network of 2,000 modules should not list it 100 times"


ATTENTIONS = [
    ("unet2d", "mid_block.attentions.0", 16),
    ("unet_text", "down_blocks.1.attentions.0.transformer_blocks.0.attn1", 16),
    ("dit", "transformer_blocks.1.attn1", 16),
    ("pixart", "transformer_blocks.0.attn1", 16),
    ("sana", "transformer_blocks.0.attn1", 64),
    ("sd3", "transformer_blocks.1.attn", 16),
    ("sd35", "transformer_blocks.0.attn2", 16),
    ("flux", "transformer_blocks.0.attn", 16),
]


@pytest.mark.parametrize(("name", "path", "tokens"), ATTENTIONS)
def test_queries_keys_and_values_are_the_image_projections(tiny, name, path, tokens):
    net = tiny(name)
    points = read(net, *(f"{path}:{point}" for point in "qkv"))
    children = read(net, *(f"{path}.to_{point}" for point in "qkv"))
    for point, child in zip(points, children, strict=True):
        assert point.shape == (2, tokens, 16)
        assert torch.equal(point, child)


def test_keys_of_cross_attention_are_of_the_text(tiny):
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    q, k, v = read(tiny("unet_text"), *(f"{path}:{point}" for point in "qkv"))
    assert (q.shape, k.shape, v.shape) == ((2, 16, 16), (2, 5, 16), (2, 5, 16))


@pytest.mark.parametrize(
    ("name", "path"),
    [("flux", "transformer_blocks.0.attn"), ("unet_text", "mid_block.attentions.0.transformer_blocks.0.attn2")],
)
def test_diffusers_fused_projections(tiny, name, path):
    net = tiny(name)
    names = [f"{path}:{point}" for point in "qkv"]
    before = read(net, *names)
    net.network.fuse_qkv_projections()
    child = "to_kv" if path.endswith("attn2") else "to_qkv"
    assert site_of(Address(path, "k"), net.network) == Site(f"{path}.{child}")
    for old, new in zip(before, read(net, *names), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-5)


def test_fused_convolution_is_split_by_its_module():
    torch.manual_seed(0)
    model = nn.Sequential(ConvAttention(8, 2)).requires_grad_(False)
    x = torch.randn(2, 8, 3, 5)
    found = capture(model, [Address("0", point) for point in "qkv"], lambda: model(x), stop=False)
    q, k, v = (tensor.unflatten(2, (2, -1)).transpose(1, 2) for tensor in found.values())
    expected = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).reshape(x.shape)
    assert found[Address("0", "q")].shape == (2, 15, 8)
    assert torch.equal(expected, model(x))
    assert site_of(Address("0", "q"), model) == Site("0.qkv")


def test_a_fused_convolution_needs_its_split():
    class Unknown(ConvAttention):
        split_qkv = None

    with pytest.raises(LayerError, match="Conv1d.*give Unknown a method split_qkv"):
        parse_address("0:q", nn.Sequential(Unknown(8, 2)))


def test_official_dit_and_timm_attention():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([AdaBlock(8)])}).requires_grad_(False)
    x, c = torch.randn(2, 6, 8), torch.randn(2, 8)
    block = model["blocks"][0]
    names = ["blocks.0:adaln", "blocks.0.attn:q", "blocks.0.attn:v"]
    addresses = [parse_address(name, model) for name in names]
    adaln, q, v = capture(model, addresses, lambda: block(x, c)).values()
    shift, scale = block.adaLN_modulation(c)[:, None].chunk(2, -1)
    assert torch.equal(adaln, block.norm1(x) * (1 + scale) + shift)
    assert torch.equal(q, block.attn.qkv(adaln)[..., :8])
    assert torch.equal(v, block.attn.qkv(adaln)[..., 16:])
    assert site_of(addresses[0], model) == Site("blocks.0.attn", "input")
    assert site_of(addresses[1], model) == Site("blocks.0.attn.qkv", "output")


@pytest.mark.parametrize(
    ("name", "block", "child", "tokens"),
    [
        ("dit", "transformer_blocks.1", "attn1", 16),
        ("pixart", "transformer_blocks.1", "attn1", 16),
        ("sana", "transformer_blocks.1", "attn1", 64),
        ("sd3", "transformer_blocks.1", "attn", 16),
        ("sd35", "transformer_blocks.0", "attn", 16),
        ("flux", "transformer_blocks.0", "attn", 16),
        ("flux", "single_transformer_blocks.1", "attn", 16),
    ],
)
def test_modulated_input(tiny, name, block, child, tokens):
    net = tiny(name)
    adaln, into, before, q = read(
        net, f"{block}:adaln", f"{block}.{child}:input", f"{block}:input", f"{block}.{child}:q"
    )
    assert adaln.shape == before.shape == (2, tokens, 16)
    assert torch.equal(adaln, into)
    # The rows of a layer norm have mean 0 and spread 1 before shift and scale, which are the same for every token.
    normed = F.layer_norm(before, before.shape[-1:], eps=1e-6)
    scale = (adaln[:, :1] - adaln[:, 1:2]) / (normed[:, :1] - normed[:, 1:2])
    shift = adaln[:, :1] - scale * normed[:, :1]
    torch.testing.assert_close(adaln, normed * scale + shift, rtol=1e-3, atol=1e-3)
    assert torch.equal(q, net.network.get_submodule(f"{block}.{child}.to_q")(adaln))
    assert site_of(Address(block, "adaln"), net.network) == Site(f"{block}.{child}", "input")


def test_sites(tiny):
    network = tiny("sd3").network
    attn = "transformer_blocks.0.attn"
    expected = {
        f"{attn}:q": Site(f"{attn}.to_q"),
        f"{attn}:attention": Site(attn),
        attn: Site(attn),
        f"{attn}:input": Site(attn, "input"),
    }
    assert {text: site_of(parse_address(text, network), network) for text in expected} == expected


INSIDE_SINGLE = ["attn", "attn:input", "attn:k", "attn.norm_q", "norm.norm", "proj_mlp", "act_mlp", "proj_out:input"]


@pytest.mark.parametrize("inner", INSIDE_SINGLE)
def test_inside_a_single_stream_block_only_image_tokens_come_back(tiny, inner):
    net = tiny("flux")
    path = "single_transformer_blocks.1"
    address = parse_address(f"{path}.{inner}", net.network)
    found = read(net, str(address))[0]
    assert found.shape[:2] == (2, 16)
    site = site_of(address, net.network)
    whole = []
    module = net.network.get_submodule(site.module)
    if site.at == "input":
        hook = module.register_forward_pre_hook(lambda _, a, k: whole.append([*a, *k.values()][0]), with_kwargs=True)
    else:
        hook = module.register_forward_hook(lambda _, __, output: whole.append(output))
    net()
    hook.remove()
    assert whole[0].shape[1] == 5 + 16
    assert torch.equal(found, whole[0][:, 5:])


def test_what_has_no_tokens_is_left_whole(tiny):
    assert read(tiny("flux"), "single_transformer_blocks.0.norm.linear")[0].shape == (2, 48)


def test_single_stream_block_end_to_end(tiny):
    """The image tokens inside add up to the block's own output."""
    net = tiny("flux")
    path = "single_transformer_blocks.0"
    before, attn, mlp, after = read(net, f"{path}:input", f"{path}.attn", f"{path}.act_mlp", path)
    block = net.network.get_submodule(path)
    gate = (after - before) / block.proj_out(torch.cat([attn, mlp], 2))
    torch.testing.assert_close(gate, gate[:, :1].expand_as(gate), rtol=1e-2, atol=1e-3)


def test_dry_run_and_meta_capture_agree_with_the_real_shapes(tiny):
    for name, path in [("flux", "single_transformer_blocks.0.attn"), ("sd3", "transformer_blocks.0.attn")]:
        net = tiny(name)
        shapes = {call.module: call.shape for call in dry_run(net.network, net)[0]}
        assert shapes[path] == shapes[f"{path}.to_k"] == (2, 16, 16)
        names = [f"{path}:q", f"{path}.to_v", f"{path}:attention[1,2]", path]
        addresses = [parse_address(text, net.network) for text in names]
        meta = to_meta(net.network)
        found = capture(meta, addresses, lambda net=net, meta=meta: net(meta))
        assert all(tensor.device.type == "meta" for tensor in found.values())
        assert {a: t.shape for a, t in found.items()} == {
            a: t.shape for a, t in zip(addresses, read(net, *names), strict=True)
        }


def test_subclasses_count_as_their_diffusers_class(tiny):
    """FSDP2 puts a subclass made on the fly in the place of a block's class."""
    net = tiny("flux")
    for path in ("transformer_blocks.0", "single_transformer_blocks.0"):
        block = net.network.get_submodule(path)
        block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})
        for name in (path, f"{path}.attn", f"{path}:adaln", f"{path}.attn:q"):
            assert read(net, name)[0].shape == (2, 16, 16)


def test_strangers_with_a_known_name_are_refused():
    class Attention(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(Attention())
    assert "Attention" in TUPLE_INDEX
    assert kinds(model[0]) == []
    with pytest.raises(LayerError, match="tuple of Tensor, Tensor"):
        capture(model, [Address("0")], lambda: model(torch.zeros(1)))


def test_an_adaptive_norm_points_to_its_block(tiny):
    with pytest.raises(LayerError, match="AdaLayerNormZero returns a tuple.*read ':adaln' of its block"):
        read(tiny("dit"), "transformer_blocks.0.norm1")


def test_attention_without_own_keys_says_so():
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    module = Attention(
        8, heads=2, dim_head=4, added_kv_proj_dim=6, only_cross_attention=True, processor=AttnAddedKVProcessor2_0()
    )
    with pytest.raises(LayerError, match="no to_k.*0.add_k_proj"):
        parse_address("0:k", nn.Sequential(module))
