import pytest

from diffrep.config import load_config, to_plain
from diffrep.config.protocol import PUBLISHED, Protocol, get_protocol
from diffrep.config.schema import Section
from diffrep.errors import ConfigError, UnknownNameError


class Evaluation(Section):
    protocol: Protocol = Protocol(base="dift")


def test_published_protocols_survive_a_round_trip():
    for name in PUBLISHED:
        protocol = get_protocol(name)
        assert protocol.name == name
        assert get_protocol(protocol) is protocol
        assert get_protocol(to_plain(protocol)) == protocol
        assert get_protocol({"name": name}) == protocol
    assert len({tuple(to_plain(get_protocol(name)).values())[1:] for name in PUBLISHED}) == len(PUBLISHED)


def test_defaults_are_those_of_dift():
    assert Protocol() == get_protocol("dift").model_copy(update={"name": "custom"})


def test_a_variant_says_what_it_changed():
    variant = get_protocol({"base": "geoaware", "threshold": "image", "grid": 60})
    assert variant.name == "geoaware with threshold=image"
    assert (variant.size, variant.compare, variant.threshold) == (840, "<", "image")
    assert get_protocol(to_plain(variant)) == variant
    assert get_protocol({"base": "geoaware", "name": "mine", "grid": 30}).name == "mine"
    assert get_protocol({"name": "mine", "compare": "<"}).model_dump() == {
        **get_protocol("dift").model_dump(),
        **{"name": "mine", "compare": "<"},
    }


def test_yaml_and_overrides(tmp_path):
    file = tmp_path / "evaluation.yaml"
    file.write_text("protocol: hyperfeatures\n")
    assert load_config(Evaluation, [file]).protocol == get_protocol("hyperfeatures")
    changed = load_config(Evaluation, [file], ["protocol.size=224"]).protocol
    assert (changed.name, changed.size, changed.query) == ("hyperfeatures with size=224", 224, "round")
    with pytest.raises(ConfigError, match="unknown protocol 'geoawar'; did you mean 'geoaware'"):
        load_config(Evaluation, [file], ["protocol=geoawar"])
    with pytest.raises(ConfigError, match="tresholt: unknown key; did you mean 'threshold'"):
        load_config(Evaluation, [file], ["protocol.tresholt=image"])


def test_a_published_name_keeps_its_rules():
    for given in ({"name": "dift", "compare": "<"}, {"base": "geoaware", "name": "dift"}):
        with pytest.raises(ConfigError, match="is not what 'dift' does; for a variant give base: dift"):
            get_protocol(given)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="unknown protocol 'difft'; did you mean 'dift'"):
        get_protocol("difft")
    for given in ({"base": "difft"}, {"name": "difft"}):
        with pytest.raises(ConfigError, match="unknown protocol 'difft'; did you mean 'dift'"):
            get_protocol(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fit": "pad"}, "fit=pad needs a size"),
        ({"window": 5}, "window and kernel belong to match=soft"),
        ({"match": "soft", "window": 4}, "window=4 has no middle"),
        ({"match": "soft", "window": 5, "kernel": 2.0}, "exclude each other"),
        ({"centre": 1.5}, "centre"),
        ({"compare": ">"}, "compare"),
        ({"size": 0}, "size"),
    ],
)
def test_rules_that_do_not_go_together(given, message):
    with pytest.raises(ConfigError, match=message):
        get_protocol({"name": "mine", **given})


def test_text_names_every_rule_that_changes():
    lines = {get_protocol(name).text() for name in PUBLISHED}
    assert len(lines) == len(PUBLISHED)
    soft = get_protocol({"base": "geoaware-soft", "pose": "mutual"}).text()
    for part in ("840 px frame (pad)", "60x60 cells", "in 15x15 cells", "mutual", "< alpha x target_box", "images"):
        assert part in soft
