import json
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save

from diffrep.errors import StoreError
from diffrep.store import Claims, FeatureStore, StoreWriter, list_units
from diffrep.store.layout import folder_index, info_file, info_name, tensor_file, tensor_name
from diffrep.store.packing import DTYPES, Packed
from diffrep.store.place import temporary_name

META = {
    "numerics": 1,
    "backbone": {"name": "net", "weights": "abc"},
    "request": {"seed": 0, "draws": 1},
    "layers": {"mid": {"shape": [2], "cost": 0.5}},
    "levels": [["5", "t=5", 5, 0.9, 0.4]],
    "data": {"path": "photos"},
    "splits": {"train": [0, 5], "test": [5, 8]},
    "classes": ["a", "b"],
    "unit_size": 2,
    "versions": {"torch": "1"},
}


def fill(writer, unit, **options):
    rows = list(unit.rows)
    features = torch.tensor([[row, -row] for row in rows], dtype=torch.float16)
    labels = [row % 2 for row in rows]
    return writer.write(unit, {"mid@t=5": features}, [f"id{row}" for row in rows], rows, labels, [], **options)


def fill_all(writer):
    for unit in writer.missing():
        assert fill(writer, unit)
        writer.close_folder(unit)
    writer.finish()


@pytest.fixture(params=["local", "memory", "file"])
def target(request, tmp_path):
    prefix = {"local": "", "memory": "memory://", "file": "file://"}[request.param]
    return f"{prefix}{tmp_path}/store"


def files(place, folder=""):
    """The content of all files, by name."""
    prefix = f"{folder}/" if folder else ""
    found = {f"{prefix}{name}": place.read(f"{prefix}{name}") for name in place.list(folder)}
    for inner in place.folders(folder):
        found |= files(place, f"{prefix}{inner}")
    return found


def test_units_never_cross_a_split_and_cost_nothing():
    units = list_units({"train": range(5), "none": range(0), "test": range(5, 8)}, 2)
    cuts = [("train", [0, 1]), ("train", [2, 3]), ("train", [4]), ("test", [5, 6]), ("test", [7])]
    assert [(unit.split, list(unit.rows)) for unit in units] == cuts
    assert [unit.number for unit in units[1:3]] == [1, 2]
    assert (units[-1].number, units.split_of(3), units.folders) == (4, "test", 1)
    with pytest.raises(IndexError):
        units[5]
    many = list_units({"a": range(10**12), "b": range(10**12, 10**12 + 7)}, 10**6)
    assert (len(many), many.folders, many.in_folder(1000)) == (10**6 + 1, 1001, range(10**6, 10**6 + 1))
    assert list(many[-1].rows) == list(range(10**12, 10**12 + 7))


