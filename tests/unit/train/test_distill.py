import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffrep import FeatureRequest, dist, load_backbone, run_train
from diffrep.cli import main
from diffrep.config import (
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    DistillConfig,
    TrainConfig,
    to_yaml,
)
from diffrep.data import open_images
from diffrep.errors import ConfigError, DataError, LayerError
from diffrep.testing import save_images, save_tiny_pipeline
from diffrep.train.adapters import TimeAxis, load_adapters, positions
from diffrep.train.data import open_training
from diffrep.train.distill import Distillation, distance
from diffrep.train.objective import Batch
from diffrep.train.order import StepRandom
from diffrep.train.trainer import backward, rate

CPU = torch.device("cpu")
SMALL = AdapterConfig(width=16, depth=1, blocks=2)
LAYERS = ["mid_block", "up_blocks.0"]


def distill(teacher, **changes):
    return DistillConfig(teacher=teacher, **{"layers": LAYERS, "adapter": SMALL, **changes})


def config(teacher, image_folder, out, distilled=None, **changes):
    given = {
        "distill": distill(teacher, **(distilled or {})),
        "data": DataConfig(path=image_folder, splits="train"),
        "out": out,
        "steps": 4,
        "batch_size": 4,
        "warmup": 0,
        "lr": 1e-3,
        "weight_decay": 0,
        "checkpoint_every": 2,
        "log_every": 2,
        "flip": True,
        **changes,
    }
    return TrainConfig(**given)


