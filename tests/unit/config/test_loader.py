from pathlib import Path

import pytest

from diffrep.cli.validate import SCHEMAS as VERBS
from diffrep.config import (
    AggregateConfig,
    CorrespondConfig,
    DDPMConfig,
    EDMConfig,
    EncoderConfig,
    ExtractConfig,
    FeatureRequest,
    FeedbackConfig,
    MatchConfig,
    ProbeConfig,
    SampleConfig,
    SearchConfig,
    TrainConfig,
    VtabConfig,
    WarpConfig,
    load_config,
    to_plain,
    to_yaml,
    validate,
)
from diffrep.errors import ConfigError

MINIMAL = """
backbone: fashion-unet
data: {path: photos, size: 32}
request: {layers: blocks, levels: [10]}
out: features
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_later_words_win_and_a_bare_path_keeps_the_sections_other_keys(file):
    config = load_config(ExtractConfig, [file], ["data=other", "batch_size=8", "request.levels=[1,sigma=0.7]"])
    assert (config.data.path, config.data.size, config.batch_size) == ("other", 32, 8)
    assert config.request.levels == (1, "sigma=0.7")
    assert config.backbone.source == "fashion-unet"


def test_a_bare_value_keeps_the_other_keys_of_a_section_under_a_name(tmp_path):
    file = tmp_path / "train.yaml"
    term = "{preset: irepa, weight: 2, encoder: {source: A, preset: mae, size: 64}}"
    file.write_text(
        f"{{model: {{kind: sit, args: B/2}}, steps: 1, out: o, data: {{path: p, splits: a}}, align: {{x: {term}}}}}"
    )
    config = load_config(TrainConfig, [file], ["align.x.encoder=B", "align.x=repa", "align.y.encoder=${data.path}"])
    assert to_plain(config.align["x"].encoder) == to_plain(EncoderConfig(source="B", preset="mae", size=64))
    assert (config.align["x"].preset, config.align["x"].weight) == ("repa", 2)
    assert config.align["y"].encoder.source == "p"


def test_one_of_several_kinds_of_section():
    words = ["model.kind=sit", "model.args=B/2", "data=p", "data.splits=a", "steps=1", "out=o"]

    def message(*more):
        with pytest.raises(ConfigError) as caught:
            load_config(TrainConfig, [], [*words, *more])
        return str(caught.value)

    assert load_config(TrainConfig, [], [*words, "objective=ddpm"]).objective == DDPMConfig()
    assert TrainConfig(model={"args": {}}, store="s", out="o", steps=1, objective="edm").objective == EDMConfig()
    found = message("objective.prediction=epsilon", "stepz=1")
    assert "- objective: give objective.kind: flow, ddpm or edm" in found and "- stepz: unknown key" in found
    assert "- objective: give objective.kind: flow, ddpm or edm (got 3)" in message("objective=3")
    assert "- objective.kind: unknown kind; did you mean 'flow'?" in message("objective.kind=flwo")
    assert "- objective.kind: unknown kind; known: flow, ddpm, edm." in message("objective=score")
    found = message("objective.kind=ddpm", "objective.prediction=epsilon", "objective.density=many")
    assert "- objective.prediction: unknown key; did you mean 'prediction_type'?" in found
    assert "- objective.density: Input should be 'uniform' or 'low' (got 'many')" in found


def test_base_files_come_first(file, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("base: config.yaml\nbatch_size: 3\ndata: there\n")
    config = load_config(ExtractConfig, [child])
    assert (config.batch_size, config.data.path, config.data.size) == (3, "there", 32)
    file.write_text("base: child.yaml\n" + MINIMAL)
    with pytest.raises(ConfigError, match="lead back"):
        load_config(ExtractConfig, [child])


def test_wrong_key_type_and_bound_come_in_one_message(file):
    with pytest.raises(ConfigError) as caught:
        load_config(
            ExtractConfig, [file], ["request.levls=[1]", "batch_size=many", "unit_size=0", "request.pool=quarter"]
        )
    message = str(caught.value)
    assert "4 errors" in message
    assert "request.levls: unknown key; did you mean 'levels'" in message
    assert "batch_size: Input should be a valid integer" in message
    assert "(got 'many')" in message
    assert "unit_size: Input should be greater than 0 (got 0)" in message
    assert (
        "request.pool: Input should be 'none' or 'mean' (got 'quarter'), or Input should be a valid integer" in message
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["batch_size"], "write key=value"),
        (["=3"], "write key=value"),
        (["data.name=CIFAR10"], "goes with kind: torchvision"),
        (["request.levels=[]"], "request.levels"),
        (["backbone.dtype=fp8"], "backbone.dtype"),
        (["data=[a,b]"], "data"),
        (["data=${nope}"], "nope"),
    ],
)
def test_unreadable_words(file, words, text):
    with pytest.raises(ConfigError, match=text):
        load_config(ExtractConfig, [file], words)


def test_missing_damaged_and_list_files(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        load_config(ProbeConfig, [tmp_path / "none.yaml"])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(ProbeConfig, [tmp_path / "bad.yaml"])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="got a list"):
        load_config(ProbeConfig, [tmp_path / "list.yaml"])


def test_a_base_that_is_no_path(file):
    file.write_text("base: 5\n" + MINIMAL)
    with pytest.raises(ConfigError, match="base must be a path"):
        load_config(ExtractConfig, [file])


def test_configs_are_frozen_and_round_trip():
    request = FeatureRequest("blocks", 10)
    assert request == FeatureRequest(["blocks"], [10])
    assert FeatureRequest(**to_plain(request)) == request
    with pytest.raises(Exception, match="frozen|cannot assign"):
        request.draws = 2


CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMAS = {
    "extract": (ExtractConfig, ["data=X", "out=Y"]),
    "probe": (ProbeConfig, ["store=X"]),
    "search": (SearchConfig, ["backbone=B", "data=X", "out=Y"]),
    "feedback": (FeedbackConfig, ["backbone=B", "data=X", "out=Y", "levels=[90]", "read=[up_blocks.1]"]),
    "vtab": (VtabConfig, ["backbone=B", "data=X", "out=Y"]),
    "train": (TrainConfig, ["data=X", "out=Y"]),
    "sample": (SampleConfig, ["backbone=B", "out=Y"]),
    "correspond-evaluate": (CorrespondConfig, ["backbone=B", "pairs=X", "out=Y"]),
    "correspond-train": (AggregateConfig, ["backbone=B", "pairs=X", "val_pairs=Z", "out=Y"]),
    "correspond-match": (MatchConfig, ["backbone=B", "out=Y"]),
    "correspond-warp": (WarpConfig, ["backbone=B", "data=X", "out=Y"]),
}
# Configs of a folder that serves several actions; the others are of its first.
ACTIONS = {"hyperfeatures.yaml": "correspond-train", "cats_train.yaml": "correspond-train"}


def verb_of(file):
    folder = file.parent.name
    return ACTIONS.get(file.name, "correspond-evaluate") if folder == "correspond" else folder


FILES = [file for file in sorted(CONFIGS.rglob("*.yaml")) if file.parent.name != "accelerate"]  # accelerate's own
SHIPPED = [(verb_of(file), file) for file in FILES]
WORDS = {"fashion_full.yaml": ["trained.attention.store=Z"]}
# Configs that are trained from a store, which "data=X" above contradicts.
WORDS |= {file.name: ["data=null"] for verb, file in SHIPPED if verb == "train" and "mini" in file.name}


def read_back(config, folder):
    """Loads the file that a run folder gets."""
    file = folder / "resolved.yaml"
    file.write_text(to_yaml(config))
    return load_config(type(config), [file])


@pytest.mark.parametrize(("verb", "file"), SHIPPED, ids=[f"{verb}/{file.stem}" for verb, file in SHIPPED])
def test_shipped_configs_load_and_can_be_read_back(verb, file, tmp_path):
    schema, words = SCHEMAS[verb]
    config = load_config(schema, [file], words + (WORDS.get(file.name, []) if verb in ("probe", "train") else []))
    assert read_back(config, tmp_path) == config


def test_every_verb_has_its_schema_here():
    assert SCHEMAS.keys() == VERBS.keys() == CHANGES.keys()
    for verb, (schema, _) in SCHEMAS.items():
        assert schema.__name__ == VERBS[verb]


# Values that are not the defaults, of every type that a key can have.
CHANGES = {
    "extract": [
        "backbone.config={precond: vp, channels: 16}", "data.splits=train", "data.limit={train: 5}",
        "data.label_key=[a,b]", "request.layers=blocks", "request.levels=[1,0.42,sigma=0.7,clean@-1]",
        "request.pool=4", "cond=a photo", "on_error=skip",
    ],
    "probe": [
        "data=X", "data.limit=7", "val_split=val", "test_split=null", "pools=[stored,2]", "strengths=[1e-5,3]",
        "trained.mine.kind=mlp", "trained.mine.levels=[5,sigma=0.7]", "low_data={}", "low_data.heads=[knn]",
        "baselines=[pixels]",
    ],
    "search": ["request.levels=[5]", "rungs=[50,200]", "probe.low_data={}", "probe.val_split=val", "ranking=none"],
    "vtab": [
        "request.layers=blocks", "request.levels=[5]", "data.size=64", "tasks=[dtd,cifar]", "probe.heads=[ncm]",
        "cond=3",
    ],
    "feedback": ["pairs=[[up_blocks.0,down_blocks.1],[a,b]]", "head.kind=linear", "lr=1e-5", "test_split=null"],
    "train": ["model.args={sample_size: 32, norm: null}", "data.splits=train", "steps=3", "clip=0.5"],
    "sample": [
        "sampler.method=sde", "sampler.interval=[0.1,0.7]", "sampler.guided_channels=3", "labels=[3,1]", "grid=0",
    ],
    "correspond-evaluate": [
        "request.layers=blocks", "request.levels=[hf.inversion 9/10]", "request.noise=inversion", "join=true",
        "protocols=[geoaware-soft,{base: dift, threshold: points}]", "beside.other.backbone=C", "alphas=0.2",
        "pairs.images=[8,16]", "pairs.kind=cats", "pairs.crop_scale=2",
    ],
    "correspond-train": [
        "request.layers=blocks", "request.levels=[5]", "protocol={base: hyperfeatures, threshold: image}",
        "loss=sparse", "groups=4", "width=64", "patience=3",
    ],
    "correspond-match": ["request.layers=blocks", "request.levels=[5]", "points=[[3,4],[5.5,6]]", "mutual=false"],
    "correspond-warp": ["request.layers=blocks", "request.levels=[5]", "kinds=tps", "patch=null", "data.size=32"],
}  # fmt: skip


@pytest.mark.parametrize("verb", CHANGES)
def test_changed_configs_can_be_read_back(verb, tmp_path):
    schema, words = SCHEMAS[verb]
    words = ["backbone=B", *words] if verb == "extract" else words
    config = load_config(schema, [], words + CHANGES[verb])
    assert read_back(config, tmp_path) == config
    assert validate(schema, to_plain(config)) == config
