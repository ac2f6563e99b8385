"""Index and claims of a store of a million units under 1,024 ranks: seconds, file operations, collisions, memory.

    python scripts/bench/index.py    # 2,000,000 small files; ten to twenty minutes
    python scripts/bench/index.py --units 20000 --ranks 64 --json index.json

One process plays all ranks in turn, each with claims of its own, some four times as fast as others. Half-way through
another process resumes the store as it is then; the last units are counted apart, and some ranks die with a unit in
hand. Tensors' files are sparse and nothing is synced, so that what is measured is names, not bytes. Each other step
runs in a process of its own, whose peak memory is what it needed beyond its imports.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from timing import write_json

from diffrep.store import FeatureStore, StoreWriter
from diffrep.store.check import verify
from diffrep.store.claims import Claims
from diffrep.store.folders import Folders
from diffrep.store.layout import CHECKSUM, PER_FOLDER, info_name, tensor_name, to_json
from diffrep.store.place import LocalPlace

COUNTED = ("create", "read", "size", "list", "sizes", "folders", "stamp", "touch", "remove", "write")
# Of a rank that lives; of one that looks for dead ones.
LEASE, SHORT = 300.0, 1.0
SEED = 0
# Ranks without a unit that look again in each turn; the others sleep.
AGAIN = 16
COLUMNS = {
    "count": ",.0f",
    "seconds": ",.2f",
    "per_second": ",.0f",
    "operations": ".2f",
    "collisions": ".4f",
    "late": ".4f",
    "index_operations": ".2f",
    "index_seconds": ",.1f",
    "before_mb": ",.0f",
    "peak_mb": ",.0f",
}
WIDTH = 1024


class CountedPlace(LocalPlace):
    """A local place that counts what is asked of the file system, and how often a file was already there."""

    def __init__(self, target):
        super().__init__(target)
        self.calls = Counter()


def _counted(name):
    method = getattr(LocalPlace, name)

    def call(self, *given, **named):
        self.calls[name] += 1
        found = method(self, *given, **named)
        self.calls["collision"] += name == "create" and not found
        return found

    return call


for _name in COUNTED:
    setattr(CountedPlace, _name, _counted(_name))


def meta_of(units):
    """Returns the meta.json of a store of so many units of one sample and one vector."""
    return {
        "numerics": 1,
        "layers": {"mid": {"shape": [WIDTH], "cost": 0.5}},
        "levels": [["100", "t=100", 100, 0.9, 0.4]],
        "splits": {"train": [0, units]},
        "classes": None,
        "unit_size": 1,
        "versions": {},
    }


def write_unit(folder, number, header):
    """Makes the two files of a unit as a finished one has them, without content or sync; returns size and checksum."""
    path = folder / tensor_name(number)
    size = len(header) + 2 * WIDTH + 8
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    if number == 0:
        os.write(handle, header)
    os.truncate(handle, size)
    os.close(handle)
    checksum = f"{CHECKSUM}{number:032x}"
    info = {"unit": number, "split": "train", "samples": 1, "bytes": size, "checksum": checksum}
    handle = os.open(folder / info_name(number), os.O_WRONLY | os.O_CREAT)
    os.write(handle, to_json(info | {"skipped": [], "ids": [f"{number:09d}.jpg"]}))
    os.close(handle)
    return size, checksum


def header_of():
    """Returns the header of a unit's tensors' file."""
    parts = {
        "mid@t=100": {"dtype": "F16", "shape": [1, WIDTH], "data_offsets": [0, 2 * WIDTH]},
        "row": {"dtype": "I64", "shape": [1], "data_offsets": [2 * WIDTH, 2 * WIDTH + 8]},
    }
    text = json.dumps(parts).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Ranks:
    """All ranks of a job, played in turn.

    Args:
        folder: The store.
        units: How many it has.
        ranks: How many share them.
    """

    def __init__(self, folder, units, ranks):
        self.folder, self.header = folder, header_of()
        self.place, self.indexes = CountedPlace(folder), CountedPlace(folder)
        self.units = StoreWriter(folder, meta_of(units)).units
        self.claims = [Claims(self.place, self.units, LEASE, rank, ranks) for rank in range(ranks)]
        self.folders = [Folders(self.indexes, self.units) for _ in range(ranks)]
        self.random = np.random.default_rng(SEED)
        self.speeds = self.random.uniform(0.25, 1, ranks)
        self.held, self.waiting = {}, set()
        self.taken = self.made = 0
        self.seconds = Counter()
        # Of takes that gave nothing: how many, their seconds and calls.
        self.idle, self.idle_seconds, self.idle_calls = 0, 0.0, Counter()

    def timed(self, part, call, *given):
        """Calls something and counts its seconds as a part's."""
        began = time.perf_counter()
        found = call(*given)
        self.seconds[part] += time.perf_counter() - began
        return found

    def take(self, rank):
        """Lets a rank take a unit; one that gets none waits."""
        calls, seconds = self.place.calls.copy(), self.seconds["take"]
        unit = self.timed("take", self.claims[rank].take)
        if unit is not None:
            self.held[rank] = unit
            self.taken += 1
            self.waiting.discard(rank)
            return
        self.waiting.add(rank)
        self.idle += 1
        self.idle_seconds += self.seconds["take"] - seconds
        self.idle_calls += self.place.calls - calls
        self.place.calls, self.seconds["take"] = calls, seconds

    def finish(self, rank):
        """Lets a rank finish its unit."""
        number = self.held.pop(rank).number
        self.folders[rank].wrote(number, 1, *write_unit(self.folder, number, self.header), 0)
        self.timed("close", self.folders[rank].close, number // PER_FOLDER)
        self.timed("release", self.claims[rank].release, number)
        self.made += 1

    def until(self, made):
        """Goes on until so many units are there; fast ranks come more often than slow ones."""
        said = time.monotonic()
        while self.made < made:
            for rank in self.random.permutation(list(self.held)).tolist():
                if self.random.random() > self.speeds[rank] or self.made >= made:
                    continue
                self.finish(rank)
                self.take(rank)
            for rank in sorted(self.waiting)[:AGAIN] if self.made < made else ():
                self.take(rank)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{self.made:,} of {made:,} units", file=sys.stderr, flush=True)

    def row(self, step, claims=None):
        """Returns what was counted since the last row, for each unit taken; `claims` for those of another process."""
        took = self.seconds["take"] + self.seconds["release"]
        claims, self.taken = claims or self.taken, 0
        operations, looks = (sum(place.calls[name] for name in COUNTED) for place in (self.place, self.indexes))
        row = {
            "step": step,
            "count": claims,
            "seconds": took,
            "per_second": claims / took,
            "operations": operations / claims,
            # Claims that others had, and claims of units that others had finished.
            "collisions": self.place.calls["collision"] / claims,
            "late": max(0, self.place.calls["create"] - self.place.calls["collision"] - claims) / claims,
            "index_operations": looks / claims,
            "index_seconds": self.seconds["close"],
        }
        self.place.calls.clear()
        self.indexes.calls.clear()
        self.seconds.clear()
        return row

    def idle_row(self):
        """Returns what it takes a rank to find nothing that is free."""
        return {
            "step": "takes that gave nothing",
            "count": self.idle,
            "seconds": self.idle_seconds,
            "per_second": self.idle / max(self.idle_seconds, 1e-9),
            "operations": sum(self.idle_calls[name] for name in COUNTED) / max(1, self.idle),
        }


def work(folder, options, measure):
    """Plays the whole job; returns rows of its parts, and what `measure` gives half-way."""
    units, ranks = options.units, options.ranks
    all_ranks = Ranks(folder, units, ranks)
    for rank in range(ranks):
        all_ranks.take(rank)
    rows = [all_ranks.row(f"{ranks:,} ranks take their first")]
    all_ranks.until(units // 2)
    rows += [all_ranks.row("half of all units"), measure("resume")]
    all_ranks.until(units - 2 * ranks)
    rows.append(all_ranks.row("the other half but the last"))
    dead = [rank for rank in all_ranks.held if rank % 16 == 1]
    for rank in dead:
        del all_ranks.held[rank]
    all_ranks.until(units - len(dead))
    rows.append(all_ranks.row(f"the last {2 * ranks:,} units"))
    return [*rows, all_ranks.idle_row(), take_over(all_ranks, len(dead))]


def take_over(ranks, dead):
    """Lets one more process take what dead ranks hold, and finish it."""
    claims, folders = Claims(ranks.place, ranks.units, SHORT), Folders(ranks.indexes, ranks.units)
    assert ranks.timed("take", claims.take) is None, "the claims are young"
    time.sleep(SHORT)
    count = 0
    while (unit := ranks.timed("take", claims.take)) is not None:
        folders.wrote(unit.number, 1, *write_unit(ranks.folder, unit.number, ranks.header), 0)
        ranks.timed("close", folders.close, unit.number // PER_FOLDER)
        ranks.timed("release", claims.release, unit.number)
        count += 1
    assert count == dead and claims.finished
    return ranks.row("claims of dead ranks taken over", count)


def resume(folder, units):
    """Opens the store as a new process does, and takes a unit."""
    writer = StoreWriter(folder, meta_of(units))
    place = CountedPlace(folder)
    claims = Claims(place, writer.units, LEASE, 517, WIDTH)
    unit = claims.take()
    claims.release(unit.number)
    return {"step": "list and resume, half of it done", "count": claims.done}


def finish(folder, units):
    """Writes what the store needs when all units are there."""
    StoreWriter(folder, meta_of(units)).finish()
    return {"step": "finish", "count": units}


def opened(folder, units):
    """Opens the finished store and reads one vector."""
    store = FeatureStore(folder)
    assert len(store) == units and len(store.rows("train")) == units
    assert store.take("mid", 100, np.array([0])).shape == (1, WIDTH)
    return {"step": "open", "count": units}


def check(folder, units):
    """Verifies the index."""
    report = verify(folder, index_only=True)
    assert report.clean, report.text()
    return {"step": "verify the index", "count": units}


STEPS = {"resume": resume, "finish": finish, "open": opened, "verify": check}


def run_step(name, folder, units):
    """Runs a step in this process; memory is the peak so far, and what it was before."""
    before = peak()
    began = time.perf_counter()
    row = STEPS[name](folder, units)
    return row | {"seconds": time.perf_counter() - began, "before_mb": before, "peak_mb": peak()}


def peak():
    """Returns the peak memory of this process so far, in MB."""
    # Not getrusage: a process begins with the peak of the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def simulate(folder, options):
    """Runs everything and returns the rows."""

    def measure(name):
        if options.here:
            return run_step(name, folder, options.units)
        words = ["--step", name, "--folder", str(folder), "--units", str(options.units)]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    rows = work(folder, options, measure)
    rows[-1]["peak_mb"] = peak()
    return rows + [measure(name) for name in ("finish", "open", "verify")]


def table(rows):
    """Returns the rows as a table."""
    lines = [f"{'step':36}" + "".join(f"{name:>18}" for name in COLUMNS)]
    for row in rows:
        cells = ("" if row.get(name) is None else format(row[name], style) for name, style in COLUMNS.items())
        lines.append(f"{row['step']:36}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def check_room(folder, units):
    """Raises OSError where the file system has too few inodes or blocks left for the store."""
    status = os.statvfs(folder)
    inodes, room = 2.1 * units, 6000 * units
    if status.f_favail and status.f_favail < inodes or status.f_bavail * status.f_frsize < room:
        raise OSError(
            f"{folder} needs {inodes:,.0f} inodes and {room / 1e9:.1f} GB; give another --folder, or fewer units"
        )


def main(words=None):
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where a folder is made")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--here", action="store_true", help="all steps in this process; peak memory is then of all")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.step:
        print(json.dumps(run_step(options.step, options.folder, options.units)))
        return
    check_room(options.folder, options.units)
    folder = Path(tempfile.mkdtemp(prefix="index-", dir=options.folder))
    try:
        rows = simulate(folder / "store", options)
        print(table(rows), flush=True)
        write_json(options.json, "index", rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
