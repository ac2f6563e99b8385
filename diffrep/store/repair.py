"""Repair of a store: what is damaged or left behind is removed, so that an extraction can make it again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from diffrep.store.check import Report, verify
from diffrep.store.claims import read_owner
from diffrep.store.layout import CLAIMS, INDEX, PER_FOLDER, SKIPPED, folder_index, info_name, tensor_name
from diffrep.store.listing import describe_owner
from diffrep.store.meta import read_meta
from diffrep.store.place import Place, is_temporary, open_place
from diffrep.store.processes import is_gone
from diffrep.store.writer import StoreWriter


@dataclass(frozen=True)
class Repair:
    """What a repair did, or would do.

    Attributes:
        report: What was wrong.
        removed: Names of the files that were removed.
        kept: Claims of processes that seem to be alive, with whom they name.
        missing: Units that are missing now.
        finished: Whether the store is finished now.
        dry_run: Whether nothing was done.
    """

    report: Report
    removed: list[str]
    kept: dict[str, str]
    missing: int
    finished: bool
    dry_run: bool

    def text(self) -> str:
        """Returns what was done in lines, behind the report."""
        lines = [self.report.text()]
        verb = "would remove" if self.dry_run else "removed"
        lines += [f"{verb} {name}" for name in self.removed[:50]]
        if len(self.removed) > 50:
            lines.append(f"{verb} {len(self.removed):,} files in all")
        lines += [f"left {name}, which is held by {owner}" for name, owner in self.kept.items()]
        if self.report.duplicates:
            lines.append("ids that come twice stay: they are in the data that were extracted")
        if self.report.unknown:
            lines.append("files of no unit stay; remove them if they are not yours")
        if self.missing:
            lines.append(f"{self.missing:,} units are missing; run the same 'diffrep extract' again to make them")
        elif self.finished:
            lines.append("the store is finished")
        elif self.dry_run:
            lines.append("all units are there; without --dry-run the indexes are written again")
        else:
            lines.append(
                "all units are there; whoever holds the claims writes the indexes, or --watch finds them stale"
            )
        return "\n".join(lines)


def repair(
    target: str | Path, index_only: bool = False, dry_run: bool = False, watch: float = 0.0, threads: int | None = None
) -> Repair:
    """Removes damaged units, indexes that disagree with the units, temporary files, and claims that are stale.

    If no unit is missing then, the indexes are written again; else the same extraction makes what is missing. A claim
    is stale when it names a process of this machine that is gone, or does not change while it is watched. Temporary
    files of the other claims' processes stay.

    Args:
        target: Folder or URL of the store.
        index_only: Compare sizes alone; see `verify`.
        dry_run: Do nothing, only tell.
        watch: Seconds for which claims of other machines are watched; the lease of the extraction is right, by default
            300. With 0 they stay.
        threads: How many read at once; see `verify`.

    Raises:
        StoreError: There is no store, meta.json is damaged, or a file cannot be removed or written.
    """
    place = open_place(target)
    meta = read_meta(place)
    began = time.monotonic()
    stamps = {name: place.stamp(name) for name in _claims(place)}
    report = verify(place, index_only, threads)
    if watch and any(not is_gone(read_owner(place, name)) for name in stamps):
        time.sleep(max(0.0, began + watch - time.monotonic()))
    stale, kept = _judge_claims(place, report, stamps, bool(watch))
    removed = _doomed(place, report, stale, kept)
    missing = len({*report.missing, *report.damaged})
    if dry_run:
        return Repair(report, removed, _named(kept), missing, report.finished and not removed, True)
    for name in removed:
        place.remove(name)
    finished = not missing and (place.size(INDEX) is not None or not kept)
    if finished and place.size(INDEX) is None:
        StoreWriter(target, meta).finish()
    elif finished and not kept:
        place.remove_folder(CLAIMS)
    return Repair(report, removed, _named(kept), missing, finished, False)


def _claims(place: Place) -> list[str]:
    return [f"{CLAIMS}/{name}" for name in place.list(CLAIMS) if not is_temporary(name)]


def _judge_claims(
    place: Place, report: Report, stamps: dict[str, str | None], watched: bool
) -> tuple[list[str], dict[str, dict]]:
    """Returns the stale claims, and the others with their owners."""
    stale, kept = [], {}
    for name in report.claims:
        owner = read_owner(place, name)
        stamp = place.stamp(name)
        if stamp is None:  # given back meanwhile
            continue
        if is_gone(owner) or (watched and stamps.get(name) == stamp):
            stale.append(name)
        else:
            kept[name] = owner or {}
    return stale, kept


def _doomed(place: Place, report: Report, stale: list[str], kept: dict[str, dict]) -> list[str]:
    """Returns what has to go, in an order that leaves an unfinished store, and no damaged one, when it is cut off."""
    lost = sorted({*report.damaged, *report.missing})
    folders = sorted({number // PER_FOLDER for number in (*lost, *report.disagree)})
    indexes = dict.fromkeys([*(folder_index(folder) for folder in folders), *report.indexes])
    names = [INDEX, SKIPPED, *indexes] if indexes else []
    for number in sorted(report.damaged):
        names += [info_name(number), tensor_name(number)]
    tokens = {str(owner.get("token")) for owner in kept.values()}
    names += [name for name in report.stray if name.rpartition(".")[2] not in tokens]
    return [name for name in dict.fromkeys([*names, *stale]) if place.size(name) is not None]


def _named(kept: dict[str, dict]) -> dict[str, str]:
    return {name: describe_owner(owner) for name, owner in kept.items()}
