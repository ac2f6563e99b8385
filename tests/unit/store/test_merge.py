import copy
import json

import numpy as np
import pytest
import torch

from diffrep.config import BackboneConfig, DataConfig, ExtractConfig, FeatureRequest
from diffrep.errors import StoreError
from diffrep.extract.job import ExtractJob
from diffrep.store import StoreWriter
from diffrep.store.check import verify
from diffrep.store.layout import info_file, tensor_file
from diffrep.store.merge import merge_meta, merge_stores

SHAPES = {"mid": [3], "up": [3, 2], "down": [4]}
LEVELS = {"5": ["5", "t=5", 5, 0.9, 0.4], "t=5": ["t=5", "t=5", 5, 0.9, 0.4], "clean": ["clean", "clean", 0, 1.0, 0.0]}
SPLITS = {"train": [0, 5], "test": [5, 8]}


def make_meta(layers, levels, **other):
    keys = [LEVELS[level][1] for level in levels]
    meta = {
        "numerics": 1,
        "backbone": {"name": "net", "weights": "abc"},
        "request": {"layers": list(layers), "levels": list(levels), "seed": 0, "dtype": "float16"},
        "layers": {name: {"shape": SHAPES[name], "cost": len(layers) / 10} for name in layers},
        "levels": [LEVELS[level] for level in levels],
        "costs": {"network_flops": 9, "encode_flops": 1, "draws": {key: 1 for key in keys}},
        "data": {"fingerprint": "f00", "path": "photos"},
        "transform": {"size": 32},
        "splits": SPLITS,
        "classes": ["a", "b"],
        "unit_size": 2,
        "versions": {"torch": "1"},
    }
    return meta | other


def value(name, row, offset=0):
    """What stands in a tensor for a sample."""
    return float(10 * row + sum(name.encode()) % 10 + offset)


def make_store(path, layers, levels, skip=(), limit=None, name_of="id{}".format, offset=0, **other):
    meta = make_meta(layers, levels, **other)
    names = [f"{layer}@{LEVELS[level][1]}" for layer in layers for level in levels]
    writer = StoreWriter(path, meta)
    for unit in writer.missing()[:limit]:
        rows = [row for row in unit.rows if row not in skip]
        tensors = {
            name: torch.stack(
                [torch.full(SHAPES[name.split("@")[0]], value(name, row, offset)) for row in rows]
            ).half()
            for name in names
            if rows
        }
        skipped = [{"id": name_of(row), "reason": f"bad in {path.name}"} for row in unit.rows if row in skip]
        writer.write(unit, tensors, [name_of(row) for row in rows], rows, [row % 2 for row in rows], skipped)
    if limit is None:
        writer.finish()
    return path


def check(store, layers, keys, rows):
    """Compares a store with what one extraction would have made."""
    assert store.layers == list(layers) and list(store.levels) == list(keys)
    assert store.ids == [f"id{row}" for row in rows]
    assert store.labels.tolist() == [row % 2 for row in rows]
    for layer in layers:
        for key in keys:
            found = store.numpy(layer, key).reshape(len(rows), -1)
            assert np.array_equal(found[:, -1], [value(f"{layer}@{key}", row) for row in rows])
    assert verify(store.place).clean


def test_layers_then_levels(tmp_path):
    one = make_store(tmp_path / "one", ["mid"], ["5"])
    two = make_store(tmp_path / "two", ["up", "down"], ["t=5"])
    late = make_store(tmp_path / "late", ["mid", "up", "down"], ["clean"])
    first = merge_stores([one, two], tmp_path / "first")
    check(first, ["mid", "up", "down"], ["t=5"], range(8))
    both = merge_stores([first.path, late], tmp_path / "both")
    check(both, ["mid", "up", "down"], ["t=5", "clean"], range(8))
    # What one extraction of everything would have written, so that it finds all units there.
    assert both.meta == make_meta(["mid", "up", "down"], ["5", "t=5", "clean"]) | {"layers": both.meta["layers"]}
    assert StoreWriter(both.path, make_meta(["mid", "up", "down"], ["5", "t=5", "clean"])).missing() == []
    assert merge_stores([one, two, late, late], tmp_path / "at once").digest == both.digest


