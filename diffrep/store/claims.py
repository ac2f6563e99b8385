"""Who works on which unit: processes that share a store take units through files, and need nothing else in common.

A claim is the file claims/0000123, made exclusively, with JSON of its owner. The owner touches it as it makes
progress. It is stale, and its unit may be taken over, when it has not changed for `lease` seconds of the observer's
own clock, so that no two clocks are compared; at once when it names a process of this very machine that is gone; and
after some seconds when it names nobody.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from diffrep.errors import StoreError
from diffrep.store.finished import Finished
from diffrep.store.layout import (
    CLAIMS,
    INDEX,
    PER_FOLDER,
    Unit,
    Units,
    claim_name,
    folder_name,
    info_name,
    tensor_name,
)
from diffrep.store.place import Place, temporary_name
from diffrep.store.processes import is_gone, this_process

INDEX_CLAIM = f"{CLAIMS}/index"
TOKENS = re.compile(r"[0-9A-Za-z-]{1,64}")
# Seconds after which a claim that names nobody is stale: its process was killed between making it and signing it.
UNSIGNED = 10.0
# Folders among which a process that has run into another one's stretch chooses the emptiest, and how many it looks
# into before it waits: at the end of a big job a thousand processes look for the last units.
CHOICE, MOST = 2, 6
# Claims that an idle process begins to observe at a time.
LOOKS = 32
# A look at all folders takes place at most this many times its own duration after the last.
PATIENCE = 20


@dataclass
class _Seen:
    """What an observer knows of somebody's claim: its stamp, since when, whom it names, and whether that one is gone.

    `looked` and `asked` are the times of the last look at the file and at the process.
    """

    stamp: str | None = None
    since: float = 0.0
    looked: float = float("-inf")
    owner: dict[str, Any] | None = None
    asked: float = float("-inf")
    gone: bool = False


class Claims:
    """The claims of one process, and its view of which units are finished.

    Rank r of w begins r/w into what is missing and goes on from there. When it meets another process's work it
    looks for a stretch where nobody works. `beat` and `holds` may be called from other threads than the rest.

    Args:
        place: The store.
        units: Its units.
        lease: Seconds after which a claim that did not change counts for nothing.
        rank: Where to begin.
        world: Of how many.

    Attributes:
        token: Names this process in claims and temporary names.
    """

    def __init__(self, place: Place, units: Units, lease: float, rank: int = 0, world: int = 1):
        self.place, self.units, self.lease = place, units, lease
        self.token = secrets.token_hex(8)
        self._rank, self._world = rank, world
        self._random = np.random.default_rng(int(self.token, 16))
        self._finished = Finished(place, units)
        self._at: int | None = None
        # Folders in which every missing unit was claimed.
        self._taken: set[int] = set()
        self._seen: dict[int, _Seen] = {}
        self._index = _Seen()
        self._mine: set[str] = set()
        self._lock = threading.Lock()
        self._beaten = time.monotonic()
        self._look_again = float("-inf")

    @property
    def done(self) -> int:
        """Number of units that are known to be finished."""
        return self._finished.count

    @property
    def finished(self) -> bool:
        """Whether all units are known to be finished."""
        return self._finished.all

    def take(self) -> Unit | None:
        """Claims a unit that is missing; None when all are finished or in hands that seem to be alive.

        Raises:
            StoreError: The place cannot be read or written.
        """
        if self._at is None:
            self.refresh()
            self._at = self._beginning()
        while True:
            number = self._finished.next_missing(self._at)
            if number is not None and self._claim(number):
                self._at = number + 1
                return self.units[number]
            claimed = self._claimed()
            if not self._move(claimed):
                return self._take_over(claimed)

    def take_index(self) -> bool:
        """Claims the writing of index.json; False while another process has it."""
        if self.place.create(INDEX_CLAIM, self._owner()):
            self._add(INDEX_CLAIM)
            return True
        if INDEX_CLAIM not in self._mine and self._is_stale(INDEX_CLAIM, self._index):
            self._seize(INDEX_CLAIM)
        return INDEX_CLAIM in self._mine

    def beat(self) -> None:
        """Says that this process made progress: renews its claims, at most every quarter of the lease."""
        if time.monotonic() < self._beaten + self.lease / 4:
            return
        with self._lock:
            self._beaten = time.monotonic()
            self._mine = {name for name in self._mine if self._names_me(name)}
            for name in self._mine:
                self.place.touch(name)

    def holds(self, number: int) -> bool:
        """Tells whether a claim is still this process's; asks the place."""
        name = claim_name(number)
        with self._lock:
            return name in self._mine and self._names_me(name)

    def release(self, number: int) -> None:
        """Gives a claim back; the unit counts as finished when it is there."""
        self._release(claim_name(number))
        if self.place.size(info_name(number)) is not None:
            self._mark(number)

    def release_all(self) -> None:
        """Gives all claims back."""
        for name in list(self._mine):
            self._release(name)

    def refresh(self) -> None:
        """Looks which units are finished by now; rarely, where that takes long.

        Raises:
            StoreError: The place cannot be read.
        """
        if self._at == len(self.units):
            self._settle(self._claimed())
            if self.place.size(INDEX) is not None:
                self._finished.look()
        elif (began := time.monotonic()) >= self._look_again:
            self._finished.look()
            now = time.monotonic()
            self._look_again = now + PATIENCE * (now - began)

    def _mark(self, number: int) -> None:
        self._finished.mark(number)
        self._seen.pop(number, None)

    def _beginning(self) -> int:
        missing = self._finished.missing()
        return int(missing[self._rank % self._world * len(missing) // self._world]) if len(missing) else 0

    def _claimed(self) -> set[int]:
        names = self.place.list(CLAIMS)
        return {int(name) for name in names if name.isascii() and name.isdigit()}

    def _claim(self, number: int) -> bool:
        name = claim_name(number)
        if self.place.create(name, self._owner()):
            self._add(name)
        else:
            seen = self._seen.setdefault(number, _Seen())
            if not self._is_stale(name, seen):
                return False
            self._seize(name)
            self._clean(number, seen.owner)
        # Claimed and finished by another one since this one looked.
        if self.place.size(info_name(number)) is not None:
            self.release(number)
            return False
        return True

    def _move(self, claimed: set[int]) -> bool:
        """Goes to a long stretch where nobody works; False when none is found."""
        self._settle(claimed)
        self._seen = {number: seen for number, seen in self._seen.items() if number in claimed}
        folders = [folder for folder in self._finished.open_folders().tolist() if folder not in self._taken]
        self._random.shuffle(folders)
        if claimed - self._numbers():
            del folders[MOST:]
        longest = range(0)
        for start in range(0, len(folders), CHOICE):
            longest = max([self._free(folder, claimed) for folder in folders[start : start + CHOICE]], key=len)
            if longest:
                break
        self._at = longest.start if longest else len(self.units)
        if longest and any(longest.start - PER_FOLDER <= number < longest.start for number in claimed):
            # Somebody comes this way from before it: the first part is theirs.
            self._at += int(self._random.integers(len(longest) // 4, len(longest) * 3 // 4 + 1))
        return bool(longest)

    def _free(self, folder: int, claimed: set[int]) -> range:
        """Looks into a folder and returns its longest stretch of missing units that nobody has claimed."""
        self._finished.look_into([folder])
        missing = set(self._finished.missing(folder).tolist())
        # To know at the end of the job which claims are stale.
        for number in (missing & claimed) - self._numbers() - self._seen.keys():
            self._is_stale(claim_name(number), self._seen.setdefault(number, _Seen()))
        if not missing - claimed:
            self._taken.add(folder)
        return _longest(sorted(missing - claimed))

    def _settle(self, claimed: set[int]) -> None:
        """Looks at the units of taken folders whose claims are gone: they are finished, or were given back."""
        for folder in list(self._taken):
            for number in set(self._finished.missing(folder).tolist()) - claimed:
                if self.place.size(info_name(number)) is not None:
                    self._mark(number)
                else:
                    self._taken.discard(folder)

    def _take_over(self, claimed: set[int]) -> Unit | None:
        others = claimed - self._numbers()
        new = self._random.permutation(sorted(others - self._seen.keys()))[:LOOKS].astype(int).tolist()
        for number in sorted(others & self._seen.keys()) + new:
            seen = self._seen.setdefault(number, _Seen())
            if number < len(self.units) and self._is_stale(claim_name(number), seen) and self._claim(number):
                return self.units[number]
        return None

    def _is_stale(self, name: str, seen: _Seen) -> bool:
        now = time.monotonic()
        if now - seen.looked >= self.lease / 4:
            seen.looked = now
            self._observe(name, seen)
        if now - seen.asked >= 1 and not seen.gone:
            seen.asked, seen.gone = now, is_gone(seen.owner)
        if not self._is_old(seen):
            return False
        # Once more: it may have been renewed, or seized by another observer.
        before = seen.stamp
        self._observe(name, seen)
        return seen.stamp == before and self._is_old(seen)

    def _is_old(self, seen: _Seen) -> bool:
        if seen.stamp is None:
            return False
        lease = self.lease if seen.owner else min(self.lease, UNSIGNED)
        return time.monotonic() - seen.since >= lease or seen.gone

    def _observe(self, name: str, seen: _Seen) -> None:
        stamp = self.place.stamp(name)
        if stamp != seen.stamp:
            seen.stamp, seen.since, seen.owner = stamp, time.monotonic(), None
            seen.asked, seen.gone = float("-inf"), False
        if stamp is not None and seen.owner is None:
            seen.owner = self._read_owner(name)

    def _seize(self, name: str) -> None:
        # Of two that seize at once the later one has it; the other one learns of it before it publishes.
        self.place.write(name, [self._owner()])
        self._add(name)

    def _clean(self, number: int, owner: dict[str, Any] | None) -> None:
        """Removes the temporary files that a dead process may have left of a unit."""
        files = (tensor_name(number), info_name(number))
        token = owner.get("token") if owner else None
        if isinstance(token, str) and TOKENS.fullmatch(token):
            left = [temporary_name(file, token) for file in files]
        else:
            folder = folder_name(number // PER_FOLDER)
            begins = tuple(f".{file.rpartition('/')[2]}." for file in files)
            left = [f"{folder}/{name}" for name in self.place.list(folder) if name.startswith(begins)]
        for name in left:
            self.place.remove(name)

    def _owner(self) -> bytes:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        who = {"token": self.token, **this_process(), "started": started, "rank": self._rank, "world": self._world}
        return json.dumps(who).encode()

    def _names_me(self, name: str) -> bool:
        owner = self._read_owner(name)
        return owner is not None and owner.get("token") == self.token

    def _read_owner(self, name: str) -> dict[str, Any] | None:
        return read_owner(self.place, name)

    def _numbers(self) -> set[int]:
        return {int(name.rpartition("/")[2]) for name in self._mine if name != INDEX_CLAIM}

    def _add(self, name: str) -> None:
        with self._lock:
            self._mine.add(name)

    def _release(self, name: str) -> None:
        with self._lock:
            held = name in self._mine and self._names_me(name)
            self._mine.discard(name)
            if held:
                self.place.remove(name)


def read_owner(place: Place, name: str) -> dict[str, Any] | None:
    """Returns whom a claim names; None when it is gone, or holds nonsense, as one does that a full disk cut off."""
    try:
        owner = json.loads(place.read(name))
    except StoreError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return None
    except (ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) else None


def _longest(numbers: list[int]) -> range:
    """Returns the longest run of consecutive numbers."""
    if not numbers:
        return range(0)
    runs = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)
    best = max(runs, key=len)
    return range(int(best[0]), int(best[-1]) + 1)
