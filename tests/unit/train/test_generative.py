import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from diffrep import load_backbone, run_train
from diffrep.config import DataConfig, TrainConfig, to_yaml
from diffrep.errors import ConfigError, DiffrepError, LayerError
from diffrep.testing import TINY, TINY_OFFICIAL, save_images
from diffrep.train.average import Average
from diffrep.train.data import open_training
from diffrep.train.generative import PROJECTORS, Generative
from diffrep.train.objective import Batch
from diffrep.train.order import StepRandom

CPU = torch.device("cpu")
SIT = {
    "input_size": 16,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 3,
}


def config(image_folder, out, kind="repa", args=SIT, **changes):
    given = {
        "model": {"kind": kind, "args": args},
        "data": DataConfig(path=image_folder, splits="train"),
        "out": out,
        "steps": 4,
        "batch_size": 4,
        "warmup": 0,
        "checkpoint_every": 2,
        "log_every": 1,
        "flip": True,
        "mixed_precision": "no",
        **changes,
    }
    return TrainConfig(**given)


def opened(settings):
    """Returns an objective with its module and its averaged weights, as the trainer puts them together."""
    torch.manual_seed(settings.seed)
    objective = Generative(settings, CPU)
    data = open_training(settings, objective.image_channels)
    objective.attach(data)
    module = objective.module().train()
    average = Average(module, 0.9)
    objective.follow(average)
    return objective, data, module, average


def loss_of(objective, data, module, rows=(0, 7, 12), step=0):
    rows = list(rows)
    batch = Batch(rows, data[rows, [False] * len(rows)])
    drawn = objective.draw((len(rows), *batch.clean.shape[1:]), StepRandom(0, step))
    return objective.loss(module, step, *objective.inputs(batch, drawn))