def stir(module, std=0.1):
    """Moves all weights: much of what is zero at the start would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for weight in module.parameters():
        weight.data += std * torch.randn(weight.shape, generator=generator)


def opened(teacher, image_folder, **changes):
    objective = Distillation(distill(teacher, **changes), CPU)
    data = open_training(config(teacher, image_folder, "unused", changes), objective.image_channels)
    objective.attach(data)
    return objective, data.images


def some(objective, images, rows, step=0):
    """Returns what the loss of some images takes, with the draws of a step."""
    batch = torch.stack([images[row] for row in rows])
    drawn = objective.draw(tuple(batch.shape), StepRandom(0, step))
    return objective.inputs(Batch(rows, {"image": batch}), drawn)


def exported(run):
    return load_file(run / "diffusion_pytorch_model.safetensors")


def teacher_of(kind, folder_of):
    """A teacher that takes images, with the settings that its kind needs."""
    options = {"codec": folder_of("dit")} if kind in ("sit", "repa") else {}
    layers = {"edm": ["enc.16x16_block0", "dec.8x8_in0"], "adm": ["middle_block", "output_blocks.1"]}
    return BackboneConfig(source=folder_of(kind), **options), layers.get(kind, ["blocks"])


# Student and loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet2d", "dit", "sit", "edm", "adm"])
def test_a_student_begins_as_its_teacher_at_a_clean_level(folder_of, image_folder, kind):
    source, layers = teacher_of(kind, folder_of)
    objective, images = opened(source, image_folder, layers=layers)
    student = objective.module()
    clean, cond, time, *_ = some(objective, images, [0, 7])
    level = objective.teacher.schedule.level(objective.facts(student)["level"])
    assert level.noise == 0
    wanted = objective.teacher.capture(clean, level.time, layers, cond, tokens=True)
    found = student.features(clean, cond)
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)
        assert found[name].requires_grad and not wanted[name].requires_grad
    for name, adapted in student(clean, cond, time).items():
        wanted_at_all = positions(found[name])[:, None].expand_as(adapted)
        assert adapted.shape[:2] == (2, 3) and torch.equal(adapted, wanted_at_all)


@pytest.mark.parametrize("kind", ["cosine", "mse", "l1"])
def test_the_loss_is_that_of_a_plain_loop(folder_of, image_folder, kind):
    objective, images = opened(folder_of("dit"), image_folder, layers=["blocks"], loss=kind, bins=2)
    student = objective.module()
    stir(student)
    clean, cond, time, signal, noise, eps = some(objective, images, [0, 4, 9])
    assert eps.shape == (3, 2, 4, 8, 8) and time.shape == (3, 2)
    total = 0
    for name in objective.layers:
        distances = []
        for i, j in np.ndindex(3, 2):
            noised = signal[i, j] * clean[i : i + 1] + noise[i, j] * eps[i : i + 1, j]
            wanted = objective.teacher.capture(noised, int(time[i, j]), [name], cond, tokens=True)[name][0]
            found = student.adapters(student.features(clean[i : i + 1], cond), time[i : i + 1, j : j + 1])[name][0, 0]
            if kind == "cosine":
                each = -(found * wanted).sum(1) / found.norm(dim=1) / wanted.norm(dim=1)
            else:
                each = (found - wanted).abs() ** (2 if kind == "mse" else 1)
            distances.append(each.mean())
        total += torch.stack(distances).mean()
    torch.testing.assert_close(objective.loss(student, 0, clean, cond, time, signal, noise, eps).total, total)


def test_the_network_runs_once_an_image(folder_of, image_folder):
    objective, images = opened(folder_of("unet2d"), image_folder, bins=3)
    student = objective.module()
    calls = []
    student.network.conv_in.register_forward_hook(lambda *call: calls.append(len(call[2])))
    objective.loss(student, 0, *some(objective, images, [0, 1]))
    assert calls == [2]


@pytest.mark.parametrize("kind", ["unet2d", "sit", "edm"])
def test_times_fall_into_every_bin(folder_of, kind):
    source, layers = teacher_of(kind, folder_of)
    objective = Distillation(DistillConfig(teacher=source, layers=layers, bins=4, adapter=SMALL), CPU)
    shape = (64, objective.teacher.image_channels, 16, 16)
    time, signal, noise, eps, *spread = objective.draw(shape, StepRandom(0, 0))
    share = TimeAxis.of(objective.teacher.schedule).share(time)
    assert ((share * 4).floor() == torch.arange(4)).float().mean() > 0.98
    assert share[:, 0].std() > 0.05, "spread over the bin"
    for t, s, n in zip(time[3], signal[3], noise[3], strict=True):
        level = objective.teacher.schedule.at(t.item())
        torch.testing.assert_close(
            torch.tensor([level.signal, level.noise]), torch.stack([s, n]), atol=1e-5, rtol=1e-5
        )
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert len(spread) == (kind == "sit"), "a posterior is drawn where the codec has one"


def test_a_range_of_times_and_a_first_time_are_levels(folder_of):
    objective = Distillation(distill(folder_of("unet2d"), times=[100, 120], time_init="clean@30.5", bins=1), CPU)
    time = objective.draw((500, 1, 16, 16), StepRandom(0, 0))[0]
    assert (time.min(), time.max()) == (100, 120) and time.dtype == torch.int64
    assert objective.module().time == 30.5
    assert Distillation(distill(folder_of("unet2d")), CPU).module().time == 261


def test_weights_that_no_layer_depends_on_stay_and_the_time_does_not_decay(folder_of, image_folder, tmp_path):
    before = load_backbone(folder_of("unet2d"), device="cpu").network.state_dict()
    run = config(folder_of("unet2d"), image_folder, tmp_path / "run", lr=0.02, weight_decay=0.5)
    after = exported(run_train(run))
    later = ("up_blocks.1", "conv_out", "conv_norm_out")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.startswith(later), name
    time = float(json.loads((tmp_path / "run" / "model" / "distill.json").read_text())["level"][6:])
    assert 0 < abs(time - 261) < 4 * 0.02 * 999


# Training ------------------------------------------------------------------------------------------------------------


def test_a_student_learns(folder_of, tmp_path):
    photos = save_images(tmp_path / "images", per_class=8)
    given = {"steps": 30, "batch_size": 8, "lr": 3e-3, "log_every": 5, "checkpoint_every": 30, "ema": 0.8}
    run = config(folder_of("unet2d"), photos, tmp_path / "run", {"bins": 2}, **given)
    model = run_train(run)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert -len(LAYERS) <= losses[-1] < losses[0] - 0.05

    # On images that it has not seen, and against the untrained student.
    objective, _ = opened(folder_of("unet2d"), photos, bins=2)
    unseen = open_images(DataConfig(path=photos, splits="test"), 1)
    start = objective.module()
    trained = objective.module()
    trained.network.load_state_dict(load_backbone(model, device="cpu").network.state_dict())
    trained.adapters = load_adapters(model)
    inputs = some(objective, unseen, range(12), step=99)
    with torch.no_grad():
        assert objective.loss(trained, 0, *inputs).total < objective.loss(start, 0, *inputs).total - 0.05


def test_resume_is_exact(folder_of, image_folder, tmp_path):
    whole = run_train(config(folder_of("unet2d"), image_folder, tmp_path / "whole"))
    run = tmp_path / "cut"
    run_train(config(folder_of("unet2d"), image_folder, run))
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    shutil.rmtree(run / "model")
    # As a run of a version that did not know all keys.
    stored = json.loads((run / "config.json").read_text())
    del stored["accumulate"]
    (run / "config.json").write_text(json.dumps(stored))
    resumed = run_train(config(folder_of("unet2d"), image_folder, run))
    for one, other in (
        (exported(whole), exported(resumed)),
        *[[load_file(model / "distill.safetensors") for model in (whole, resumed)]],
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)
    notes = [json.loads((model / "distill.json").read_text()) for model in (whole, resumed)]
    assert notes[0] == notes[1]
    losses = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", run)
    ]
    assert losses[0] == losses[1]


def test_parts_of_a_step_add_up_to_it(folder_of, image_folder, tmp_path):
    objective, images = opened(folder_of("unet2d"), image_folder)
    rows = [0, 4, 8, 12]
    pixels = torch.stack([images[row] for row in rows])
    accelerator = Accelerator(cpu=True)
    found = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        student = objective.module()
        stir(student)
        settings = config(folder_of("unet2d"), image_folder, tmp_path, accumulate=parts)
        loss = backward(objective, student, settings, 3, Batch(rows, {"image": pixels}), accelerator)
        found.append((loss, {name: weight.grad for name, weight in student.named_parameters()}))
    dist.teardown(accelerator)
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss.total, found[0][0].total, atol=1e-5, rtol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], atol=1e-5, rtol=1e-3)
    with pytest.raises(ConfigError, match="does not divide among 1 processes in 3 parts each"):
        run_train(config(folder_of("unet2d"), image_folder, tmp_path / "3", accumulate=3))


def test_the_learning_rate_may_stay(folder_of, image_folder):
    given = {"warmup": 2, "steps": 6}
    for decay, wanted in (("none", [0.5, 1, 1, 1, 1, 1]), ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447])):
        settings = config(folder_of("unet2d"), image_folder, "x", decay=decay, **given)
        assert [rate(step, settings) for step in range(6)] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.mp
def test_two_processes_train_the_same_student(folder_of, image_folder, tmp_path, two_processes, monkeypatch, capsys):
    file = tmp_path / "train.yaml"
    file.write_text(to_yaml(config(folder_of("unet2d"), image_folder, "unused", steps=3, mixed_precision="no")))
    monkeypatch.setattr(dist, "launch", two_processes.launch)
    for out, processes in (("one", 1), ("two", 2)):
        capsys.readouterr()
        status = main(["train", str(file), f"out={tmp_path / out}", "--nproc", str(processes)])
        printed = capsys.readouterr().err
        assert status == 0, printed
        assert ("in 2 processes" in printed) == (processes == 2)
    models = [tmp_path / out / "model" for out in ("one", "two")]
    for file in ("diffusion_pytorch_model.safetensors", "distill.safetensors"):
        one, two = (load_file(model / file) for model in models)
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


@pytest.mark.compile
def test_a_compiled_student_is_the_same(folder_of, image_folder):
    objective, images = opened(folder_of("unet2d"), image_folder, layers=["mid_block"])
    student = objective.module()
    inputs = some(objective, images, [0, 4])
    losses, grads = [], []
    for model in (student, torch.compile(student, backend="aot_eager")):
        student.zero_grad()
        losses.append(objective.loss(model, 0, *inputs).total)
        losses[-1].backward()
        grads.append([weight.grad for weight in student.parameters() if weight.requires_grad])
    torch.testing.assert_close(losses[1], losses[0])
    for plain, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-3)


# What is left of a run -----------------------------------------------------------------------------------------------


def test_an_exported_folder_is_the_student(folder_of, image_folder, tmp_path):
    source = BackboneConfig(source=folder_of("sit"), codec=folder_of("dit"))
    run = tmp_path / "run"
    model = run_train(config(source, image_folder, run, {"layers": ["blocks"]}, ema=0.0, lr=1e-2))
    objective, images = opened(source, image_folder, layers=["blocks"])
    student = objective.module()
    student.load_state_dict(load_file(run / "checkpoints" / "step-0000004" / "model.safetensors"))

    backbone = load_backbone(model, device="cpu")
    assert type(backbone) is type(objective.teacher)
    assert backbone.schedule.describe() == objective.teacher.schedule.describe()
    assert backbone.codec.describe() == objective.teacher.codec.describe()
    adapters = load_adapters(model)
    level = backbone.schedule.level(adapters.level)
    assert level.time == pytest.approx(student.time.item(), rel=1e-7)
    assert json.loads((run / "results.json").read_text())["metrics"]["level"] == adapters.level
    clean, cond, time, *_ = some(objective, images, [0, 7])
    wanted = student.features(clean, cond)
    found = backbone.capture(clean, level.time, ["blocks"], tokens=True)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name].detach(), atol=1e-6, rtol=1e-5)
    teacher = objective.teacher.capture(clean, level.time, ["blocks"], tokens=True)
    assert not torch.allclose(found["blocks.2"], teacher["blocks.2"], atol=1e-3)
    noised = student(clean, cond, time)
    for name, adapted in adapters(found, time).items():
        torch.testing.assert_close(adapted, noised[name].detach(), atol=1e-5, rtol=1e-5)
    request = FeatureRequest("blocks.2", adapters.level, noise="none", pool="mean")
    again = backbone.extract(torch.stack([images[0], images[7]]), request)
    assert list(again.keys()) == [("blocks.2", adapters.level)]


def test_half_precision_and_a_time_that_is_not_learned(folder_of, image_folder, tmp_path):
    given = {"export_dtype": "float16", "mixed_precision": "bf16", "steps": 1, "checkpoint_every": 1}
    model = run_train(config(folder_of("unet2d"), image_folder, tmp_path / "run", {"learn_time": False}, **given))
    weights = exported(model)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    note = json.loads((model / "distill.json").read_text())
    assert note["level"] == "clean@261" and note["noise"] == "none"
    assert note["teacher"]["weights"] == load_backbone(folder_of("unet2d"), device="cpu").weights_hash
    assert note["load_backbone"] == {}


def test_teachers_that_could_not_be_written(tmp_path):
    with pytest.raises(ConfigError, match="a ModuleBackbone, which cannot be written as a folder"):
        Distillation(DistillConfig(teacher=BackboneConfig(source="pixels", family="pixels"), layers="patches"), CPU)


# Conditions ----------------------------------------------------------------------------------------------------------


def test_images_conditioned_on_their_labels(folder_of, image_folder):
    objective, images = opened(folder_of("dit"), image_folder, layers=["blocks.1"], labels=True)
    rows = [0, 7, 14]
    inputs = some(objective, images, rows)
    assert inputs[1]["labels"].tolist() == [images.label(row) for row in rows] == [0, 1, 2]
    student = objective.module()
    one = some(objective, images, rows)
    unlabelled, _ = opened(folder_of("dit"), image_folder, layers=["blocks.1"])
    other = some(unlabelled, images, rows)
    assert len(other[1]["labels"]) == 1, "one row serves all"
    assert objective.loss(student, 0, *one).total != unlabelled.loss(unlabelled.module(), 0, *other).total


def test_captions(image_folder, tmp_path):
    pytest.importorskip("transformers")
    pipeline = save_tiny_pipeline("sd15", tmp_path / "sd15")
    objective, images = opened(pipeline, image_folder, layers=["mid_block"], captions="a photo of a {label}")
    cond = some(objective, images, [0, 7])[1]
    wanted = objective.teacher.condition(["a photo of a class0", "a photo of a class1"], 2)
    assert torch.equal(cond["prompt_embeds"], wanted["prompt_embeds"])
    objective.loss(objective.module(), 0, *some(objective, images, [0, 7])).total.backward()

    texts = tmp_path / "captions.json"
    texts.write_text(json.dumps({images.id(row): f"number {row}" for row in range(len(images))}))
    listed, _ = opened(pipeline, image_folder, layers=["mid_block"], captions=texts)
    cond = some(listed, images, [7])[1]
    assert torch.equal(cond["prompt_embeds"], objective.teacher.condition("number 7", 1)["prompt_embeds"])

    run = tmp_path / "run"
    model = run_train(config(pipeline, image_folder, run, {"layers": ["mid_block"], "cond": "a cat"}, steps=1))
    student = load_backbone(model, device="cpu")
    prompted = student.condition("a cat", 1)["prompt_embeds"]
    torch.testing.assert_close(prompted, objective.teacher.condition("a cat", 1)["prompt_embeds"])


def test_captions_that_are_missing_or_do_not_fit(folder_of, image_folder, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"train/class0/0.png": "a cat"}))
    layers = {"layers": ["blocks.0"]}
    with pytest.raises(DataError, match="no caption for 17 of 18 images, such as 'train/class0/1.png'"):
        opened(folder_of("dit"), image_folder, captions=file, **layers)
    file.write_text("[1]")
    with pytest.raises(DataError, match="must hold an object"):
        opened(folder_of("dit"), image_folder, captions=file, **layers)
    file.write_text("{")
    with pytest.raises(DataError, match="cannot read the captions"):
        opened(folder_of("dit"), image_folder, captions=file, **layers)
    with pytest.raises(ConfigError, match="this network is unconditional"):
        opened(folder_of("unet2d"), image_folder, captions="a {label}")
    flat = tmp_path / "flat"
    shutil.copytree(image_folder / "train" / "class0", flat)
    objective = Distillation(distill(folder_of("dit"), labels=True, **layers), CPU)
    settings = config(folder_of("dit"), flat, "x", data=DataConfig(path=flat, splits="all"))
    with pytest.raises(ConfigError, match="need data that have one label each"):
        objective.attach(open_training(settings, 3))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_layers_that_cannot_be_learned(folder_of, image_folder, tmp_path):
    def start(kind, layers):
        return run_train(config(folder_of(kind), image_folder, tmp_path / "run", {"layers": layers}, steps=1))

    with pytest.raises(LayerError, match="no layer 'mid_blok' in UNet2DModel; did you mean"):
        start("unet2d", ["mid_blok"])
    with pytest.raises(LayerError, match="cannot learn 'conv_in:input': no gradient"):
        start("unet2d", ["mid_block", "conv_in:input"])
    with pytest.raises(LayerError, match="cannot learn 'mid_block.attentions.0:attention'"):
        start("unet2d", ["mid_block.attentions.0:attention"])
    with pytest.raises(LayerError, match=r"these are neither: time_embedding \(32,\)"):
        start("unet2d", ["time_embedding"])
    # The folder is no run's yet: what was mended goes there.
    start("unet2d", ["mid_block"])
    with pytest.raises(ConfigError, match=r"\(distill.layers: \['mid_block'\] there, \['up_blocks.0'\] now\)"):
        start("unet2d", ["up_blocks.0"])


def test_a_teacher_of_other_channels(folder_of, image_folder, tmp_path):
    wrong = BackboneConfig(source=folder_of("unet2d"), codec=folder_of("dit"))
    with pytest.raises(ConfigError, match="the codec gives 4 channels, the network takes 1"):
        run_train(config(wrong, image_folder, tmp_path / "a"))
    latent = BackboneConfig(source=folder_of("sit"))
    with pytest.raises(ConfigError, match="takes images of 4 channels"):
        run_train(config(latent, image_folder, tmp_path / "b", {"layers": ["blocks"]}))


def test_times_that_no_teacher_has(folder_of):
    with pytest.raises(ConfigError, match="is one time"):
        Distillation(distill(folder_of("unet2d"), times=[5, 5]), CPU)
    with pytest.raises(ConfigError, match="integer timesteps 0 to 999"):
        Distillation(distill(folder_of("unet2d"), times=[5, 1000]), CPU)


def test_distances():
    found, wanted = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert distance(wanted * 3, wanted, "cosine") == pytest.approx(-1)
    assert distance(-wanted, wanted, "cosine") == pytest.approx(1)
    assert distance(found, wanted, "mse") == pytest.approx(((found - wanted) ** 2).mean().item())
    assert distance(found, wanted, "l1") == pytest.approx((found - wanted).abs().mean().item())
