import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from diffrep import ExtractConfig, ExtractJob, FeatureStore, dist
from diffrep.data.shards import StorageError
from diffrep.errors import DataError, DiffrepError, Stopped, StoreError
from diffrep.extract import work
from diffrep.extract.features import Features
from diffrep.extract.feed import Batch, ImageFeed
from diffrep.extract.monitor import Monitor
from diffrep.extract.unit import UnitFeatures
from diffrep.noise import Level, LevelTable
from diffrep.store import Claims, StoreWriter, Unit
from diffrep.testing import save_images

REQUEST = {"layers": ["mid_block"], "levels": [100], "pool": "mean"}


def config_of(folder, images, out, **more):
    given = {"backbone": str(folder), "data": str(images), "request": REQUEST, "out": str(out), "unit_size": 4}
    return ExtractConfig(**given | {"batch_size": 2} | more)


@pytest.fixture
def config(unet_folder, image_folder, tmp_path):
    return config_of(unet_folder, image_folder, tmp_path / "store")


def test_the_feed_gives_each_unit_in_batches_and_takes_units_only_when_it_has_room(unet, config):
    job, taken = ExtractJob(config, unet), []

    def units():
        for unit in job.units:
            taken.append(unit.number)
            yield unit

    found = []
    for unit, batch in ImageFeed(job.images, 3)(units()):
        found.append((unit.number, None if batch is None else len(batch.ids)))
        assert len(taken) <= unit.number + 1
    # 18 images a split, in units of 4.
    assert found[:6] == [(0, 3), (0, 1), (0, None), (1, 3), (1, 1), (1, None)]
    assert sum(count or 0 for _, count in found) == 36


@pytest.mark.parametrize("workers", [0, 1])
def test_a_job_writes_every_sample_once(unet, config, workers):
    store = ExtractJob(config.model_copy(update={"workers": workers}), unet).run()
    assert len(store) == 36 and len(set(store.ids)) == 36
    assert store.verify() == []
    names = {path.name for path in store.path.iterdir()}
    assert names == {"meta.json", "index.json", "config.yaml", "units"}


def test_units_of_a_living_process_are_waited_for_and_the_counters_tell_of_it(unet, config, tmp_path, monkeypatch):
    monkeypatch.setattr("diffrep.extract.monitor.WRITE", 0.1)
    counters = tmp_path / "counters"
    job = ExtractJob(config.model_copy(update={"monitor": str(counters)}), unet)
    other = Claims(StoreWriter(config.out, job.meta()).place, job.units, lease=300)
    unit = other.take()  # of this very process, which lives
    running = threading.Thread(target=job.run)
    running.start()
    until = time.monotonic() + 20
    while len(list(Path(config.out).rglob("units/0000/0*.json"))) < 9 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    assert running.is_alive()  # everything else is done, and it waits
    before = counters.stat().st_mtime_ns
    while counters.stat().st_mtime_ns == before and time.monotonic() < until:
        time.sleep(0.05)
    assert counters.stat().st_mtime_ns > before
    other.release(unit.number)
    running.join(20)
    assert not running.is_alive()
    assert len(FeatureStore(config.out)) == 36


def test_a_claim_without_progress_expires(unet, config):
    job = ExtractJob(config.model_copy(update={"lease": 0.5}), unet)
    Claims(StoreWriter(config.out, job.meta()).place, job.units, lease=0.5).take()
    began = time.monotonic()
    assert len(job.run()) == 36
    assert time.monotonic() - began >= 0.4


def test_a_signal_ends_the_job_and_gives_its_units_back(unet, config):
    job = ExtractJob(config, unet)
    read, seen = job.read, []

    def slow(batch):
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(batch)
        return read(batch)

    job.read = slow
    with pytest.raises(Stopped, match="stopped by SIGTERM: .* of 10 units are in .*; run the same command again"):
        job.run()
    assert list((out := Path(config.out)).glob("claims/*")) == []
    assert not (out / "index.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(ExtractJob(config, unet).run()) == 36


def test_an_unreadable_image_stops_the_job_or_is_skipped(unet, unet_folder, tmp_path):
    images = save_images(tmp_path / "images")
    (images / "train/class0/0.png").write_bytes(b"no image")
    config = config_of(unet_folder, images, tmp_path / "store")
    with pytest.raises(DataError, match="train/class0/0.png: cannot read the image: not an image; finished units"):
        ExtractJob(config, unet).run()
    assert list((tmp_path / "store").glob("claims/*")) == []
    store = ExtractJob(config.model_copy(update={"on_error": "skip"}), unet).run()
    assert len(store) == 35
    assert "train/class0/0.png" in (tmp_path / "store/skipped.jsonl").read_text()


def after(job, batches, act):
    """Does something before the job reads the batch behind so many."""
    read, seen = job.read, []

    def reading(batch):
        seen.append(batch)
        if len(seen) == batches + 1:
            act()
        return read(batch)

    job.read = reading
    return job


@pytest.mark.mp
def test_processes_that_decode_outlive_the_signal_that_ends_the_job(unet, config):
    def signal_all():  # as a scheduler does
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGCHLD)
    job = after(ExtractJob(config.model_copy(update={"workers": 2}), unet), 3, signal_all)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        job.run()
    assert list(Path(config.out).glob("claims/*")) == []
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.mp
def test_a_process_that_decodes_and_is_killed_ends_the_job_with_advice(unet, config):
    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.1)

    job = after(ExtractJob(config.model_copy(update={"workers": 1}), unet), 3, kill)
    with pytest.raises(DiffrepError, match="a process that decodes images was ended .* less workers"):
        job.run()
    assert list(Path(config.out).glob("claims/*")) == []


