"""Two probes of the same samples in one run folder."""

import json

import pytest

from diffrep import FeatureStore
from diffrep.config import ProbeConfig
from diffrep.errors import ConfigError, StoreError
from diffrep.heads import load_head
from diffrep.probe.run import Probe


def opened(store, out, network):
    return Probe(FeatureStore(store), ProbeConfig(store=store, out=out, neighbours=(3,), finalists=1), "two", network)


def probed(store, out, network):
    probe = opened(store, out, network)
    probe.sweep()
    for head in probe.config.heads:
        probe.score(head)
    return probe


def test_one_folder_holds_both(write_store, tmp_path):
    first = probed(write_store(tmp_path / "a"), tmp_path / "run", "net-a")
    second = probed(write_store(tmp_path / "b", shape=(8, 1, 1), spread=2.0), tmp_path / "run", "net-b")
    alone = second.metrics([])
    first.join(second)
    metrics = first.finish()
    assert metrics == json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    names = ["linear on net-a", "kNN on net-a", "linear on net-b", "kNN on net-b"]
    assert [score["name"] for score in metrics["scores"]] == names
    assert metrics["scores"][2:] == alone["scores"], "as if it had been probed alone, with its own costs"
    assert metrics["scores"][2]["bytes"] == 2 * 8
    assert metrics["beside"] == [{key: alone[key] for key in ("network", "layers", "levels", "costs", "cells")}]
    trials = [(tmp_path / "run" / name).read_text() for name in ("trials.csv", "trials-net-b.csv")]
    assert trials[0].splitlines()[0] == trials[1].splitlines()[0]
    assert len({len(text.splitlines()) for text in trials}) == 1
    assert trials[0] != trials[1]
    assert load_head(tmp_path / "run" / "heads" / "linear-on-net-b").fcs[0].in_features == 8
    assert "net-b" in (tmp_path / "run" / "report.html").read_text()


def test_probes_that_cannot_be_told_apart_or_compared(write_store, tmp_path):
    store = write_store(tmp_path / "a")
    first, same = opened(store, None, "net-a"), opened(store, None, "net-a")
    for other, found in ((same, "net-a"), (opened(store, None, None), "None")):
        with pytest.raises(ConfigError, match=f"{found}.*give each Probe its own name"):
            first.join(other)
    fewer = opened(write_store(tmp_path / "b", test=27), None, "net-b")
    with pytest.raises(StoreError, match="other test samples; extract both from the same data"):
        first.join(fewer)
    assert first.others == []
