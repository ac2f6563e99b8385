import pytest
import torch
from torch.nn import functional as F

from diffrep import FeatureRequest
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.heads import (
    AttentionHead,
    AttentionPool,
    ConvHead,
    DifFormer,
    LinearHead,
    MatryoshkaHead,
    MLPHead,
    load_head,
    matryoshka_loss,
    pool_features,
    save_head,
)

LAYERS = {"up_blocks.10": (6, 4, 6), "up_blocks.2": (5, 2, 3), "mid": (3, 1, 1)}
LEVELS = ["t=90", "clean"]
STRING = (
    "Use_CLS_Token:True:8,Pool:2:1,Reshape,Insert_CLS_Token,Attention:8:2:1.5:1,Extract_CLS_Token,Dense:8:3:identity"
)
# One case for each head and option that changes its parts: (class, arguments, what it reads).
CASES = {
    "linear": (LinearHead, {"dim": 6 * 4 * 5, "classes": 3}, (6, 4, 5)),
    "linear pooled, batch": (LinearHead, {"dim": 24, "classes": 3, "pool": 2, "norm": "batch"}, (6, 4, 5)),
    "mlp, layer": (MLPHead, {"dim": 7, "classes": 3, "hidden": (9, 8), "norm": "layer"}, (7,)),
    "mlp, standard": (MLPHead, {"dim": 54, "classes": 3, "hidden": [4], "pool": 3, "norm": "standard"}, (6, 4, 5)),
    "attention pool": (AttentionPool, {"channels": 6, "size": (4, 5), "classes": 3, "width": 16}, (6, 4, 5)),
    "attention": (AttentionHead, {"layers": STRING}, (8, 4, 5)),
    "attention, mean": (
        AttentionHead,
        {"layers": "Attention:8:4:2:2,FullyPool,Dense:8:7:relu,Dense:7:3:tanh", "dropout": 0.2},
        (11, 8),
    ),
    "conv": (ConvHead, {"channels": 6, "classes": 3, "width": 8}, (6, 5, 9)),
    "matryoshka": (MatryoshkaHead, {"dim": 30, "classes": 3}, (30,)),
    "matryoshka, tied, projected": (
        MatryoshkaHead,
        {"dim": 120, "classes": 3, "nesting": [2, 5], "tied": True, "project": 5},
        (6, 4, 5),
    ),
    "difformer": (
        DifFormer,
        {"layers": LAYERS, "levels": LEVELS, "classes": 3, "pool": 3, "width": 8, "heads": 2, "depth": 1},
        None,
    ),
    "difformer, batch, positions": (
        DifFormer,
        {
            "layers": LAYERS,
            "levels": LEVELS[:1],
            "classes": 3,
            "width": 8,
            "heads": 4,
            "norm": "batch",
            "dropout": 0.1,
            "positions": True,
        },
        None,
    ),
    "difformer, none": (
        DifFormer,
        {"layers": LAYERS, "levels": LEVELS, "classes": 3, "width": 8, "mlp_ratio": 1.5, "norm": "none"},
        None,
    ),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(batch=4, layers=LAYERS, levels=LEVELS):
    pairs = [(layer, level) for layer in layers for level in levels]
    return {pair: noise(batch, *layers[pair[0]], seed=index) for index, pair in enumerate(pairs)}


def build(kind, arguments, seed=0):
    torch.manual_seed(seed)
    return kind(**arguments)


def read_by(shape):
    return maps() if shape is None else noise(4, *shape)


def cast(features, dtype):
    if isinstance(features, dict):
        return {key: value.to(dtype) for key, value in features.items()}
    return features.to(dtype)


@pytest.fixture(params=CASES)
def case(request):
    kind, arguments, shape = CASES[request.param]
    return build(kind, arguments), read_by(shape)


def scores_of(head, features):
    scores = head(features)
    return scores if isinstance(scores, list) else [scores]


def test_scores_gradients_and_half_precision(case):
    head, features = case
    scores = scores_of(head, features)
    assert all(score.shape == (4, 3) and score.dtype == torch.float32 for score in scores)
    sum(score.square().sum() for score in scores).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    head.eval()
    for dtype in (torch.float16, torch.bfloat16):
        rounded = cast(features, dtype)
        for low, high in zip(scores_of(head, rounded), scores_of(head, cast(rounded, torch.float32)), strict=True):
            assert low.dtype == torch.float32
            torch.testing.assert_close(low, high, rtol=0, atol=0)


def test_a_sample_does_not_depend_on_its_batch(case):
    head, features = case
    head.eval()
    alone = {k: v[1:2] for k, v in features.items()} if isinstance(features, dict) else features[1:2]
    for one, all_of_them in zip(scores_of(head, alone), scores_of(head, features), strict=True):
        torch.testing.assert_close(one[0], all_of_them[1], atol=1e-6, rtol=1e-5)


def test_a_saved_head_comes_back(case, tmp_path):
    head, features = case
    scores_of(head, features)  # moves what batch norm keeps
    head.eval()
    assert save_head(head, tmp_path / "head", {"accuracy": 0.75}) == tmp_path / "head"
    loaded = load_head(tmp_path / "head")
    assert type(loaded) is type(head) and not loaded.training
    assert loaded.about == head.about and loaded.about["accuracy"] == 0.75
    for again, first in zip(scores_of(loaded, features), scores_of(head, features), strict=True):
        torch.testing.assert_close(again, first, atol=0, rtol=0)
    direct = type(head).from_pretrained(tmp_path / "head")
    assert direct.about == head.about
    head.save_pretrained(tmp_path / "plain")
    load_head(tmp_path / "plain")


# Linear and MLP -------------------------------------------------------------------------------------------------


def test_norms_are_what_they_say():
    x = 3 * noise(50, 6) + 2
    for norm, expected in {
        "none": x,
        "batch": (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt(),
        "layer": (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt(),
    }.items():
        head = LinearHead(6, 3, norm=norm)
        torch.testing.assert_close(head(x), head.fcs[0](expected), atol=1e-5, rtol=1e-5)
    head = LinearHead(2, 3)
    head.mean.copy_(torch.tensor([1.0, 2.0]))
    head.std.copy_(torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(head(torch.tensor([[3.0, 6.0]])), head.fcs[0](torch.ones(1, 2)))
    assert head(torch.zeros(5, 2, 1, 1)).shape == (5, 3)


def test_linear_head_names_what_does_not_fit():
    with pytest.raises(UnknownNameError, match="norm 'bach'.*'batch'"):
        LinearHead(4, 2, norm="bach")
    with pytest.raises(ConfigError, match="flatten to 12 values, the head reads 4"):
        LinearHead(4, 2)(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"pool=2 reads maps .* not \(1, 12\)"):
        LinearHead(12, 2, pool=2)(torch.zeros(1, 12))


# Attention ------------------------------------------------------------------------------------------------------


def test_attention_pool_learns_where_things_are():
    """Two classes with the same mean feature, told apart by the place of one cell: pooling by mean could not."""
    labels = torch.arange(64) % 2
    cells = 0.1 * noise(64, 3, 4, 4)
    cells[labels == 0, :, 0, 0] += 2
    cells[labels == 1, :, 3, 3] += 2
    torch.manual_seed(0)
    head = AttentionPool(3, (4, 4), 2, width=16, depth=1, heads=2, dropout=0)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(head(cells), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    assert (head(cells).argmax(1) == labels).all()


def test_false_disables_the_class_token():
    head = AttentionHead("Use_CLS_Token:False:8, Reshape, Attention:8:2:4:1, FullyPool, Dense:8:3:sigmoid")
    assert "cls_token" not in head.state_dict()
    assert {"layers.1.attn.qkv.weight", "layers.3.weight"} <= head.state_dict().keys()
    scores = head(noise(2, 8, 3, 5))
    assert scores.shape == (2, 3) and (scores > 0).all() and (scores < 1).all()
    with pytest.raises(ConfigError, match="reads a class token and makes none"):
        AttentionHead(STRING.replace("True", "False"))


def test_a_layer_string_without_attention_is_a_linear_head():
    head = AttentionHead("Pool:2:2,Flatten,Dense:12:3:identity")
    linear = LinearHead(12, 3, pool=2, norm="none")
    linear.load_state_dict({"fcs.0.weight": head.layers[2].weight, "fcs.0.bias": head.layers[2].bias})
    x = noise(2, 3, 4, 4)
    torch.testing.assert_close(head(x), linear(x))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("FullPool,Dense:8:3:identity", UnknownNameError, "did you mean 'FullyPool'"),
        ("Dense:8:3:gelu", UnknownNameError, "activation 'gelu'"),
        ("Dense:8:3", ConfigError, "form Dense:<int>:<int>:<str>"),
        ("Attention:8:two:4:1", ConfigError, "form Attention:<int>:<int>:<float>:<int>"),
        ("Attention:8:3:4:1", ConfigError, "3 attention heads do not divide the token width 8"),
        ("Use_CLS_Token:yes:8", ConfigError, "True or False, not 'yes'"),
    ],
)
def test_a_wrong_layer_string_is_explained(layers, error, message):
    with pytest.raises(error, match=message):
        AttentionHead(layers)


# DifFormer ------------------------------------------------------------------------------------------------------


def test_difformer_dropout_and_positions_do_not_change_the_other_keys():
    kind, arguments, _ = CASES["difformer"]
    plain = kind(**arguments).state_dict().keys()
    assert kind(**arguments, dropout=0.5).state_dict().keys() == plain
    assert kind(**arguments, positions=True).state_dict().keys() - plain == {"positions"}
    assert "pre_layer.up_blocks-10.2.weight" in plain


def test_difformer_dropout_acts_in_training_only():
    kind, arguments, _ = CASES["difformer"]
    head, features = build(kind, {**arguments, "dropout": 0.5}), maps()
    assert not torch.equal(head(features), head(features))
    head.eval()
    same = build(kind, arguments)
    torch.testing.assert_close(head(features), same(features), atol=0, rtol=0)


def test_difformer_levels_share_weights_and_do_not_mix():
    head, features = build(*CASES["difformer"][:2]), maps()
    before = head.summary(features)
    features["mid", "clean"] = -features["mid", "clean"]
    after = head.summary(features)
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=0, rtol=0)
    assert not torch.allclose(after[:, 8:], before[:, 8:])
    swapped = {(layer, LEVELS[1 - LEVELS.index(level)]): value for (layer, level), value in features.items()}
    torch.testing.assert_close(head.summary(swapped), after.roll(8, dims=1))


def test_difformer_batch_norm_sees_one_level_at_a_time():
    """As in the published head, which runs level after level: statistics of one level are not those of another."""
    arguments = {"layers": {"a": (3, 4, 4)}, "levels": LEVELS, "classes": 2, "width": 4, "heads": 1, "norm": "batch"}
    head = build(DifFormer, arguments)
    features = {("a", "t=90"): noise(8, 3, 4, 4), ("a", "clean"): 5 + 3 * noise(8, 3, 4, 4)}
    head(features)
    both = build(DifFormer, arguments)
    shifted = {("a", "t=90"): features["a", "t=90"], ("a", "clean"): noise(8, 3, 4, 4)}
    # Batch norm takes shift and scale away, so long as it sees them alone.
    torch.testing.assert_close(head.tokens(features, "clean"), both.tokens(shifted, "clean"), atol=1e-4, rtol=0)


def test_difformer_positions_tell_cells_apart():
    arguments = {"layers": {"a": (3, 2, 2)}, "levels": ["clean"], "classes": 2, "width": 8, "heads": 2, "norm": "none"}
    features = {("a", "clean"): noise(2, 3, 2, 2)}
    mirrored = {("a", "clean"): features["a", "clean"].flip(-1)}
    for positions in (False, True):
        head = build(DifFormer, {**arguments, "positions": positions}).eval()
        same = torch.allclose(head(features), head(mirrored), atol=1e-6)
        assert same is not positions


def test_difformer_reads_what_a_backbone_gives(unet):
    request = FeatureRequest(layers=["mid_block", "up_blocks.0"], levels=["t=5", "clean"])
    features = unet.extract(torch.rand(3, 1, 16, 16), request)
    shapes = {layer: features[layer, "clean"].shape[1:] for layer in request.layers}
    head = DifFormer(shapes, ["t=5", "clean"], classes=4, width=8, heads=2)
    assert head(features).shape == (3, 4)
    with pytest.raises(UnknownNameError, match="mid"):
        DifFormer({"mid": (1, 1, 1)}, ["clean"], classes=4, width=8)(features)


def test_difformer_names_the_map_that_does_not_fit():
    kind, arguments, _ = CASES["difformer"]
    head, features = kind(**arguments), maps()
    wrong = {**features, ("mid", "clean"): torch.zeros(4, 3, 2, 2)}
    with pytest.raises(ConfigError, match=r"map mid@clean is \(4, 3, 2, 2\), the head reads \(B, 3, 1, 1\)"):
        head(wrong)
    del wrong["mid", "clean"]
    with pytest.raises(UnknownNameError, match="map 'mid@clean'.*mid@t=90"):
        head(wrong)
    with pytest.raises(UnknownNameError, match="norm 'group'"):
        kind(**arguments, norm="group")
    for layers, levels in (({}, LEVELS), (LAYERS, []), ({"a.b": (1, 1, 1), "a-b": (1, 1, 1)}, LEVELS)):
        with pytest.raises(ConfigError, match="needs layers and levels"):
            DifFormer(layers, levels, classes=2)
    with pytest.raises(ConfigError, match="3 attention heads do not divide"):
        kind(**{**arguments, "heads": 3})


# Matryoshka -----------------------------------------------------------------------------------------------------


def test_matryoshka_reads_prefixes_only():
    for tied in (False, True):
        head, x = MatryoshkaHead(16, 3, (4, 16), tied), noise(2, 16)
        before = head(x)
        x[:, 4:] += 1
        after = head(x)
        torch.testing.assert_close(after[0], before[0], atol=0, rtol=0)
        assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize(
    ("dim", "nesting"), [(5, [5]), (8, [8]), (9, [8, 9]), (64, [8, 16, 32, 64]), (40, [8, 16, 32, 40])]
)
def test_matryoshka_doubles_when_not_told(dim, nesting):
    assert MatryoshkaHead(dim, 2).nesting == nesting
    assert MatryoshkaHead(100, 2, project=dim).nesting == nesting


def test_matryoshka_loss_is_a_weighted_sum():
    scores, labels = [noise(6, 3), noise(6, 3, seed=1)], torch.arange(6) % 3
    parts = [F.cross_entropy(score, labels) for score in scores]
    torch.testing.assert_close(matryoshka_loss(scores, labels), parts[0] + parts[1])
    torch.testing.assert_close(matryoshka_loss(scores, labels, [0.0, 2.0]), 2 * parts[1])
    with pytest.raises(ConfigError, match="1 weights for 2 granularities"):
        matryoshka_loss(scores, labels, [1.0])
    for nesting in ([8, 4], [4, 4], [0, 4], []):
        with pytest.raises(ConfigError, match="nesting must ascend"):
            MatryoshkaHead(16, 3, nesting)
    with pytest.raises(ConfigError, match="beyond the 16 values"):
        MatryoshkaHead(16, 3, [4, 32])


def test_attention_heads_divide_the_width():
    for make in (
        lambda: AttentionPool(6, (4, 5), 3, width=10, heads=4),
        lambda: DifFormer(LAYERS, LEVELS, 3, width=10, heads=4),
    ):
        with pytest.raises(ConfigError, match="4 attention heads do not divide the token width 10"):
            make()


def test_a_fitted_classifier_becomes_a_head():
    mean, std, weight, bias = noise(5), noise(5).abs() + 1, noise(3, 5), noise(3)
    head, x = LinearHead.from_fit(mean, std, weight, bias), noise(4, 5, seed=1)
    assert not head.training
    torch.testing.assert_close(head(x), (x - mean) / std @ weight.T + bias)


def test_pooling_makes_no_cells_up():
    maps, tokens = noise(2, 3, 4, 1), noise(2, 5, 3)
    pooled = pool_features(maps.half(), 2)
    assert (pooled.shape, pooled.dtype) == ((2, 3, 2, 1), torch.float32)
    torch.testing.assert_close(pooled, maps.half().float().unflatten(2, (2, 2)).mean(3))
    torch.testing.assert_close(pool_features(tokens, 1), tokens.mean(1))
    assert pool_features(tokens, 2) is tokens
    assert pool_features(tokens[:, 0], 1).shape == (2, 3)