def stir(module, std=0.1):
    """Moves all weights: much of what is zero at the start would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for weight in module.parameters():
        if weight.requires_grad:
            weight.data += std * torch.randn(weight.shape, generator=generator)


KINDS = {
    "repa": ("repa", SIT),
    "sit": ("sit", SIT | {"learn_sigma": True}),
    "dit": ("dit", SIT),
    "adm": ("adm", TINY_OFFICIAL["adm"]),
    "edm": ("edm", TINY_OFFICIAL["edm"] | {"label_dim": 3}),
    "unet": ("UNet2DModel", TINY["unet2d"][1]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_is_trained_and_opens_again(image_folder, tmp_path, name):
    kind, args = KINDS[name]
    model = run_train(config(image_folder, tmp_path / "run", kind, args, ema=0.5, steps=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["loss"] < 100 and len(line["loss_bins"]) == 5 for line in lines)
    assert all(line["tflops"] > 0 and line["data_wait"] >= 0 for line in lines)
    backbone = load_backbone(model, device="cpu")
    objective, data, _, average = opened(config(image_folder, "unused", kind, args))
    assert backbone.schedule.describe() == objective.template.schedule.describe()
    assert backbone.blocks() == objective.template.blocks()
    x = torch.randn(2, backbone.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    time = backbone.schedule.at_sigma(0.5).time
    assert backbone.denoise(x, time).isfinite().all()


def test_a_flow_of_a_unet_opens_as_a_flow(image_folder, tmp_path):
    run = config(image_folder, tmp_path / "run", *KINDS["unet"], objective={"kind": "flow"}, steps=1)
    backbone = load_backbone(run_train(run), device="cpu")
    assert backbone.schedule.describe() == {"kind": "flow", "path": "linear", "data_time": 0, "scale": 1000.0}
    with pytest.raises(ConfigError, match="path linear, prediction velocity; got cosine"):
        run_train(config(image_folder, tmp_path / "b", *KINDS["unet"], objective={"kind": "flow", "path": "cosine"}))
    with pytest.raises(ConfigError, match="objective.kind='edm' is not for model.kind='repa'; give flow"):
        run_train(config(image_folder, tmp_path / "c", objective={"kind": "edm"}))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "score"])
def test_what_a_flow_predicts_is_written_beside_it(image_folder, tmp_path, prediction):
    flow = {"kind": "flow", "path": "cosine", "prediction": prediction}
    backbone = load_backbone(run_train(config(image_folder, tmp_path / "a", objective=flow, steps=1)), device="cpu")
    assert (backbone.schedule.path, backbone.schedule.prediction) == ("cosine", prediction)


def test_weights_in_channels_last_are_saved(image_folder, tmp_path):
    """As U-Nets are laid out on CUDA."""
    objective, _, module, _ = opened(config(image_folder, "unused", *KINDS["unet"]))
    module.to(memory_format=torch.channels_last)
    average = Average(module, 0.9)
    objective.follow(average)
    average.save(tmp_path)
    average.load(tmp_path, 1)
    objective.export(module, tmp_path / "model", torch.float16)
    name = "conv_in.weight"
    found = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")[name]
    torch.testing.assert_close(found.float(), module.network.get_parameter(name), atol=1e-3, rtol=1e-3)


def test_alignment_terms_add_up_and_are_logged(image_folder, tmp_path, encoder):
    align = {
        "enc": {"preset": "repa", "encoder": encoder, "layers": ["blocks.0", "blocks.2"], "width": 16},
        "own": {"preset": "sra", "layers": "blocks.0", "width": 16},
        "spread": {"preset": "dispersive", "weight": 0.25},
    }
    objective, data, module, _ = opened(config(image_folder, "unused", align=align))
    stir(module)
    loss = loss_of(objective, data, module)
    parts = {name: value.item() for name, value in loss.parts.items()}
    assert set(parts) == {
        "denoise",
        "align/enc/blocks.0",
        "align/enc/blocks.2",
        "align/own/blocks.0",
        "align/spread/blocks.0",
    }
    wanted = parts["denoise"] + 0.5 * (parts["align/enc/blocks.0"] + parts["align/enc/blocks.2"]) / 2
    wanted += 0.5 * parts["align/own/blocks.0"] + 0.25 * parts["align/spread/blocks.0"]
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    loss.total.backward()
    assert all(weight.grad is not None for weight in module.parameters() if weight.requires_grad)


def test_the_average_of_the_weights_teaches_at_less_noise(image_folder):
    """SRA: one step of the loss by hand, from the averaged network itself."""
    align = {
        "own": {"preset": "sra", "layers": "blocks.0", "ema_layers": "blocks.2", "width": 16, "distance": "smooth_l1"}
    }
    objective, data, module, average = opened(config(image_folder, "unused", align=align, label_dropout=0.5))
    for _ in range(3):
        stir(module)
        average.step()
    rows = list(range(12))
    batch = Batch(rows, data[rows, [False] * 12])
    drawn = objective.draw((12, *batch.clean.shape[1:]), StepRandom(0, 0))
    mixture, eps, dropped, nearer = drawn
    assert (nearer.place <= mixture.place).all() and (mixture.place - nearer.place).max() <= 0.2
    assert 0 < dropped.sum() < 12
    loss = objective.loss(module, 0, *objective.inputs(batch, drawn))
    clean = data.images
    x0 = torch.stack([clean[row] for row in rows]) * 2 - 1
    labels = torch.where(dropped, 3, batch.tensors["label"])
    teacher = objective.averaged.network
    averaged = dict(teacher.named_parameters())
    assert not torch.equal(averaged["blocks.0.attn.qkv.weight"], module.network.blocks[0].attn.qkv.weight)

    def stream(network, mixed, block):
        t = mixed.time.view(-1, 1, 1, 1)
        found = []
        handle = network.blocks[block].register_forward_hook(lambda *call: found.append(call[2]))
        network((1 - t) * x0 + t * eps, mixed.time, labels)
        handle.remove()
        return found[0].transpose(1, 2).unflatten(2, (4, 4))

    with torch.no_grad():
        target = stream(teacher, nearer, 2)
        found = next(iter(module.projectors["own"].values()))(stream(module.network, mixture, 0))
    torch.testing.assert_close(
        loss.parts["align/own/blocks.0"], torch.nn.functional.smooth_l1_loss(found, target, beta=0.05)
    )


def test_labels_are_dropped_as_drawn_and_by_nothing_else(image_folder):
    objective, data, module, _ = opened(config(image_folder, "unused", label_dropout=0.3))
    stir(module)
    first, second = (loss_of(objective, data, module).total.item() for _ in range(2))
    assert first == second, "the module drops no labels of its own"
    rows = list(range(18)) * 20
    batch = Batch(rows, {"label": torch.tensor([row // 6 for row in rows]), "image": torch.zeros(360, 1, 16, 16)})
    drawn = objective.draw((360, 1, 16, 16), StepRandom(0, 0))
    cond = objective.inputs(batch, drawn)[4]["labels"]
    null = cond == 3
    assert abs(null.float().mean() - 0.3) < 0.07
    assert torch.equal(cond[~null], batch.tensors["label"][~null])


def test_a_term_that_has_ended_costs_no_target_and_leaves_no_gradient(image_folder, tmp_path, encoder):
    align = {"enc": {"preset": "haste", "encoder": encoder, "stop": 2, "width": 16}}
    objective, data, module, _ = opened(config(image_folder, "unused", align=align))
    stir(module)
    calls = []
    objective.encoders["enc"].network.conv_stem.register_forward_hook(lambda *call: calls.append(1))
    assert "align/enc/blocks.0" in loss_of(objective, data, module, step=1).parts and len(calls) == 1
    loss = loss_of(objective, data, module, step=2)
    assert list(loss.parts) == ["denoise"] and len(calls) == 1
    loss.total.backward()
    assert all(weight.grad.abs().sum() == 0 for weight in module.projectors.parameters())


def test_projectors_are_saved_beside_the_model(image_folder, tmp_path, encoder):
    align = {"enc": {"preset": "irepa", "encoder": encoder, "layers": "blocks.1"}}
    model = run_train(config(image_folder, tmp_path / "run", align=align))
    state = load_file(model / PROJECTORS)
    assert {name: tuple(weight.shape[1:]) for name, weight in state.items() if weight.ndim > 1} == {
        "enc.blocks/1.weight": (32, 3, 3)
    }
    last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["teacher_ms"] > 0


def test_recomputed_activations_change_nothing(image_folder, encoder):
    grads = []
    for name in ("repa", "unet", "edm"):
        align = {"enc": {"preset": "repa", "encoder": encoder, "width": 16}} if name == "repa" else {}
        found = []
        for checkpointing in (False, True):
            settings = config(image_folder, "unused", *KINDS[name], align=align, checkpointing=checkpointing)
            objective, data, module, _ = opened(settings)
            stir(module)
            loss_of(objective, data, module).total.backward()
            found.append([weight.grad for weight in module.parameters() if weight.requires_grad])
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(again, plain)
        grads.append(found)
    assert len(grads) == 3


@pytest.mark.compile
def test_a_compiled_model_is_the_same(image_folder, encoder):
    align = {"enc": {"preset": "repa", "encoder": encoder, "width": 16}}
    objective, data, module, _ = opened(config(image_folder, "unused", align=align))
    stir(module)
    found = []
    for model in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        loss = loss_of(objective, data, model)
        loss.total.backward()
        found.append((loss.total, [weight.grad.clone() for weight in module.parameters() if weight.requires_grad]))
    torch.testing.assert_close(found[1][0], found[0][0])
    for plain, compiled in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.mp
def test_two_processes_have_the_losses_of_one(image_folder, tmp_path, two_processes, encoder, monkeypatch, capsys):
    """In fp32, with labels dropped and noise and time drawn for each sample, and terms that compare samples."""
    align = {
        "enc": {"preset": "repa", "encoder": encoder, "width": 16},
        "spread": {"preset": "dispersive", "layers": "blocks.2"},
        "pairs": {"preset": "repa", "encoder": encoder, "width": 16, "distance": "contrastive", "layers": "blocks.1"},
    }
    settings = config(image_folder, "unused", align=align, steps=20, batch_size=8, label_dropout=0.3)
    file = tmp_path / "train.yaml"
    file.write_text(to_yaml(settings))
    one = tmp_path / "one"
    run_train(settings.model_copy(update={"out": str(one)}))
    two = tmp_path / "two"
    done = two_processes.run("train", file, f"out={two}")
    assert done.codes == [0, 0], done.err
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 20
    for a, b in zip(*logs, strict=True):
        for key in (
            "loss",
            "denoise",
            "grad_norm",
            "align/enc/blocks.0",
            "align/spread/blocks.2",
            "align/pairs/blocks.1",
        ):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])


# Going on from a checkpoint ------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_backbone(image_folder, tmp_path):
    first = run_train(config(image_folder, tmp_path / "a"))
    settings = config(image_folder, tmp_path / "b").model_dump() | {
        "model": {"source": {"source": str(first)}},
        "lr": 1e-9,
    }
    second = run_train(TrainConfig(**settings))
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="was trained with .*'prediction': 'velocity'"):
        run_train(TrainConfig(**settings | {"out": "x", "objective": {"kind": "flow", "prediction": "epsilon"}}))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit(image_folder, tmp_path, encoder):
    def wrong(error, message, **changes):
        with pytest.raises(error, match=message):
            run_train(config(image_folder, tmp_path / "never", **changes))
        assert not (tmp_path / "never").exists()

    enc = {"preset": "repa", "encoder": encoder}
    wrong(LayerError, "blocks.9", align={"a": enc | {"layers": "blocks.9"}})
    wrong(LayerError, "repa.9", align={"a": enc | {"layers": "repa.9"}})
    wrong(
        ConfigError, "has 5 classes and the data have 3; give model.args.num_classes=3", args=SIT | {"num_classes": 5}
    )
    wrong(ConfigError, "takes 4 channels, and images have 1 or 3; give codec", args=SIT | {"in_channels": 4})
    wrong(ConfigError, "made for 32 x 32 and the data are 16 x 16; give", args=SIT | {"input_size": 32})
    wrong(
        ConfigError,
        "give model.args.label_dim=3",
        model={"kind": "edm", "args": TINY_OFFICIAL["edm"] | {"label_dim": 4}},
        data=DataConfig(path=image_folder, splits="train"),
    )
    wrong(ConfigError, "multiples of its patch, 5", args=SIT | {"patch_size": 5, "input_size": 15})
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    vit = {"source": file, "model": "test_vit", "preset": "mae", "size": 24}
    wrong(ConfigError, "size=24 is no multiple of its patch", align={"a": {"preset": "repa", "encoder": vit}})
    wrong(ConfigError, "projector: none cannot change that", align={"a": enc | {"projector": "none"}})
    wrong(
        ConfigError,
        "1 layers and 2 ema_layers",
        align={"a": {"preset": "sra", "layers": "blocks.0", "ema_layers": ["blocks.1", "blocks.2"]}},
    )


def test_a_loss_that_is_not_finite_says_where(image_folder, tmp_path, encoder):
    align = {"enc": {"preset": "repa", "encoder": encoder, "width": 16}}
    run = tmp_path / "run"
    run_train(config(image_folder, run, align=align, steps=2))
    with pytest.raises(DiffrepError) as caught:
        # From step 3 on, where the first run stopped.
        settings = config(image_folder, run, align=align, steps=8, log_every=4)
        state = run / "checkpoints" / "step-0000002" / "model.safetensors"
        weights = load_file(state)
        name = "network.blocks.1.mlp.fc1.weight"
        weights[name][0, 0] = float("nan")
        save_file(weights, state)
        run_train(settings)
    message = str(caught.value)
    assert "first in step 3" in message and "in time bin" in message
    assert "layer 'network." in message and "The last checkpoint stays" in message
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-0000002"]


def test_a_folder_of_other_data_is_refused(image_folder, tmp_path):
    run = tmp_path / "run"
    run_train(config(image_folder, run, steps=2))
    other = save_images(tmp_path / "other", per_class=5)
    with pytest.raises(ConfigError, match="other settings|other data"):
        run_train(config(other, run, steps=4))