def test_extracting_everything_finds_the_merged_store_complete(unet, image_folder, tmp_path):
    def job(name, layers, levels):
        request = FeatureRequest(layers, levels, pool="mean")
        backbone = BackboneConfig(source="tiny")
        data = DataConfig(path=image_folder)
        out = str(tmp_path / name)
        return ExtractJob(ExtractConfig(backbone=backbone, data=data, request=request, out=out, unit_size=7), unet)

    one = job("one", ["up_blocks.1", "mid_block"], [10, "clean"]).run()
    two = job("two", "down_blocks.0", [10, "clean"]).run()
    store = merge_stores([one.path, two.path], tmp_path / "merged")
    whole = job("merged", ["up_blocks.1", "mid_block", "down_blocks.0"], [10, "clean"])
    assert store.meta == json.loads(json.dumps(whole.meta()))
    assert list(store.meta["layers"]) == list(whole.meta()["layers"])
    before = sorted((file, file.stat().st_mtime_ns) for file in store.path.rglob("*.safetensors"))
    assert whole.run().digest == store.digest
    assert before == sorted((file, file.stat().st_mtime_ns) for file in store.path.rglob("*.safetensors"))
    again = job("again", ["up_blocks.1", "mid_block", "down_blocks.0"], [10, "clean"]).run()
    for layer in again.layers:
        for level in again.levels:
            assert torch.equal(again[layer, level], store[layer, level])