def split(content):
    """The header and the tensors of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def test_a_file_is_what_safetensors_writes():
    tensors = {f'{i:02d}é\n"': (torch.rand(3, 2) * 100).to(kind) for i, kind in enumerate(DTYPES)}
    tensors |= {"e": torch.zeros(0, 3), "s": torch.tensor(3.0), "big": torch.rand(1000, 100)}
    loose = {"t": torch.rand(4, 5).t(), "grad": torch.rand(6, requires_grad=True)[::2]}
    packed = Packed(tensors | loose)
    content = b"".join(packed.parts())
    plain = save(tensors | {name: tensor.detach().contiguous() for name, tensor in loose.items()})
    # But for spaces, with which the tensors begin at a multiple of 64.
    (ours, rest), (theirs, wanted) = map(split, (content, plain))
    assert (ours.rstrip(b" "), rest) == (theirs.rstrip(b" "), wanted)
    assert (8 + len(ours)) % 64 == 0
    assert packed.size == len(content)
    assert packed.checksum == "xxh3-128:" + xxhash.xxh3_128_hexdigest(content)
    with pytest.raises(StoreError, match=r"x: torch.complex128 cannot be stored; allowed are U64, I64"):
        Packed({"x": torch.zeros(1, dtype=torch.complex128)})


def test_what_stands_in_a_store(target):
    writer = StoreWriter(target, META)
    fill_all(writer)
    found = files(writer.place)
    stems = [f"units/0000/000000{n}" for n in range(5)]
    pairs = [f"{stem}.{ending}" for stem in stems for ending in ("json", "safetensors")]
    assert sorted(found) == ["index.json", "meta.json", *pairs, "units/0000/index.json"]
    assert json.loads(found["meta.json"]) == META
    info = json.loads(found[info_name(2)])
    assert list(info) == ["unit", "split", "samples", "bytes", "checksum", "skipped", "ids"]
    checksums = ["xxh3-128:" + xxhash.xxh3_128_hexdigest(found[tensor_name(n)]) for n in range(5)]
    sizes = [len(found[tensor_name(n)]) for n in range(5)]
    assert (info["unit"], info["ids"], info["checksum"], info["bytes"]) == (2, ["id4"], checksums[2], sizes[2])
    assert json.loads(found[folder_index(0)]) == {
        "units": [0, 5],
        "split": ["train"] * 3 + ["test"] * 2,
        "samples": [2, 2, 1, 2, 1],
        "bytes": sizes,
        "checksum": checksums,
        "skipped": [0] * 5,
    }
    index = json.loads(found["index.json"])
    checksum = "xxh3-128:" + xxhash.xxh3_128_hexdigest(found[folder_index(0)])
    folder = {"folder": 0, "units": 5, "samples": 8, "bytes": sum(sizes), "checksum": checksum}
    assert index.items() >= {"format": 2, "samples": 8, "units": 5, "skipped": 0, "bytes": sum(sizes)}.items()
    assert index["folders"] == [folder]
    assert writer.indexed()
    assert FeatureStore(target)["mid", 5][:, 0].tolist() == list(range(8))
    again = StoreWriter(target, META)
    assert again.missing() == []
    again.finish()
    assert files(writer.place) == found


def test_plain_safetensors_reads_a_unit(tmp_path):
    writer = StoreWriter(tmp_path / "store", META)
    fill(writer, writer.units[3])
    tensors = load_file(tensor_file(tmp_path / "store", 3))
    assert tensors["mid@t=5"].tolist() == [[5, -5], [6, -6]]
    assert (tensors["row"].tolist(), tensors["label"].tolist()) == ([5, 6], [1, 0])


def test_another_request_is_refused_and_every_difference_named(target):
    StoreWriter(target, META)
    with pytest.raises(StoreError) as caught:
        StoreWriter(target, {**META, "request": {"seed": 1, "draws": 2}})
    assert "request.seed: 0 there, 1 now" in str(caught.value)
    assert "request.draws: 1 there, 2 now" in str(caught.value)
    assert "backbone" not in str(caught.value)


def test_other_versions_only_warn(tmp_path):
    StoreWriter(tmp_path, META)
    with pytest.warns(UserWarning, match="torch 1 -> 2"):
        StoreWriter(tmp_path, {**META, "versions": {"torch": "2"}})


def test_folders_that_are_none_of_ours(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not empty and holds no feature store"):
        StoreWriter(tmp_path, META)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(StoreError, match="cannot read .*meta.json"):
        StoreWriter(tmp_path, META)
    for wrong in ({"unit_size": 0}, {"unit_size": True}, {"splits": {"a": [0, 10**30]}}, {"splits": [1]}):
        with pytest.raises(StoreError, match="meta.json needs splits"):
            StoreWriter(tmp_path / "new", {**META, **wrong})


def test_of_two_that_begin_at_once_one_makes_the_store(target):
    def begin(seed):
        try:
            return StoreWriter(target, {**META, "request": {"seed": seed}}).meta["request"]["seed"]
        except StoreError as error:
            assert "request.seed" in str(error)

    with ThreadPoolExecutor(8) as threads:
        begun = list(threads.map(begin, [0, 1] * 8))
    assert set(begun) - {None} in ({0}, {1})
    assert begun.count(None) == 8


def test_a_streamed_set_has_a_unit_a_shard(target):
    writer = StoreWriter(target, {**META, "splits": {"train": [0, 2]}, "unit_size": "shard"})
    assert [(unit.number, list(unit.rows)) for unit in writer.units] == [(0, [0]), (1, [1])]
    for unit, count in zip(writer.units, (3, 1), strict=True):
        ids = [f"{unit.number}/{row}" for row in range(count)]
        writer.write(unit, {"mid@t=5": torch.ones(count, 2)}, ids, list(range(count)), None, [])
    writer.finish()
    assert list(FeatureStore(target).ids) == ["0/0", "0/1", "0/2", "1/0"]


def test_who_lost_a_unit_does_not_publish_it(target):
    writer = StoreWriter(target, META)
    assert not fill(writer, writer.units[0], still=lambda: False)
    assert "units/0000/.0000000" not in "".join(files(writer.place))
    answers = iter([True, False])  # between its two files
    assert not fill(writer, writer.units[0], still=lambda: next(answers))
    assert len(writer.missing()) == 5
    assert writer.place.list("units/0000") == ["0000000.safetensors"]
    asked = []
    assert fill(writer, writer.units[0], still=lambda: asked.append(writer.place.size(info_name(0))) is None)
    assert asked == [None, None]
    assert len(writer.missing()) == 4


def test_a_file_swept_away_is_no_error_for_who_has_lost_the_unit(tmp_path):
    writer, other = StoreWriter(tmp_path, META), StoreWriter(tmp_path, META)
    token = "0123456789abcdef"

    def swept(answer):
        writer.place.remove(temporary_name(tensor_name(0), token))
        return answer

    with pytest.raises(StoreError, match="cannot write .*0000000.safetensors"):
        fill(writer, writer.units[0], token=token, still=lambda: swept(True))
    answers = iter([True, False])
    assert not fill(writer, writer.units[0], token=token, still=lambda: swept(next(answers)))
    assert fill(other, other.units[0])
    before = files(other.place)
    assert not fill(writer, writer.units[0], token=token, still=lambda: swept(True))
    assert files(other.place) == before


def test_a_full_disk_leaves_nothing_and_finished_units(tmp_path):
    writer = StoreWriter(tmp_path, META)
    fill(writer, writer.units[0])
    before = files(writer.place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StoreError, match="File too large; finished units stay, run again"):
            fill(writer, writer.units[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(writer.place) == before
    fill_all(writer)


def test_finishing_needs_every_unit(target):
    writer = StoreWriter(target, META)
    for unit in writer.units[:3]:
        fill(writer, unit)
    with pytest.raises(StoreError, match="2 of 5 units are missing"):
        writer.finish()
    assert not writer.indexed()
    # A unit whose tensors are gone, and one whose index says that it is there.
    writer.place.remove(tensor_name(1))
    assert [unit.number for unit in writer.missing()] == [1, 3, 4]
    fill_all(writer)
    writer.place.remove("index.json")
    writer.place.remove(info_name(4))
    with pytest.raises(StoreError, match="1 of 5 units are missing.*'diffrep store repair'"):
        StoreWriter(target, META).finish()


def test_finishing_sweeps_up_and_two_may_do_it(target):
    writer = StoreWriter(target, META)
    for unit in writer.units:
        fill(writer, unit)
    place = writer.place
    for name in ("meta.json", "index.json", "config.yaml", tensor_name(0), folder_index(0)):
        place.write(temporary_name(name), [b"of a killed process"])
    Claims(place, writer.units, 1000.0).take()
    Claims(place, writer.units, 1000.0).take_index()
    place.write("units/0000/.nfs000000000c5a3b0200000001", [b"of the file system"])
    assert not writer.indexed()
    ready = threading.Barrier(4)

    def finish(_):
        other = StoreWriter(target, META)
        ready.wait()
        other.finish()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(finish, range(4)))
    names = [name for name in files(place) if "/0000/0" not in name]
    assert sorted(names) == ["index.json", "meta.json", "units/0000/.nfs000000000c5a3b0200000001", folder_index(0)]
    assert place.folders() == ["units"]
    # Killed between index.json and the sweeping.
    Claims(place, writer.units, 1000.0).take_index()
    assert not writer.indexed()
    writer.finish()
    assert writer.indexed()


def test_skipped_samples_are_listed(target):
    writer = StoreWriter(target, {**META, "splits": {"train": [0, 2], "test": [2, 4]}})
    broken = [{"id": "x", "reason": "broken"}, {"id": "é", "reason": "gone"}]
    writer.write(writer.units[0], {}, [], [], [], broken)
    fill_all(writer)
    assert len(FeatureStore(target)) == 2
    assert [json.loads(line) for line in writer.place.read("skipped.jsonl").splitlines()] == broken
    assert json.loads(writer.place.read("index.json"))["skipped"] == 2


def test_folders_are_closed_as_they_fill(tmp_path):
    meta = {**META, "splits": {"all": [0, 1003]}, "unit_size": 1}
    first, second = (StoreWriter(f"memory://{tmp_path}/store", meta) for _ in range(2))
    closed = []
    for unit in first.units:
        writer = second if unit.number % 3 == 0 else first
        fill(writer, unit)
        if writer.close_folder(unit):
            closed.append(unit.number)
    assert closed == [999, 1002]
    assert first.missing() == []
    before = files(first.place)
    for folder in range(2):
        first.place.remove(folder_index(folder))
    second.finish()
    assert {name: content for name, content in files(first.place).items() if name != "index.json"} == before


KILLED = """
import json, os, signal, sys, torch
from diffrep.store import Claims, StoreWriter
writer = StoreWriter(sys.argv[1], json.loads(sys.argv[2]))
claims = Claims(writer.place, writer.units, 1000.0)
unit, left = claims.take(), int(sys.argv[3])
def still():
    global left
    left -= 1
    return left > 0 or os.kill(os.getpid(), signal.SIGKILL)