def test_images_that_vanish_are_not_skipped(unet, unet_folder, tmp_path):
    images = save_images(tmp_path / "images")
    job = ExtractJob(config_of(unet_folder, images, tmp_path / "store", on_error="skip"), unet)
    with pytest.raises(StorageError, match="cannot read the image: .*; it was there when the job began"):
        after(job, 3, lambda: images.rename(tmp_path / "away")).run()
    assert not (tmp_path / "store/index.json").exists()
    (tmp_path / "away").rename(images)
    assert len(ExtractJob(job.config, unet).run()) == 36


def test_a_store_that_vanishes_is_told_of_and_not_made_anew(unet, config):
    job = after(ExtractJob(config, unet), 3, lambda: shutil.rmtree(config.out))
    with pytest.raises(StoreError, match="the store is not there any more; finished units stay"):
        job.run()
    assert not Path(config.out).exists()


def test_a_finished_store_is_left_as_it_is(unet, config):
    ExtractJob(config, unet).run()
    files = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    assert len(ExtractJob(config.model_copy(update={"batch_size": 8}), unet).run()) == 36
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == files


def test_batches_that_take_longer_than_the_lease_come_to_an_end(unet_folder, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "LAST_WAIT", 0.05)
    data = {"path": str(image_folder), "splits": "train"}
    slow = {"lease": 0.02, "unit_size": 18, "batch_size": 9}  # of a single unit
    config = config_of(unet_folder, image_folder, tmp_path / "store", data=data, **slow)
    jobs = [ExtractJob(config) for _ in range(2)]
    for job in jobs:
        job.read = lambda batch, read=job.read: time.sleep(0.3) or read(batch)
    running = [threading.Thread(target=job.run, daemon=True) for job in jobs]
    with pytest.warns(UserWarning, match="was taken over by another process.*Use a longer lease"):
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(30)
    assert not any(thread.is_alive() for thread in running)
    assert FeatureStore(config.out).verify() == []


def test_two_units_are_in_memory_at_most(unet, config):
    may_write = threading.Event()

    class Slow(StoreWriter):
        def write(self, *given, **more):
            may_write.wait()
            return super().write(*given, **more)

    writer = Slow(config.out, ExtractJob(config, unet).meta())
    publisher = work._Publisher(writer, Claims(writer.place, writer.units, 300))
    publisher.put(UnitFeatures(writer.units[0], 4))
    second = threading.Thread(target=publisher.put, args=[UnitFeatures(writer.units[1], 4)])
    second.start()
    second.join(0.2)
    assert second.is_alive()
    may_write.set()
    second.join(5)
    assert not second.is_alive()
    publisher.close()


def test_room_for_a_shard_grows():
    table = LevelTable([(1, Level("t=1", 1, 0.9, 0.4))])
    features = UnitFeatures(Unit(0, "all", range(1)), None)
    for start in range(0, 3000, 100):
        values = torch.arange(start, start + 100.0)[:, None]
        batch = Batch(list(range(100)), [f"{start + i}" for i in range(100)], None, None, None, [], [])
        features.add(batch, Features({("mid", "t=1"): values}, batch.ids, table))
    assert torch.equal(features.tensors["mid@t=1"][:3000, 0], torch.arange(3000.0))
    assert features.labels is None


def test_counters_are_prometheus_text(tmp_path):
    file = tmp_path / "counters"
    monitor = Monitor(10, 100, dist.Worker(1, 2, 1), torch.device("cpu"), str(file), 'a "store"')
    with monitor.timed("network"):
        time.sleep(0.01)
    monitor.batch(8, 2)
    monitor.unit()
    last = time.time()
    time.sleep(1.1)
    monitor.close()
    text = (tmp_path / "counters.1").read_text()
    assert (
        float(re.search(r"diffrep_last_progress_seconds{.*} (.*)", text)[1]) <= last + 0.5
    )  # not when it was written
    sample = re.compile(r'diffrep_[a-z_]+\{store="a \\"store\\"",rank="1"(,part="[a-z]+")?\} [0-9.e+-]+')
    for line in text.splitlines():
        assert line.startswith(("# HELP diffrep_", "# TYPE diffrep_")) or sample.fullmatch(line), line
    assert 'diffrep_images_total{store="a \\"store\\"",rank="1"} 8\n' in text
    assert 'diffrep_skipped_total{store="a \\"store\\"",rank="1"} 2\n' in text
    assert float(re.search(r'part="network"} (.*)', text)[1]) >= 0.01


def test_counters_that_cannot_be_written_end_a_job_only_at_its_beginning(tmp_path):
    def monitor(file):
        return Monitor(10, 100, dist.Worker(), torch.device("cpu"), str(file), "store")

    (tmp_path / "file").touch()
    first = monitor(tmp_path / "file/counters")
    with pytest.raises(StoreError, match="cannot write"):
        first.batch(8, 2)
    first.close()  # which has no second complaint
    counting = monitor(tmp_path / "folder/counters")
    counting.batch(8, 2)
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").touch()
    with pytest.warns(UserWarning, match="the counters stay as they are: cannot write"):
        counting.write(last=True)
    counting.close()


def test_the_job_writes_counters(unet, config, tmp_path):
    ExtractJob(config.model_copy(update={"monitor": str(tmp_path / "counters")}), unet).run()
    text = (tmp_path / "counters").read_text()
    for name, value in {"images_total": 36, "units_total": 10, "store_units_done": 10, "batch_size": 2}.items():
        assert f'diffrep_{name}{{store="store",rank="0"}} {value}\n' in text
