import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor, SlicedAttnProcessor
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffrep.errors import LayerError
from diffrep.taps import Address, Recorder, capture, parse_address
from diffrep.taps.attention import mean_weights


class SelfAttention(nn.Module):
    """Attention over a map, with a fused projection; `flat` gives heads and batch to the kernel as one axis."""

    def __init__(self, channels=8, heads=2, flat=False):
        super().__init__()
        self.heads = heads
        self.flat = flat
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def split_qkv(self, qkv):
        return qkv.flatten(2).transpose(1, 2).chunk(3, -1)

    def forward(self, x):
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in self.split_qkv(self.qkv(x)))
        if self.flat:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + out.reshape(len(x), self.heads, x[0, 0].numel(), -1).transpose(2, 3).reshape(x.shape)


def read(net, *names, stop=True):
    addresses = [parse_address(name, net.network) for name in names]
    return list(capture(net.network, addresses, net, stop=stop).values())


def heads(tensor, count):
    return tensor.unflatten(2, (count, -1)).transpose(1, 2)


def by_hand(query, key, mask=0.0):
    """Mean over heads of the softmax weights, for (B, heads, N, C)."""
    return (query @ key.mT * query.shape[-1] ** -0.5 + mask).softmax(-1).mean(1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# Networks ------------------------------------------------------------

# Family, module, heads, queries, keys: those without norm or rotation between the projections and the softmax.
PLAIN = [
    ("unet2d", "mid_block.attentions.0", 4, 16, 16),
    ("unet2d", "up_blocks.0.attentions.1", 4, 16, 16),
    ("unet_text", "mid_block.attentions.0.transformer_blocks.0.attn1", 2, 16, 16),
    ("unet_text", "mid_block.attentions.0.transformer_blocks.0.attn2", 2, 16, 5),
    ("dit", "transformer_blocks.1.attn1", 2, 16, 16),
    ("pixart", "transformer_blocks.1.attn1", 2, 16, 16),
    ("sana", "transformer_blocks.1.attn2", 2, 64, 5),
]


@pytest.mark.parametrize(("name", "path", "count", "queries", "keys"), PLAIN)
def test_maps_are_the_softmax_of_queries_and_keys(tiny, name, path, count, queries, keys):
    weights, some, q, k = read(tiny(name), f"{path}:attention", f"{path}:attention[4,1]", f"{path}:q", f"{path}:k")
    assert weights.shape == (2, queries, keys)
    assert weights.dtype == torch.float32
    close(weights, by_hand(heads(q, count), heads(k, count)))
    close(weights.sum(-1), torch.ones(2, queries))
    assert torch.equal(some, weights[:, :, [4, 1]])


def test_masked_text_gets_no_weight(tiny):
    path = "transformer_blocks.0.attn2"
    weights, q, k = read(tiny("pixart"), f"{path}:attention", f"{path}:q", f"{path}:k")
    mask = (1 - tiny("pixart").inputs["encoder_attention_mask"].float())[:, None, None] * -10000.0
    close(weights, by_hand(heads(q, 2), heads(k, 2), mask))
    assert weights[1, :, 2:].max() == 0
    assert weights[0].min() > 0


def test_sd3_joins_image_then_text(tiny):
    net, path = tiny("sd3"), "transformer_blocks.1.attn"
    weights, one, q, k, text = read(
        net, f"{path}:attention", f"{path}:attention[3]", f"{path}:q", f"{path}:k", f"{path}.add_k_proj"
    )
    whole = by_hand(heads(q, 2), heads(torch.cat([k, text], 1), 2))
    assert weights.shape == (2, 16, 5)
    close(weights, whole[:, :, 16:])
    assert torch.equal(one, weights[:, :, [3]])


def test_sd35_dual_attention_is_over_the_image(tiny):
    net, path = tiny("sd35"), "transformer_blocks.0.attn2"
    weights, q, k = read(net, f"{path}:attention", f"{path}:q", f"{path}:k")
    module = net.network.get_submodule(path)
    close(weights, by_hand(module.norm_q(heads(q, 2)), module.norm_k(heads(k, 2))))
    joint = read(net, "transformer_blocks.0.attn:attention")[0]
    assert joint.shape == (2, 16, 5)
    assert 0 < joint.sum(-1).min() < joint.sum(-1).max() < 1


def test_flux_joins_text_then_image(tiny):
    net, path = tiny("flux"), "transformer_blocks.0.attn"
    weights, q, k, text = read(net, f"{path}:attention", f"{path}:q", f"{path}:k", f"{path}.add_k_proj")
    module = net.network.get_submodule(path)
    q, k, text = module.norm_q(heads(q, 2)), module.norm_k(heads(k, 2)), module.norm_added_k(heads(text, 2))
    close(weights, by_hand(q, torch.cat([text, k], 2))[:, :, :5])


def test_flux_single_stream_reads_the_text_length_from_its_block(tiny):
    net, path = tiny("flux"), "single_transformer_blocks.1.attn"
    weights, some = read(net, f"{path}:attention", f"{path}:attention[4,0]")
    module = net.network.get_submodule(path)
    inputs = []
    hook = module.register_forward_pre_hook(
        lambda _, __, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    net()
    hook.remove()
    q, k = (norm(heads(to(inputs[0]), 2)) for norm, to in [(module.norm_q, module.to_q), (module.norm_k, module.to_k)])
    close(weights, by_hand(q, k)[:, 5:, :5])
    assert torch.equal(some, weights[:, :, [4, 0]])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_fused_projections_give_the_same_map(tiny, name):
    net, path = tiny(name), "transformer_blocks.0.attn:attention"
    before = read(net, path)[0]
    net.network.fuse_qkv_projections()
    torch.testing.assert_close(before, read(net, path)[0], rtol=0, atol=1e-5)


def test_queries_and_keys_are_seen_rotated(tiny):
    """With one and the same token everywhere, only the rotary embedding can tell places apart."""
    net, path = tiny("flux"), "single_transformer_blocks.0.attn:attention"
    for name in ("hidden_states", "encoder_hidden_states"):
        net.inputs[name] = net.inputs[name][:, :1].expand_as(net.inputs[name])
    alike = read(net, path)[0]
    torch.testing.assert_close(alike, alike[:, :1, :1].expand_as(alike))
    net.inputs["img_ids"] = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)
    rotated = read(net, path)[0]
    assert rotated[:, :, 0].std(1).min() > 1e-4
    torch.testing.assert_close(rotated, rotated[:, :, :1].expand_as(rotated))


def test_text_before_image_keys(tiny):
    """The attention of DeepFloyd IF's blocks: keys are [text, image], queries the image alone."""
    torch.manual_seed(0)
    module = Attention(
        8, heads=2, dim_head=4, added_kv_proj_dim=6, norm_num_groups=2, bias=True, processor=AttnAddedKVProcessor2_0()
    ).requires_grad_(False)
    x, text = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6)
    model = nn.Sequential(module)
    points = [Address("0", "attention"), Address("0", "q"), Address("0", "k"), Address("0.add_k_proj")]
    weights, q, k, added = capture(model, points, lambda: module(x, encoder_hidden_states=text)).values()
    close(weights, by_hand(heads(q, 2), heads(torch.cat([added, k], 1), 2))[:, :, :5])