def test_the_first_store_that_has_a_tensor_gives_it(tmp_path):
    one = make_store(tmp_path / "one", ["mid"], ["5"])
    two = make_store(tmp_path / "two", ["mid", "up"], ["5"], offset=0.5)
    store = merge_stores([one, two], tmp_path / "out")
    assert store["mid", 5][:, 0].tolist() == [value("mid@t=5", row) for row in range(8)]
    assert store["up", 5][:, 0, 0].tolist() == [value("up@t=5", row, 0.5) for row in range(8)]


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    one, two = make_store(tmp_path / "one", ["mid"], ["5"]), make_store(tmp_path / "two", ["up"], ["5"])
    write, written = StoreWriter.write, []

    def stop_at_three(writer, unit, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(unit.number)
        return write(writer, unit, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write", stop_at_three)
        merge_stores([one, two], tmp_path / "out")
    before = {number: tensor_file(tmp_path / "out", number).stat().st_mtime_ns for number in written}
    check(merge_stores([one, two], tmp_path / "out"), ["mid", "up"], ["t=5"], range(8))
    assert before == {number: tensor_file(tmp_path / "out", number).stat().st_mtime_ns for number in (0, 1)}


def test_samples_that_a_store_skipped_are_skipped(tmp_path):
    one = make_store(tmp_path / "one", ["mid"], ["5"], skip={1, 5, 6})
    two = make_store(tmp_path / "two", ["up"], ["5"], skip={1, 2})
    store = merge_stores([one, two], tmp_path / "out")
    check(store, ["mid", "up"], ["t=5"], [0, 3, 4, 7])
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert lines == [
        '{"id": "id1", "reason": "bad in one"}',
        '{"id": "id2", "reason": "bad in two"}',
        '{"id": "id5", "reason": "bad in one"}',
        '{"id": "id6", "reason": "bad in one"}',
    ]


def test_remote_stores(tmp_path):
    one, two = make_store(tmp_path / "one", ["mid"], ["5"], skip={2}), make_store(tmp_path / "two", ["up"], ["5"])
    merge_stores([one, two], "memory://merged")
    late = make_store(tmp_path / "late", ["mid", "up"], ["clean"])
    check(
        merge_stores(["memory://merged", late], tmp_path / "out"),
        ["mid", "up"],
        ["t=5", "clean"],
        [0, 1, *range(3, 8)],
    )


def test_every_difference_is_named(tmp_path):
    one = make_store(tmp_path / "one", ["mid"], ["5"])
    request = make_meta(["up"], ["5"])["request"] | {"seed": 1}
    data = {"fingerprint": "ba4", "path": "pictures"}
    two = make_store(tmp_path / "two", ["up"], ["5"], request=request, data=data, unit_size=4)
    with pytest.raises(StoreError) as caught:
        merge_stores([one, two], tmp_path / "out")
    assert str(caught.value).splitlines()[1:] == [
        f"  data.fingerprint: f00 in {one}, ba4 in {two}",
        f"  request.seed: 0 in {one}, 1 in {two}",
        f"  unit_size: 2 in {one}, 4 in {two}",
    ]
    assert not (tmp_path / "out").exists()


def test_other_versions_only_warn(tmp_path):
    one = make_store(tmp_path / "one", ["mid"], ["5"])
    two = make_store(tmp_path / "two", ["up"], ["5"], versions={"torch": "2"})
    with pytest.warns(UserWarning, match="versions.torch: 1 in .*one, 2 in .*two"):
        merge_stores([one, two], tmp_path / "out")


def test_every_layer_needs_every_level(tmp_path):
    one = make_store(tmp_path / "one", ["mid"], ["5"])
    two = make_store(tmp_path / "two", ["up"], ["clean"])
    with pytest.raises(StoreError, match="together these lack 2 of 4: mid@clean, up@t=5; extract those too"):
        merge_stores([one, two], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("layers", {"mid": {"shape": [4], "cost": 0.1}}, r"layers: mid is .*\[3\].* in one and .*\[4\].* in two"),
        ("levels", [["5", "t=5", 5, 0.8, 0.4]], r"levels: t=5 is \[5, 0.9, 0.4\] in one and \[5, 0.8, 0.4\] in two"),
        ("aliases", {"m": "up"}, "aliases: m is mid in one and up in two"),
        ("trajectories", {"inversion 2": [0, 7]}, r"trajectories: inversion 2 is \[0, 5\] in one and \[0, 7\] in two"),
    ],
)
def test_one_name_means_one_thing(key, change, message):
    one = make_meta(["mid"], ["5"], aliases={"m": "mid"}, trajectories={"inversion 2": [0, 5]})
    two = copy.deepcopy(one)
    two[key] = change
    with pytest.raises(StoreError, match=message):
        merge_meta({"one": one, "two": two})


def test_aliases_and_trajectories_are_joined():
    one = make_meta(["mid"], ["5"], aliases={"m": "mid"}, trajectories={"inversion 2": [0, 5]})
    two = make_meta(["mid"], ["clean"], aliases={"m": "mid", "n": "mid"}, trajectories={"inversion 3": [0, 1, 2]})
    merged = merge_meta({"one": one, "two": two})
    assert merged["aliases"] == {"m": "mid", "n": "mid"}
    assert merged["trajectories"] == {"inversion 2": [0, 5], "inversion 3": [0, 1, 2]}
    assert merged["costs"]["draws"] == {"t=5": 1, "clean": 1}


def test_damage_is_not_carried_over(tmp_path):
    one, two = make_store(tmp_path / "one", ["mid"], ["5"]), make_store(tmp_path / "two", ["up"], ["5"])
    names = info_file(one, 1)
    names.write_text(names.read_text().replace("id2", "id9"))
    with pytest.raises(StoreError, match="one/units/0000/0000001.safetensors: the ids in its JSON are those of other"):
        merge_stores([one, two], tmp_path / "out")
    file = tensor_file(two, 0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="two/units/0000/0000000.safetensors: its checksum is not the one"):
        merge_stores([one, two], tmp_path / "out two")


def test_what_is_refused(tmp_path):
    one, two = make_store(tmp_path / "one", ["mid"], ["5"]), make_store(tmp_path / "two", ["up"], ["5"])
    with pytest.raises(StoreError, match="two stores or more, got 1"):
        merge_stores([one], tmp_path / "out")
    with pytest.raises(StoreError, match="one was made by another request"):
        merge_stores([one, two], one)
    renamed = make_store(tmp_path / "renamed", ["up"], ["5"], name_of="other{}".format)
    with pytest.raises(StoreError, match="the ids of unit 0 differ between .*one and .*renamed"):
        merge_stores([one, renamed], tmp_path / "out")
    begun = make_store(tmp_path / "begun", ["up"], ["5"], limit=2)
    with pytest.raises(StoreError, match="begun is not finished"):
        merge_stores([one, begun], tmp_path / "new")
