"""Reads thousands of damaged and forged files: images, shards, checkpoints and stores.

    python scripts/fuzz.py                         # 12,000 files
    python scripts/fuzz.py --cases 500 --seed 7
    python scripts/fuzz.py --kinds checkpoints

Each is read as what it holds, or refused with diffrep's own error: a crash, another result, code of a file that was
run, a file that takes over 20 s, or memory that grows by more than 2 GiB ends the run with status 1 and the case. The
engines are those of the tests, with more cases. Prints a table of outcomes and the peak of memory.
"""

import argparse
import faulthandler
import importlib.util
import multiprocessing
import os
import queue
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

TESTS = Path(__file__).parents[1] / "tests/unit"
# Kind -> its engine and its share of the cases.
ENGINES = {
    "data": (TESTS / "data/fuzz_data.py", 0.5),
    "checkpoints": (TESTS / "backbones/fuzz_checkpoints.py", 0.25),
    "stores": (TESTS / "store/fuzz_store.py", 0.25),
}
BLOCK = 100  # cases of one seed
PATIENCE = 20  # seconds for one case
GROWTH = 2 << 30  # bytes of memory


def main():
    """Runs the engines one after another; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12_000, help="files in all (default: 12,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first block (default: 0)")
    parser.add_argument(
        "--kinds", nargs="+", choices=ENGINES, default=list(ENGINES), help="what is read (default: all)"
    )
    options = parser.parse_args()
    began, total, whole = time.monotonic(), sum(ENGINES[kind][1] for kind in options.kinds), True
    for kind in options.kinds:
        file, share = ENGINES[kind]
        whole &= run(kind, file, round(options.cases * share / total), options.seed)
    print(f"{options.cases:,} files in {time.monotonic() - began:.0f} s: {'all well' if whole else 'FAILED'}")
    return 0 if whole else 1


def run(kind, file, cases, seed):
    """Runs an engine in a process of its own, since a hang or a crash of C code would end this one.

    Returns:
        Whether all went well.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    worker = context.Process(target=work, args=(file, cases, seed, messages), daemon=True)
    worker.start()
    outcomes, done, problem, growth, seen = Counter(), 0, None, 0, None
    while done < cases and problem is None:
        try:
            what, value = messages.get(timeout=1)
        except queue.Empty:
            if not worker.is_alive():
                problem = f"the process ended with exit code {worker.exitcode} in {seen}"
            continue
        if what == "begins":
            seen = value
        elif what == "failed":
            problem = value
        else:
            counted, growth = value
            outcomes += counted
            done += counted.total()
            if growth > GROWTH:
                problem = f"memory grew by {growth / 2**20:,.0f} MiB in {seen}"
    worker.join(5)
    worker.kill()
    print(f"{kind}: {done:,} files; memory grew by {growth / 2**20:,.0f} MiB at most")
    table(outcomes)
    if problem is not None:
        print(f"{kind} FAILED: {problem}", file=sys.stderr)
    return problem is None


def work(file, cases, seed, messages):
    """Runs the cases in blocks, each of its own seed, and sends what came of them."""
    warnings.simplefilter("ignore")
    engine = load(file)
    told = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff tells of every damaged file
    faulthandler.enable(told)
    watch(engine, told)
    engine.fuzz(seed, 1)  # what libraries take for themselves is not counted
    before = peak()
    try:
        for number, start in enumerate(range(0, cases, BLOCK)):
            count = min(BLOCK, cases - start)
            messages.put(("begins", f"{file.stem}.fuzz({seed + number}, {count})"))
            messages.put(("done", (Counter(engine.fuzz(seed + number, count)), peak() - before)))
    except BaseException:
        again = f"{file.stem}.fuzz({seed + number}, {count})"
        messages.put(("failed", f"{again} makes it again\n{traceback.format_exc()}"))


def watch(engine, told):
    """Lets the process end, and tell the place where it hangs, when reading one file takes too long."""

    def timed(read):
        def call(*arguments, **options):
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=told)
            try:
                return read(*arguments, **options)
            finally:
                faulthandler.cancel_dump_traceback_later()

        return call

    name = "judge" if hasattr(engine, "judge") else "fuzz_case"
    setattr(engine, name, timed(getattr(engine, name)))


def load(file):
    """Returns the module in a file that no package has."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak():
    """Returns the most memory that this process held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(outcomes):
    """Prints how often each kind of file had each outcome."""
    names = {True: "read", False: "refused"}
    cells = Counter()
    for key, count in outcomes.items():
        kind, outcome = key if isinstance(key, tuple) else ("store", key)
        cells[kind, names.get(outcome, outcome)] += count
    columns = sorted({outcome for _, outcome in cells})
    print("  " + " " * 18 + "".join(f"{column:>17}" for column in columns))
    for kind in dict.fromkeys(kind for kind, _ in cells):
        print(f"  {kind:18}" + "".join(f"{cells[kind, column]:17,}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