@pytest.mark.parametrize("flat", [False, True])
def test_own_attention_classes(flat):
    torch.manual_seed(0)
    model = nn.Sequential(SelfAttention(flat=flat), SelfAttention(flat=flat)).requires_grad_(False)
    x = torch.randn(3, 8, 4, 5)
    weights, q, k = capture(model, [Address("1", p) for p in ("attention", "q", "k")], lambda: model(x)).values()
    close(weights, by_hand(heads(q, 2), heads(k, 2)))


# The pass ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("unet2d", "mid_block.attentions.0"),
        ("unet_text", "up_blocks.0.attentions.0.transformer_blocks.0.attn2"),
        ("pixart", "transformer_blocks.0.attn2"),
        ("sd3", "transformer_blocks.0.attn"),
        ("flux", "single_transformer_blocks.0.attn"),
    ],
)
def test_the_network_runs_as_without(tiny, name, path):
    net, outputs = tiny(name), []
    expected = net()
    address = parse_address(f"{path}:attention", net.network)
    capture(net.network, [address], lambda: outputs.append(net()), stop=False)
    assert torch.equal(outputs[0], expected)
    assert torch.equal(net(), expected)


def test_maps_and_layers_in_one_pass_end_after_the_last(tiny):
    net, ran = tiny("dit"), []
    names = ["transformer_blocks.1.attn1:attention", "transformer_blocks.0", "transformer_blocks.1:adaln"]
    hooks = [
        net.network.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
        for path in ("transformer_blocks.0", "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn1")
    ]
    mixed = read(net, *names)
    for hook in hooks:
        hook.remove()
    assert ran == ["transformer_blocks.0", "transformer_blocks.1.attn1.to_q"], "the pass should end in the softmax"
    for name, tensor in zip(names, mixed, strict=True):
        assert torch.equal(read(net, name, stop=False)[0], tensor)
    later = read(net, "transformer_blocks.0.attn1:attention", "transformer_blocks.2")
    assert torch.equal(later[0], read(net, "transformer_blocks.0.attn1:attention")[0])
    assert not net.network.transformer_blocks[1].attn1._forward_hooks