writer.write(unit, {"mid@t=5": torch.zeros(2, 2).half()}, ["a", "b"], [0, 1], [0, 1], [], claims.token, still)
"""


@pytest.mark.mp
@pytest.mark.parametrize("moment", [1, 2])
def test_what_a_killed_process_left_is_removed_and_done_again(tmp_path, moment):
    store = tmp_path / "store"
    words = [sys.executable, "-c", KILLED, store, json.dumps(META), str(moment)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(os.listdir(store / "units/0000"))
    assert [name[: -len("0123456789abcdef")] for name in left if name.startswith(".")] == [
        (".0000000.safetensors.", ".0000000.json.")[moment - 1]
    ]
    writer = StoreWriter(store, META)
    claims = Claims(writer.place, writer.units, 1000.0)
    while (unit := claims.take()) is not None:
        assert fill(writer, unit, token=claims.token, still=lambda number=unit.number: claims.holds(number))
        claims.release(unit.number)
    assert claims.finished
    assert not [name for name in os.listdir(store / "units/0000") if name.startswith(".")]
    writer.finish()
    assert not (store / "claims").exists()
    assert FeatureStore(store)["mid", 5][:, 0].tolist() == list(range(8))
    assert info_file(store, 0).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"units": [0, 4]},
        {"units": [1, 6]},
        {"units": None},
        {"samples": [2, 2, 1, 2]},
        {"samples": [2, 2, 1, 2, -1]},
        {"samples": [2, 2, 1, 2, 1.0]},
        {"bytes": [2**63] * 5},
        {"skipped": [True] * 5},
        {"split": ["train"] * 5},
        {"checksum": ["../../etc"] * 5},
        {"checksum": "xxh3-128"},
    ],
)
def test_a_damaged_folder_index_is_named(tmp_path, change):
    writer = StoreWriter(tmp_path, META)
    fill_all(writer)
    path = tmp_path / folder_index(0)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "index.json").unlink()
    with pytest.raises(StoreError, match=r"units/0000/index.json is damaged: .* wanted"):
        writer.finish()


@pytest.mark.parametrize(
    "change",
    [
        {"unit": 2},
        {"unit": True},
        {"samples": 3},
        {"ids": ["a"]},
        {"ids": [1, 2]},
        {"ids": "ab"},
        {"bytes": -1},
        {"checksum": None},
        {"split": "test"},
        {"skipped": ["x"]},
    ],
)
def test_a_damaged_unit_is_named(tmp_path, change):
    writer = StoreWriter(tmp_path, META)
    for unit in writer.units:
        fill(writer, unit)
    path = info_file(tmp_path, 1)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match=r"0000001.json is damaged: .* wanted"):
        StoreWriter(tmp_path, META).finish()
