import heapq
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from diffrep.store import Claims, list_units, open_place
from diffrep.store.layout import claim_name, folder_index, folder_name, info_name, tensor_name
from diffrep.store.place import LocalPlace, temporary_name
from diffrep.store.processes import is_gone, this_process

LONG = 1000.0


class Counting(LocalPlace):
    """A local place that counts its calls, by name, and those to list by folder."""

    def __init__(self, target):
        super().__init__(target)
        self.calls = Counter()


def counted(name):
    def call(self, *args, **options):
        self.calls[name, args[0] if name == "list" and args else ""] += 1
        return getattr(LocalPlace, name)(self, *args, **options)

    return call


for name in ("create", "list", "read", "remove", "size", "stamp", "touch", "write"):
    setattr(Counting, name, counted(name))


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    place = open_place(tmp_path / "store" if request.param == "local" else f"memory://{tmp_path}/store")
    place.make("units")
    return place


def publish(place, *numbers):
    for number in numbers:
        for name in (tensor_name(number), info_name(number)):
            place.write(name, [b"{}"])


def touch(place, number):
    for name in (tensor_name(number), info_name(number)):
        place.file(name).parent.mkdir(exist_ok=True)
        place.file(name).touch()


def units(count):
    return list_units({"all": range(count)}, 1)


def numbers(claims, count):
    return [unit and unit.number for unit in (claims.take() for _ in range(count))]


def test_each_rank_begins_at_its_own_stretch(place):
    publish(place, 0, 1)
    first, second = (Claims(place, units(10), LONG, rank, 2) for rank in range(2))
    assert numbers(first, 2) == [2, 3]
    assert numbers(second, 2) == [6, 7]
    assert [first.holds(2), first.holds(6), second.holds(6)] == [True, False, True]
    assert first.done == 2
    assert sorted(place.list("claims")) == ["0000002", "0000003", "0000006", "0000007"]


def test_every_unit_is_taken_once_and_few_calls_are_made(tmp_path):
    count, world = 1100, 4
    place = Counting(tmp_path)
    place.make("units")
    everyone = [Claims(place, units(count), LONG, rank, world) for rank in range(world)]
    chance = random.Random(0)
    speeds = [chance.uniform(0.5, 2) for _ in range(world)]
    waiting = [(chance.random(), rank, None) for rank in range(world)]
    made = Counter()
    while waiting:
        now, rank, unit = heapq.heappop(waiting)
        claims = everyone[rank]
        if unit is not None:
            made[unit.number] += 1
            touch(place, unit.number)
            claims.release(unit.number)
        if (unit := claims.take()) is not None or not claims.finished:
            heapq.heappush(waiting, (now + speeds[rank] * chance.uniform(0.8, 1.2), rank, unit))
    assert made == Counter(range(count))
    assert place.list("claims") == []
    calls = Counter()
    for (name, _), times in place.calls.items():
        calls[name] += times
    # Create, look whether it is finished, read and remove, look again; and little for finding work.
    assert calls.total() < 5.5 * count
    assert calls["create"] < 1.03 * count


def test_complete_folders_are_not_listed_and_the_rest_once(tmp_path):
    place = Counting(tmp_path)
    for folder in (0, 2):
        place.make(folder_name(folder))
    place.write(folder_index(0), [b"{}"])
    touch(place, 2001)
    place.calls.clear()
    claims = Claims(place, units(3000), LONG)
    claims.refresh()
    assert (claims.done, claims.finished) == (1001, False)
    assert numbers(claims, 3) == [1000, 1001, 1002]
    listed = {folder: times for (name, folder), times in place.calls.items() if name == "list"}
    assert listed == {folder_name(2): 1}


def test_another_one_joins_in_the_part_where_nobody_works(place):
    first = Claims(place, units(100), LONG)
    assert numbers(first, 2) == [0, 1]
    second = Claims(place, units(100), LONG)  # a second job by mistake: the same rank of the same world
    start = second.take().number
    assert 25 <= start <= 77
    assert numbers(second, 2) == [start + 1, start + 2]
    everything = {0, 1, start, start + 1, start + 2}
    while (unit := first.take()) is not None or (unit := second.take()) is not None:
        assert unit.number not in everything
        everything.add(unit.number)
    assert everything == set(range(100))


def test_a_unit_given_back_or_lost_is_taken_again(place):
    first, second = Claims(place, units(2), LONG), Claims(place, units(2), LONG)
    assert (numbers(first, 2), numbers(second, 1)) == ([0, 1], [None])
    first.release(1)
    assert numbers(second, 1) == [1]
    publish(place, 1)
    second.release(1)
    assert (second.done, first.done) == (1, 0)
    first.refresh()
    assert (second.take(), first.take(), first.done) == (None, None, 1)
    first.release_all()
    assert numbers(second, 1) == [0]
    # What the second one holds now it loses, to one that gives it back.
    place.remove(claim_name(0))
    assert numbers(first, 1) == [0]
    assert not second.holds(0)
    second.release(0)
    assert first.holds(0)
    first.release(0)
    assert numbers(second, 1) == [0]
    publish(place, 0)
    second.release(0)
    assert second.finished
    assert second.take() is None
    assert place.list("claims") == []


