import pytest

from diffrep.config import ModelConfig, TrainConfig, load_config, to_plain, validate
from diffrep.errors import ConfigError


def test_settings_that_contradict_each_other():
    good = to_plain(TrainConfig(distill={"teacher": "x"}, data={"path": "y", "splits": "train"}, out="z", steps=4))

    def wrong(message, **changes):
        with pytest.raises(ConfigError, match=message):
            validate(TrainConfig, good | changes)

    args = to_plain(ModelConfig(args={"sample_size": 16}))
    wrong("give model .* or distill .*; both are given", model=args)
    wrong("neither is given", distill=None)
    wrong("only for diffusion models: objective", objective={"kind": "flow"})
    wrong("only for diffusion models: label_dropout", label_dropout=0.2)
    wrong("cond and labels are given", distill=good["distill"] | {"cond": 0, "labels": True})
    wrong("give a .json file", distill=good["distill"] | {"captions": "a photo"})
    wrong(
        "teacher.device and teacher.dtype are the run's",
        distill=good["distill"] | {"teacher": {"source": "x", "dtype": "bfloat16"}},
    )
    wrong("multiple of 2", distill=good["distill"] | {"adapter": {"width": 7}})


@pytest.mark.parametrize(
    ("word", "left"), [("align=null", []), ("align.repa=null", []), ("align.a.preset=sra", ["repa", "a"])]
)
def test_overrides_add_alignment_terms_and_take_them_away(tmp_path, word, left):
    file = tmp_path / "run.yaml"
    file.write_text("{model: {kind: repa, args: B/2}, align: {repa: {stored: x}}, store: s, steps: 1, out: o}")
    assert list(load_config(TrainConfig, [file], [word]).align) == left
