import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch

from diffrep import FeatureStore
from diffrep.cli import main
from diffrep.errors import StoreError
from diffrep.store import Claims, StoreWriter, check, open_place
from diffrep.store.check import verify
from diffrep.store.layout import info_file, tensor_file
from diffrep.store.listing import read_listing
from diffrep.store.place import temporary_name
from diffrep.store.processes import this_process
from diffrep.store.repair import repair

META = {
    "backbone": {"name": "net"},
    "request": {"dtype": "float16"},
    "layers": {"mid": {"shape": [2, 3], "cost": 0.5}},
    "levels": [["5", "t=5", 5, 0.9, 0.4]],
    "splits": {"train": [0, 5], "test": [5, 8]},
    "classes": None,
    "unit_size": 2,
}


def write(writer, unit, skip=(), name="id{}".format):
    rows = [row for row in unit.rows if row not in skip]
    skipped = [{"id": name(row), "reason": "broken"} for row in unit.rows if row in skip]
    tensors = {"mid@t=5": torch.tensor(rows).half()[:, None, None].expand(-1, 2, 3)} if rows else {}
    writer.write(unit, tensors, [name(row) for row in rows], rows, None, skipped)


def fill(target, meta=META, numbers=None, **options):
    writer = StoreWriter(target, meta)
    for unit in writer.missing():
        if numbers is None or unit.number in numbers:
            write(writer, unit, **options)
    if numbers is None:
        writer.finish()
    return target


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def path(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "store")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def flip(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_clean_store(shared):
    for index_only in (False, True):
        report = verify(shared, index_only)
        assert report.clean
        assert report.text().startswith(f"{shared}: clean; 5 units")


def test_a_store_elsewhere(shared):
    memory = fsspec.filesystem("memory")
    for file in (file for file in shared.rglob("*") if file.is_file()):
        memory.pipe_file(f"/checked/{file.relative_to(shared)}", file.read_bytes())
    assert verify("memory://checked").clean
    memory.pipe_file("/checked/units/0000/0000003.safetensors", tensor_file(shared, 1).read_bytes())
    assert list(verify("memory://checked").damaged) == [3]
    assert repair("memory://checked").missing == 1
    fill("memory://checked")
    assert verify("memory://checked").clean
    memory.rm("/checked", recursive=True)


@pytest.mark.parametrize(
    ("damage", "told", "seen"),  # told by the whole verification, and whether the sizes alone show it
    [
        (lambda path: flip(tensor_file(path, 3)), {"damaged": [3]}, False),
        (lambda path: os.truncate(tensor_file(path, 3), 50), {"damaged": [3]}, True),
        (lambda path: tensor_file(path, 3).unlink(), {"damaged": [3]}, True),
        (lambda path: info_file(path, 3).unlink(), {"missing": [3]}, True),
        (lambda path: info_file(path, 3).write_text("{"), {"damaged": [3]}, False),
        (lambda path: change(info_file(path, 3), ids=["id5", "id7"]), {"damaged": [3]}, False),
        (lambda path: change(info_file(path, 3), samples=1), {"damaged": [3]}, False),
        (lambda path: shutil.copy(tensor_file(path, 0), tensor_file(path, 1)), {"damaged": [1]}, False),
        (lambda path: change(path / "units/0000/index.json", samples=[2, 2, 1, 1, 1]), {"disagree": [3]}, True),
        (lambda path: change(path / "units/0000/index.json", bytes=[404] * 5), {"disagree": [0, 1, 2, 3, 4]}, True),
        (lambda path: (path / "units/0000/index.json").unlink(), {}, True),
        (lambda path: change(path / "index.json", samples=9), {}, True),
        (lambda path: change(path / "meta.json", classes=["a"]), {}, True),
    ],
)
def test_damage_is_found_and_repaired(path, damage, told, seen):
    before = FeatureStore(path)["mid", 5]
    damage(path)
    report = verify(path)
    assert not report.clean
    assert {
        key: list(getattr(report, key)) for key in ("damaged", "missing", "disagree") if getattr(report, key)
    } == told
    assert bool(report.indexes) is ("damaged" not in told and "missing" not in told)
    assert verify(path, index_only=True).clean is not seen
    files = sorted(path.rglob("*"))
    lost = len(report.damaged) + len(report.missing)
    planned = repair(path, dry_run=True)
    assert sorted(path.rglob("*")) == files
    done = repair(path)
    assert done.removed == planned.removed
    assert done.missing == planned.missing == lost
    assert done.finished is not bool(lost)
    if lost:
        assert "1 units are missing; run the same 'diffrep extract' again" in done.text()
        assert [unit.number for unit in StoreWriter(path, json.loads((path / "meta.json").read_text())).missing()] == [
            *report.damaged,
            *report.missing,
        ]
        fill(path)
    assert verify(path).clean
    assert torch.equal(FeatureStore(path)["mid", 5], before)
    assert not repair(path).removed


def test_ids_that_come_twice(tmp_path, monkeypatch):
    path = fill(tmp_path / "store", name=lambda row: f"id{row % 5}")
    assert verify(path).clean, "in another split an id may come again"
    path = fill(tmp_path / "twice", name=lambda row: f"id{row % 4}")
    monkeypatch.setattr(check, "_hash", lambda ident: ident == "id1")  # different ids may have one hash
    report = verify(path)
    assert report.duplicates == [("train", "id0", [0, 2])]
    assert "id 'id0' of split 'train' in units 0, 2" in report.text()
    assert not report.clean
    assert "stay: they are in the data" in repair(path).text()


def test_samples_that_were_lost_or_are_of_another_unit(tmp_path):
    writer = StoreWriter(tmp_path / "store", META)
    for unit in writer.missing():
        write(writer, unit)
    short, other = writer.units[0], writer.units[3]
    writer.write(short, {"mid@t=5": torch.zeros(1, 2, 3).half()}, ["id0"], [0], None, [])
    writer.write(other, {"mid@t=5": torch.zeros(2, 2, 3).half()}, ["id5", "id6"], [5, 7], None, [])
    writer.finish()
    report = verify(tmp_path / "store")
    assert "1 samples and 0 skipped ones are not 2" in report.damaged[0]
    assert "rows are not those of samples 5 to 6" in report.damaged[3]


def test_shards_hold_as_many_samples_as_they_hold(tmp_path):
    meta = META | {"unit_size": "shard", "splits": {"train": [0, 2]}}
    writer = StoreWriter(tmp_path / "store", meta)
    for unit, count in zip(writer.missing(), (3, 1), strict=True):
        ids = [f"{unit.number}/{row}" for row in range(count)]
        writer.write(unit, {"mid@t=5": torch.zeros(count, 2, 3).half()}, ids, list(range(count)), None, [])
    assert read_listing(tmp_path / "store").splits == {"train": None}
    writer.finish()
    assert verify(tmp_path / "store").clean
    assert read_listing(tmp_path / "store").splits == {"train": 4}


def test_what_was_left_behind(path):
    strays = [temporary_name(name, "0123456789abcdef") for name in ("index.json", "units/0000/0000001.json")]
    for name in strays:
        (path / name).touch()
    (path / "units/0000/0000099.json").touch()
    (path / "units/0001").mkdir()
    (path / "units/.hidden").touch()
    report = verify(path, index_only=True)
    assert sorted(report.stray) == sorted(strays)
    assert sorted(report.unknown) == ["units/0000/0000099.json", "units/0001"]
    assert "files of no unit stay" in repair(path).text()
    assert (path / "units/0000/0000099.json").exists()
    assert not any((path / name).exists() for name in strays)
    assert (path / "units/.hidden").exists()


def test_claims_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    path = fill(tmp_path / "store", numbers=[0, 1, 2])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = Claims(open_place(path), StoreWriter(path, META).units, 300.0)
    unit, other = living.take(), 4
    (path / f"claims/{other:07d}").write_text(json.dumps(this_process() | {"pid": dead.pid, "token": "0" * 16}))
    (path / f"units/0000/.{other:07d}.json.{'0' * 16}").touch()
    (path / f"units/0000/.{unit.number:07d}.safetensors.{living.token}").touch()
    report = verify(path)
    assert (len(report.claims), len(report.stray)) == (2, 2)
    told = read_listing(path)
    assert told.state == "3 of 5 units"
    assert sum(told.holders.values()) == 2
    assert any(f"pid {os.getpid()}" in holder for holder in told.holders)
    done = repair(path)
    assert list(done.kept) == [f"claims/{unit.number:07d}"]
    assert len(done.removed) == 2
    assert [living.token in name for name in verify(path).stray] == [True]
    # Nobody renews it: watched for long enough it is stale, whoever it names.
    assert repair(path, watch=0.05).kept == {}
    assert (verify(path).claims, verify(path).stray) == ([], [])


def test_all_units_of_an_unfinished_store_are_there(path):
    (path / "index.json").unlink()
    (path / "units/0000/index.json").unlink()
    report = verify(path, index_only=True)
    assert "not finished" in report.text()
    assert not report.clean
    assert "the store is finished" in repair(path).text()
    assert verify(path).clean


def test_another_format_is_not_taken_for_damage(path):
    change(info_file(path, 1), sha256="00", checksum=None)
    for call in (verify, repair):
        with pytest.raises(StoreError, match="written by another version"):
            call(path)
    (path / "index.json").write_text('{"samples": 2, "units": []}')
    with pytest.raises(StoreError, match="written by another version"):
        repair(path, index_only=True)
    assert info_file(path, 1).exists()


def test_the_verbs(path, tmp_path, capsys):
    whole = str(fill(tmp_path / "whole", skip=[1]))
    assert main(["store", "verify", str(path), whole]) == 0
    assert capsys.readouterr().out.count("clean; 5 units, every byte read") == 2
    flip(tensor_file(path, 2))
    assert main(["store", "verify", str(path), "--index-only", "--threads", "1"]) == 0
    assert main(["store", "verify", str(path), whole]) == 1
    assert "damaged    1\n    unit 2: " in capsys.readouterr().out
    assert main(["store", "repair", str(path), "--dry-run"]) == 1
    assert f"would remove units/0000/{2:07d}.json" in capsys.readouterr().out
    assert main(["store", "repair", str(path)]) == 1
    assert "1 units are missing" in capsys.readouterr().out
    assert main(["store", "repair", whole]) == 0
    assert main(["store", "ls", whole]) == 0
    told = capsys.readouterr().out
    assert "train 4, test 3; 1 skipped" in told
    assert "mid    2 x 3                     12 B          84 B" in told
    assert main(["store", "ls", str(path), whole, str(tmp_path)]) == 1
    out, problem = capsys.readouterr()
    assert "4 of 5 units  8 " in out
    assert "no feature store in" in problem
    assert main(["store", "verify", str(tmp_path)]) == 2
    for words in (["verify", whole, "--threads", "0"], ["repair", whole, "--watch", "-1"], ["seal", whole], []):
        with pytest.raises(SystemExit):
            main(["store", *words])


def test_what_a_claim_says_is_shown_without_what_a_terminal_obeys(path):
    (path / "claims").mkdir()
    (path / "claims/0000001").write_text(json.dumps({"host": "\x1b[2J\ud800", "pid": 1}))
    assert "host ?[2J?, pid 1" in read_listing(path).text()
    (path / "claims/0000001").write_text("cut o")
    assert "nobody knows whom" in read_listing(path).text()


def test_damaged_and_forged_files():
    spec = importlib.util.spec_from_file_location("fuzz_store", Path(__file__).with_name("fuzz_store.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outcomes = module.fuzz(0, 1500)
    assert sum(outcomes.values()) == 1500
    assert min(outcomes[one] for one in ("refused", "as it was", "forged", "found by verify")) > 0