def test_a_unit_that_was_finished_meanwhile_is_not_done_again(place):
    claims = Claims(place, units(3), LONG)
    claims.refresh()
    publish(place, 0)
    assert numbers(claims, 3) == [1, 2, None]
    assert claims.done == 1
    place.write("index.json", [b"{}"])
    claims.refresh()
    assert claims.finished


def test_a_claim_without_progress_is_taken_over_and_one_with_it_is_not(place):
    first, second = Claims(place, units(1), 0.4), Claims(place, units(1), 0.4)
    assert numbers(first, 1) == [0]
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        first.beat()
        assert second.take() is None
        time.sleep(0.02)
    until = time.monotonic() + 5
    while (unit := second.take()) is None and time.monotonic() < until:
        time.sleep(0.02)
    assert unit.number == 0
    assert (first.holds(0), second.holds(0)) == (False, True)
    # The one that slept does no harm when it wakes up.
    time.sleep(0.15)
    first.beat()
    first.release(0)
    assert second.holds(0)


def test_a_claim_that_holds_nonsense_counts_by_its_stamp(place):
    for nonsense in (b"", b'{"tok', b"[1]", b'{"token": 5, "host": [], "pid": "x"}', b"\xff" * 9):
        place.write(claim_name(0), [nonsense])
        place.write(temporary_name(tensor_name(0), "0123456789abcdef"), [b"cut o"])
        claims = Claims(place, units(1), 0.1)
        assert claims.take() is None
        time.sleep(0.12)
        assert numbers(claims, 1) == [0]
        assert place.list("units/0000") == []


def test_a_claim_that_was_never_signed_does_not_hold_for_the_lease(place, monkeypatch):
    monkeypatch.setattr("diffrep.store.claims.UNSIGNED", 0.2)
    place.write(claim_name(0), [b""])
    claims = Claims(place, units(1), 1000.0)
    assert claims.take() is None
    time.sleep(0.25)
    assert numbers(claims, 1) == [0]
    # One that is signed late is its owner's.
    late = Claims(place, units(2), 1000.0)
    place.write(claim_name(1), [b""])
    assert late.take() is None
    owner = Claims(place, units(2), 1000.0)
    place.write(claim_name(1), [owner._owner()])
    time.sleep(0.25)
    assert late.take() is None


KILLED = """
import os, signal, sys
from diffrep.store import Claims, list_units, open_place
from diffrep.store.layout import tensor_name
place = open_place(sys.argv[1])
claims = Claims(place, list_units({"all": range(3)}, 1), 1000.0)
unit = claims.take()
assert unit.number == 0 and claims.take_index()
def parts():
    yield b"begun"
    os.kill(os.getpid(), signal.SIGKILL)
place.write(tensor_name(unit.number), parts(), claims.token)
"""


@pytest.mark.mp
def test_what_a_killed_process_held_is_taken_over_at_once(tmp_path):
    place = open_place(tmp_path)
    place.make("units")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(place.list("units/0000")) == 1
    claims = Claims(place, units(3), LONG)
    assert numbers(claims, 4) == [0, 1, 2, None]
    assert place.list("units/0000") == []
    assert claims.take_index()


def test_one_process_writes_the_index(place):
    first, second = Claims(place, units(1), LONG), Claims(place, units(1), LONG)
    assert first.take_index()
    assert first.take_index()
    assert not second.take_index()
    assert numbers(second, 1) == [0]
    first.release_all()
    assert second.take_index()


def test_only_processes_of_this_machine_are_known_to_be_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    me = this_process()
    gone = {**me, "pid": child.pid, "born": 1}
    child.wait()
    assert not is_gone(me)
    assert is_gone(gone)
    assert is_gone({**me, "born": me["born"] - 1})  # its id was given to another one
    assert not is_gone({**gone, "host": "elsewhere"})
    assert not is_gone({**gone, "boot": "an earlier start"})
    assert not is_gone({**gone, "space": "pid:[1]"})  # another container
    assert not is_gone({key: gone[key] for key in ("host", "pid")})
    for pid in (None, "1", -1, 0, True, 2**70):
        assert is_gone({**gone, "pid": pid}) == (pid == 2**70)
    assert not is_gone({**gone, "pid": 1, "born": None})
    assert not is_gone(None)


def test_a_process_that_its_parent_forgot_is_gone():
    child = os.fork()
    if not child:
        os._exit(0)
    owner = {**this_process(), "pid": child, "born": 12345}
    until = time.monotonic() + 5
    while not is_gone(owner) and time.monotonic() < until:
        time.sleep(0.01)
    assert is_gone(owner)
    os.waitpid(child, 0)


def test_claims_say_whose_they_are(place):
    claims = Claims(place, units(1), LONG, 3, 4)
    claims.take()
    owner = json.loads(place.read(claim_name(0)))
    assert owner["token"] == claims.token
    assert (owner["pid"], owner["rank"], owner["world"]) == (os.getpid(), 3, 4)
    assert owner["started"].startswith("20")
