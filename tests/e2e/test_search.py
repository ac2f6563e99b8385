"""`diffrep search` as a user types it."""

import contextlib
import io
import json

import pytest

from diffrep import dist
from diffrep.cli import main


@pytest.fixture(scope="module")
def words(unet_folder, image_folder):
    return [
        "search",
        f"backbone={unet_folder}",
        f"data={image_folder}",
        "request.layers=[conv_in,mid_block]",
        "request.levels=[5,300]",
        "request.dtype=float32",
        "request.pool=2",
        "rungs=[16]",
        "keep=2",
        "unit_size=5",
        "head=ridge",
        "probe.heads=[ridge]",
        "probe.folds=2",
    ]


def run(*words, check):
    """Runs the command in this process and returns (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    assert status == check, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    return out, run(*words, f"out={out}", check=0)[0]


def found(out):
    return json.loads((out / "results.json").read_text())["metrics"]


def test_a_line_for_each_rung_and_the_table_of_a_probe(alone):
    out, text = alone
    lines = text.splitlines()
    assert lines[0].startswith("rung 1 of 1: 16 samples, 4 cells, 2 stay; best so far ")
    assert any(line.startswith("ridge") for line in lines)
    assert "of the full grid" not in lines[0]
    assert any(line.startswith("The search spent") for line in lines)
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert "<h2>The search</h2>" in (out / "report.html").read_text()


def test_dry_run_writes_nothing(words, tmp_path):
    text, _ = run(*words, f"out={tmp_path / 'run'}", "--dry-run", "--nproc", 2, check=0)
    assert [line.split()[0] for line in text.splitlines()] == ["grid", "rung", "all", "ranking", "total", "full"]
    assert not (tmp_path / "run").exists()


@pytest.mark.mp
def test_two_processes_find_the_same(words, alone, tmp_path, two_processes, monkeypatch):
    monkeypatch.setattr(dist, "launch", two_processes.launch)
    out, err = run(*words, f"out={tmp_path / 'run'}", "--nproc", 2, check=0)
    assert "in 2 processes" in err
    assert out.count("rung 1 of 1") == 1
    one, two = found(alone[0]), found(tmp_path / "run")
    assert one["search"]["winner"] == two["search"]["winner"]
    assert one["search"]["cost"] == two["search"]["cost"]
    assert one["scores"] == two["scores"]
    for a, b in zip(one["search"]["ranking"], two["search"]["ranking"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_errors_are_one_message(words, alone, tmp_path):
    assert "keep=4 would keep the whole grid" in run(*words, f"out={tmp_path}", "keep=4", check=2)[1]
    assert "seed: 0 there, 1 now" in run(*words, f"out={alone[0]}", "seed=1", check=2)[1]