def test_a_recorder_reads_pass_after_pass(tiny):
    net = tiny("sd3")
    address = parse_address("transformer_blocks.0.attn:attention[2]", net.network)
    with Recorder(net.network, [address]) as recorder:
        first = recorder.run(net)[address]
        net.inputs["encoder_hidden_states"] = net.inputs["encoder_hidden_states"].roll(1, 1)
        assert not torch.equal(recorder.run(net)[address], first)
        net()  # outside run: the hooks keep still


def test_a_module_called_twice_is_read_at_its_first_call():
    torch.manual_seed(0)
    attention = SelfAttention().requires_grad_(False)
    model, x = nn.Sequential(attention), torch.randn(1, 8, 2, 2)
    once = capture(model, [Address("0", "attention")], lambda: attention(x), stop=False)
    twice = capture(model, [Address("0", "attention")], lambda: attention(attention(x)), stop=False)
    assert torch.equal(once[Address("0", "attention")], twice[Address("0", "attention")])


def test_gradients_and_autocast_are_kept_out():
    torch.manual_seed(0)
    model = nn.Sequential(SelfAttention())
    x, address = torch.randn(2, 8, 4, 4), Address("0", "attention")
    weights = capture(model, [address], lambda: model(x))[address]
    assert not weights.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        half, q, k = capture(model, [address, Address("0", "q"), Address("0", "k")], lambda: model(x)).values()
    assert q.dtype == torch.bfloat16
    close(half, by_hand(heads(q.float(), 2), heads(k.float(), 2)).detach())
    model(x).sum().backward()
    assert model[0].qkv.weight.grad is not None


@pytest.mark.parametrize("name", ["sana", "unet_text"])
def test_without_a_softmax_kernel_call_there_is_no_map(tiny, name):
    path = {"sana": "transformer_blocks.0.attn1", "unet_text": "mid_block.attentions.0.transformer_blocks.0.attn1"}[
        name
    ]
    net = tiny(name)
    if name == "unet_text":
        for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
            net.network.set_attn_processor(processor)
            with pytest.raises(LayerError, match=f"no softmax attention ran in '{path}'.*attention=sdpa"):
                read(net, f"{path}:attention")
    else:
        with pytest.raises(LayerError, match=f"no softmax attention ran in '{path}': linear attention has no map"):
            read(net, f"{path}:attention", "transformer_blocks.1")
    assert not net.network.get_submodule(path)._forward_hooks


