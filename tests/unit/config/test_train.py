import pytest

from diffrep.config import ModelConfig, TrainConfig, to_plain, validate
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
