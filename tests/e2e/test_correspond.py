"""`diffrep correspond` as a user types it, and on two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffrep.cli import main
from diffrep.config import AggregateConfig, CorrespondConfig, load_config
from diffrep.correspond.aggregate import run_aggregate
from diffrep.correspond.evaluate import run_evaluate

SCRIPT = """
import sys
from diffrep import dist
from diffrep.config import AggregateConfig, CorrespondConfig, load_config
from diffrep.correspond.aggregate import run_aggregate
from diffrep.correspond.evaluate import run_evaluate
split = sys.argv.index("--")
found = run_evaluate(load_config(CorrespondConfig, [], sys.argv[1:split]))
assert dist.state().num_processes == 2
assert bool(found) == dist.state().is_main_process
run_aggregate(load_config(AggregateConfig, [], sys.argv[split + 1 :]))
dist.teardown()
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A JSON of five pairs of three drawn photos."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(1)
    sizes = [(30, 20), (24, 24), (18, 26)]
    for number, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8)).resize(size).save(folder / f"{number}.png")
    listed = [
        {
            "source_path": f"{a}.png",
            "target_path": f"{b}.png",
            "source_points": rng.integers(0, sizes[a], (4, 2)).tolist(),
            "target_points": rng.integers(0, sizes[b], (4, 2)).tolist(),
        }
        for a, b in ((0, 1), (1, 2), (2, 0), (1, 0), (0, 2))
    ]
    (folder / "pairs.json").write_text(json.dumps(listed))
    return folder


@pytest.fixture(scope="module")
def words(unet_folder, pairs):
    return [
        f"backbone={unet_folder}",
        f"pairs={pairs}",
        "size=16",
        "request.layers=[mid_block,up_blocks.0]",
        "request.levels=[5]",
        "request.dtype=float32",
    ]


def call(capsys, *given, check):
    capsys.readouterr()
    status = main([str(word) for word in given])
    captured = capsys.readouterr()
    assert status == check, captured.out + captured.err
    return captured


def rules(*more):
    return ["protocols={base: dift, threshold: points}", *more]


def test_evaluate_prints_a_table_and_match_a_page(capsys, words, pairs, unet_folder, tmp_path):
    out = call(capsys, "correspond", "evaluate", *words, *rules(f"out={tmp_path / 'run'}", "pictures=1"), check=0).out
    lines = [line for line in out.splitlines() if "dift with threshold=points  per image  @0.1 0." in line]
    assert len(lines) == 2
    assert f"report: {tmp_path / 'run' / 'report.html'}" in out
    table = call(capsys, "report", tmp_path / "run", "--markdown", check=0).out
    assert (
        "| descriptor | per image @0.1 | 95 % interval |" in table and table.count("dift with threshold=points") == 2
    )
    photos = [pairs / "0.png", pairs / "1.png"]
    given = [word for word in words if not word.startswith("pairs=")]
    page = call(capsys, "correspond", "match", *photos, *given, f"out={tmp_path / 'match'}", check=0).out
    assert Path(page.splitlines()[1].removeprefix("page: ")).exists()
    warp = [word for word in given if not word.startswith("size")]
    more = [f"data={pairs}", "data.size=16", "data.limit=2", "points=3", f"out={tmp_path / 'warp'}"]
    shown = call(capsys, "correspond", "warp", *warp, *more, check=0).out
    assert "raw pixels, 7 x 7" in shown and "within a tenth" in shown


@pytest.mark.parametrize(
    ("action", "changes", "text"),
    [
        ("evaluate", ["pairs=/no/such/place"], "no set of pairs at"),
        ("evaluate", ["protocols=dfit"], "did you mean 'dift'"),
        ("evaluate", ["protocols=dift"], "has no target box"),
        ("evaluate", ["protocols={base: dift, pose: mutual, threshold: points}"], "does not say which key points"),
        ("evaluate", ["request.layers=[middle]"], "no layer 'middle'"),
        ("evaluate", ["aggregation=/no/head"], "no head at"),
        ("train", ["val_pairs=/no/such/place", "width=16", "groups=2"], "no set of pairs at"),
        ("train", ["width=16"], "does not divide"),
        ("match", ["one.jpg"], "match takes two images, got 1"),
        ("match", ["one.jpg", "two.jpg"], "no such image: one.jpg"),
    ],
)
def test_one_clear_line_for_each_mistake(capsys, words, tmp_path, action, changes, text):
    given = [word for word in words if not (action == "match" and word.startswith("pairs="))]
    if action == "train" and not any(word.startswith("val_pairs") for word in changes):
        given.append(f"val_pairs={next(word for word in words if word.startswith('pairs='))[6:]}")
    done = call(
        capsys,
        "correspond",
        action,
        *changes[: 2 if action == "match" else 0],
        *given,
        *([] if action == "match" else changes),
        f"out={tmp_path / 'x'}",
        check=2,
    )
    assert text in done.err
    assert "Traceback" not in done.err


@pytest.mark.mp
def test_two_processes(words, pairs, tmp_path, two_processes):
    """The same predictions and scores, and the same network."""
    evaluate = [*words, *rules("pictures=1")]
    train = [*words, f"val_pairs={pairs}", "width=16", "groups=2", "pairs_per_step=2", "epochs=2", "alpha=0.2"]
    train.append("protocol={base: dift, threshold: points}")
    outs = [f"out={tmp_path / 'two'}", "--", *train, f"out={tmp_path / 'net2'}"]
    done = two_processes.run(*evaluate, *outs, source=SCRIPT)
    assert done.codes == [0, 0], done.err
    alone = run_evaluate(load_config(CorrespondConfig, [], [*evaluate, f"out={tmp_path / 'one'}"]))
    both = json.loads((tmp_path / "two" / "results.json").read_text())["metrics"]
    assert both["correspondence"]["scores"] == json.loads(json.dumps(alone["correspondence"]["scores"]))
    run_aggregate(load_config(AggregateConfig, [], [*train, f"out={tmp_path / 'net1'}"]))
    one, two = (load_file(tmp_path / name / "head" / "model.safetensors") for name in ("net1", "net2"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=2e-4, rtol=1e-3, msg=name)