def test_other_messages(tiny):
    with pytest.raises(LayerError, match=r"attn2:attention\[0,5\]': there are 5 key tokens; indices are 0 to 4"):
        read(tiny("unet_text"), "mid_block.attentions.0.transformer_blocks.0.attn2:attention[0,5]")

    class Unknown(nn.Module):
        """Joins text and image in an order nobody told."""

        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(8, 8)

        def forward(self, hidden_states, encoder_hidden_states):
            both = torch.cat([hidden_states, encoder_hidden_states], 1)[:, None]
            return F.scaled_dot_product_attention(both, both, both)

    model = nn.Sequential(Unknown())
    with pytest.raises(LayerError, match="21 queries attend to 21 keys, for 16 image and 5 text.*FluxAttnProcessor"):
        capture(model, [Address("0", "attention")], lambda: model[0](torch.zeros(2, 16, 8), torch.zeros(2, 5, 8)))

    class Chunked(SelfAttention):
        def forward(self, x):
            return torch.cat([super(Chunked, self).forward(row[None]) for row in x])

    model = nn.Sequential(Chunked())
    with pytest.raises(LayerError, match="in a batch of 2"):
        capture(model, [Address("0", "attention")], lambda: model(torch.zeros(2, 8, 3, 3)))


# The softmax ------------------------------------------------------------


def kernel_weights(query, key, **options):
    """The weights that the kernel itself uses: its output for one-hot values, which are (B, heads, Nk, Nk)."""
    eye = torch.eye(key.shape[2], dtype=query.dtype).expand(*key.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(query, key, eye, **options).mean(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7},
        {"is_causal": True},
        {"attn_mask": torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) > 0.4},
        {"attn_mask": (torch.rand(2, 4, 6, 9, generator=torch.Generator().manual_seed(1)) > 0.4)},
        {"attn_mask": torch.randn(2, 1, 1, 9, generator=torch.Generator().manual_seed(1)), "scale": 2.0},
        {"attn_mask": torch.tensor([0.0, -torch.inf] * 4 + [0.0])[None]},
        {"attn_mask": torch.tensor([[False] * 9, [True] * 9] * 3)},
    ],
    ids=["plain", "scale", "causal", "bool", "bool-by-head", "float", "minus-infinity", "blind-rows"],
)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("at_once", [1, 50, 1 << 24])
def test_weights_are_those_of_the_kernel(options, key_heads, at_once):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, key_heads, 9, 8)
    expected = kernel_weights(query, key, enable_gqa=key_heads < 4, **options)
    mask = options.get("attn_mask")
    actual = mean_weights(
        query,
        key,
        range(1, 6),
        [8, 0, 3],
        None if mask is None else mask.expand(2, 4, 6, 9),
        options.get("is_causal", False),
        options.get("scale"),
        at_once,
    )
    close(actual, expected[:, 1:6, [8, 0, 3]])


def test_more_queries_than_keys_under_a_causal_mask():
    query, key = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 3, 4)
    close(mean_weights(query, key, range(5), [0, 1, 2], causal=True), kernel_weights(query, key, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_worked_out_in_fp32_or_better(dtype):
    query, key = torch.randn(1, 2, 6, 8).to(dtype), torch.randn(1, 2, 9, 8).to(dtype)
    weights = mean_weights(query, key, range(6), list(range(9)))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.double(), by_hand(query.double(), key.double()), rtol=0, atol=1e-6)


def test_no_tensor_holds_a_map_of_every_head():
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    query = torch.randn(1, 8, 256, 4)
    with Watch():
        mean_weights(query, query, range(256), [3, 5])
    assert max(largest) == 256 * 256
    largest.clear()
    with Watch():
        mean_weights(query, query, range(256), [3, 5], at_once=256 * 16)
    assert max(largest) == 256 * 16
