"""The heads, with published weights loaded strictly, against the published heads' numbers."""

import json

import pytest
import torch
from safetensors import safe_open

from diffrep.heads import AttentionHead, ConvHead, DifFormer, LinearHead, MatryoshkaHead, MLPHead, matryoshka_loss

TOLERANCE = {"atol": 2e-5, "rtol": 0}


def read(golden, name):
    with safe_open(golden / "heads" / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping


def load(head, tensors, prefix="sd."):
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    head.load_state_dict(state, strict=True)
    return head.eval()


def test_attention_head(golden):
    tensors, meta = read(golden, "diffssl_attnhead_cls")
    head = load(AttentionHead(meta["layer_string"]), tensors)
    torch.testing.assert_close(head(tensors["input"]), tensors["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["diffssl_attention_gd", "diffssl_difformer_layernorm"])
def test_attention_fusion_and_difformer(golden, name):
    tensors, meta = read(golden, name)
    channels, sides = json.loads(meta["dims"]), json.loads(meta["sizes"])
    blocks, times = json.loads(meta["b_list"]), json.loads(meta["t_list"])
    _, width, heads, ratio, depth = meta["fusion_arc"].split(",")[2].split(":")
    head = DifFormer(
        {str(b): (channels[str(b)], sides[str(b)], sides[str(b)]) for b in blocks},
        [f"t={t}" for t in times],
        classes=5,
        pool=int(meta["pre_pool_size"]),
        width=int(width),
        heads=int(heads),
        depth=int(depth),
        mlp_ratio=float(ratio),
        norm=meta["norm_type"],
    )
    load(head, tensors)
    features = {(str(b), f"t={t}"): tensors[f"feat.t{t}.b{b}"] for b in blocks for t in times}
    for t in times:
        torch.testing.assert_close(head.tokens(features, f"t={t}"), tensors[f"tokens.t{t}"], **TOLERANCE)
    summary = torch.cat([tensors[f"cls.t{t}"] for t in times], dim=1)
    torch.testing.assert_close(head.summary(features), summary, **TOLERANCE)
    torch.testing.assert_close(head(features), tensors["logits"], **TOLERANCE)


@pytest.mark.parametrize("pool", [1, 2, 3, 4])
def test_linear_head(golden, pool):
    tensors, _ = read(golden, "diffssl_linear_head")
    head = load(LinearHead(20 * pool**2, 5, pool, norm="none"), tensors, f"linear.pool{pool}.sd.")
    torch.testing.assert_close(head(tensors["feat"]), tensors[f"linear.pool{pool}.logits"], **TOLERANCE)
    pooled = LinearHead(20 * pool**2, 5, norm="none")
    pooled.load_state_dict(head.state_dict())
    scores = pooled(tensors[f"linear.pool{pool}.head_input"])
    torch.testing.assert_close(scores, tensors[f"linear.pool{pool}.logits"], **TOLERANCE)


def test_mlp_head(golden):
    tensors, _ = read(golden, "diffssl_linear_head")
    head = load(MLPHead(80, 5, hidden=(16, 12), pool=2), tensors, "mlp16_12.sd.")
    torch.testing.assert_close(head(tensors["feat"]), tensors["mlp16_12.pool2.logits"], **TOLERANCE)


def test_conv_head(golden):
    tensors, _ = read(golden, "revelio_diffc")
    head = load(ConvHead(20, 5, width=16, dropout=0.0), tensors)
    torch.testing.assert_close(head(tensors["input"]), tensors["logits_eval"], **TOLERANCE)
    torch.testing.assert_close(head(tensors["input_odd"]), tensors["logits_odd_eval"], **TOLERANCE)
    scores = head.train()(tensors["input"])
    torch.testing.assert_close(scores, tensors["logits_train_p0"], **TOLERANCE)
    state, prefix = head.state_dict(), "sd_after_train_fw."
    after = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert len(after) == 10
    for key, value in after.items():
        torch.testing.assert_close(state[key], value, **TOLERANCE)


@pytest.mark.parametrize(("name", "tied"), [("mrl", False), ("mrl_e", True)])
def test_matryoshka_head(golden, name, tied):
    tensors, meta = read(golden, "mrl_head")
    nesting = json.loads(meta["nesting_list"])
    head = load(MatryoshkaHead(16, 5, nesting, tied), tensors, f"{name}.sd.")
    scores = head(tensors["x"])
    for size, score in zip(nesting, scores, strict=True):
        torch.testing.assert_close(score, tensors[f"{name}.logits.{size}"], **TOLERANCE)
    loss = matryoshka_loss(scores, tensors["y"])
    torch.testing.assert_close(loss, tensors[f"{name}.loss"][0], **TOLERANCE)
    weights = json.loads(meta["relative_importance_weighted"])
    weighted = matryoshka_loss(scores, tensors["y"], weights)
    torch.testing.assert_close(weighted, tensors[f"{name}.loss_weighted"][0], **TOLERANCE)
