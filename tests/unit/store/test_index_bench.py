"""The simulation of scripts/bench/index.py, in small: many ranks in turn on one store, some of which die."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[3] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("index_bench", BENCH / "index.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.syspath_prepend(BENCH)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHORT", 0.2)
    return module


def test_sixteen_ranks_share_three_thousand_units(bench, tmp_path):
    options = SimpleNamespace(units=3000, ranks=16, here=True)
    rows = {row["step"]: row for row in bench.simulate(tmp_path / "store", options)}
    made = [row["count"] for step, row in rows.items() if "ranks take" in step or "half" in step or "last" in step]
    assert rows["list and resume, half of it done"]["count"] == 1500
    assert rows["claims of dead ranks taken over"]["count"] == 1
    # Claim, look for the unit, read and remove the claim, look again; more where ranks meet.
    assert rows["half of all units"]["operations"] < 6 and rows["half of all units"]["collisions"] < 0.05
    assert sum(made) == 3000 + 1500 + 1, "each once; what the resumed process saw; a dead rank's twice"
    assert not list((tmp_path / "store").rglob(".*")) and not (tmp_path / "store" / "claims").exists()
    assert {"finish", "open", "verify the index"} <= rows.keys()
    assert "verify the index" in bench.table(rows.values())


def test_too_little_room_is_told(bench, tmp_path):
    with pytest.raises(OSError, match="give another --folder, or fewer units"):
        bench.check_room(tmp_path, 10**12)
