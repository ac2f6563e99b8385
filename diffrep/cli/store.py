"""Look after feature stores: list, verify, repair, merge, export. A store is a folder or a URL such as s3://bucket/store.

Examples:
  diffrep store ls runs/features
  diffrep store verify runs/features runs/photos --index-only
  diffrep store repair runs/features --dry-run
  diffrep store merge runs/layer4 runs/layer8 --out runs/both
  diffrep store export runs/features --to parquet --out exported --layer up_blocks.1 --level 10
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, many: bool = True) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument(
            "paths" if many else "path", nargs="+" if many else None, metavar="PATH", help="folder or URL of a store"
        )
        return action

    add("ls", "tell what stores hold, how far they are, and who works on them")
    verify = add("verify", "compare every file with its checksum, and the indexes; exit status 1 if not clean")
    repair = add("repair", "remove what is damaged, stale or left behind, and write the indexes again")
    for action in (verify, repair):
        action.add_argument(
            "--index-only", action="store_true", help="compare sizes with the indexes and read no unit"
        )
        action.add_argument("--threads", type=_positive, metavar="N", help="files read at once")
    repair.add_argument("--dry-run", action="store_true", help="tell, and do nothing")
    repair.add_argument(
        "--watch",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="watch claims of other machines, and remove those that do not change; the extraction's lease is right",
    )
    merge = add("merge", "make one store of several with other layers or levels of the same samples")
    merge.add_argument("--out", required=True, metavar="PATH", help="folder or URL of the new store")
    export = add("export", "write a store in another format", many=False)
    export.add_argument("--out", required=True, metavar="PATH", help="what is written; must not exist")
    export.add_argument("--to", required=True, choices=("lance", "parquet", "npy"), help="format")
    for option in ("layer", "level", "split"):
        export.add_argument(f"--{option}", metavar=option.upper(), help=f"one {option} only")


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked for; 1 when a store is not clean, or one of those to be listed cannot be read."""
    return {"ls": _ls, "verify": _verify, "repair": _repair, "merge": _merge, "export": _export}[arguments.action](
        arguments
    )


def _ls(arguments: argparse.Namespace) -> int:
    from diffrep.errors import StoreError
    from diffrep.store.listing import read_listing, to_table

    if len(arguments.paths) == 1:
        print(read_listing(arguments.paths[0]).text())
        return 0
    found, failed = [], 0
    for path in arguments.paths:
        try:
            found.append(read_listing(path))
        except StoreError as error:
            print(f"diffrep store ls: {error}", file=sys.stderr)
            failed = 1
    print(to_table(found))
    return failed


def _verify(arguments: argparse.Namespace) -> int:
    from diffrep.store.check import verify

    clean = True
    for path in arguments.paths:
        report = verify(path, arguments.index_only, arguments.threads)
        print(report.text())
        clean = clean and report.clean
    return 0 if clean else 1


def _repair(arguments: argparse.Namespace) -> int:
    from diffrep.store.repair import repair

    whole = True
    for path in arguments.paths:
        done = repair(path, arguments.index_only, arguments.dry_run, arguments.watch, arguments.threads)
        print(done.text())
        whole = whole and done.finished
    return 0 if whole else 1


def _merge(arguments: argparse.Namespace) -> int:
    from diffrep.store.merge import merge_stores

    print(merge_stores(arguments.paths, arguments.out))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from diffrep.store.export import export_store

    print(export_store(arguments.path, arguments.out, arguments.to, arguments.layer, arguments.level, arguments.split))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError
    return value
