"""Disturbs extractions in every way that a cluster does, and checks that nothing is lost, doubled or changed.

    python scripts/chaos.py            # 100 kill -9, 20 SIGTERM, 10 full disks, 10 times two jobs, 10 hangs
    python scripts/chaos.py --short    # 3 kills and one of each other kind

Processes run `diffrep extract` on a small set. They are forked from one that has imported everything, so that a
process lives for about a second and most of that is work. Whenever a store is complete it is compared with that of an
undisturbed run: every sample once, features equal bit for bit, no temporary file, `diffrep store verify` clean. Ends
with status 1 at the first difference, and keeps the folder then.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import torch

from diffrep import FeatureStore
from diffrep.cli import main as command
from diffrep.store.check import verify
from diffrep.testing import save_images, save_tiny

IMAGES, UNIT, BATCH = 72, 4, 2
PATIENCE = 60  # seconds after which a process that should have ended is a failure
STOPPED, MISTAKE = 143, 2


class Failure(Exception):
    """Something was lost, doubled, changed or left behind."""


class Set:
    """The images, the backbone and the undisturbed store that all others are compared with.

    Args:
        folder: An empty folder.
        seed: Of the random moments.
    """

    def __init__(self, folder, seed):
        self.folder, self.random = folder, random.Random(seed)
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.images = save_images(folder / "images", per_class=IMAGES // 6)
        self.backbone = save_tiny("unet2d", folder / "net")
        self.started = 0
        began = time.monotonic()
        self.wait(self.start(self.folder / "truth"), {0})
        self.alone = time.monotonic() - began
        self.truth = contents(self.folder / "truth")

    def start(self, out, rank=0, world=1, lease=300, before=lambda: None, **more):
        """Forks a process that extracts into `out`; returns its id."""
        self.started += 1
        log = self.logs / f"{self.started:05d}"
        words = [f"backbone={self.backbone}", f"data={self.images}", f"out={out}", f"unit_size={UNIT}"]
        words += [f"batch_size={BATCH}", f"lease={lease}", "request.layers=[down_blocks.0,mid_block]"]
        words += ["request.levels=[100,400]", "data.size=32", *(f"{key}={value}" for key, value in more.items())]
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            before()
            status = command(["extract", *words])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, pid, allowed):
        """Waits for a process; its status must be among the allowed ones (-9 of one that was killed)."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                if code not in allowed:
                    raise Failure(f"a process ended with status {code}, not one of {sorted(allowed)}")
                return code
            time.sleep(0.005)
        raise Failure(f"a process did not end within {PATIENCE} s")

    def moment(self, share=1.0):
        """Sleeps for a random part of the time that one process takes alone."""
        time.sleep(self.random.random() * self.alone * share)

    def check(self, out):
        """Compares a complete store with the truth, and deletes it."""
        report = verify(out)
        if not report.clean:
            raise Failure(report.text())
        expected = {"meta.json", "index.json", "config.yaml", "units"}
        found = {path.name for path in out.iterdir()}
        if found != expected:
            raise Failure(f"{out} holds {sorted(found)}, not {sorted(expected)}")
        hidden = [path for path in out.rglob("*") if path.name.startswith(".")]
        if hidden:
            raise Failure(f"temporary files were left: {hidden[:3]}")
        if contents(out) != self.truth:
            raise Failure(f"{out} does not equal the undisturbed store bit for bit")
        if sorted(FeatureStore(out).ids) != sorted(FeatureStore(self.folder / "truth").ids):
            raise Failure(f"{out} does not hold every sample once")
        shutil.rmtree(out)


def contents(store):
    """Returns the bytes of all units, by name."""
    return {path.name: path.read_bytes() for path in sorted((store / "units").rglob("*.safetensors"))}


def disturbed(chaos, name, count, signals, ended, worlds):
    """Signals processes at random moments and starts another in place of each; returns how many stores were completed.

    Args:
        chaos: The set.
        name: Of the stores.
        count: How many processes a signal must reach at work.
        signals: Of which one is sent.
        ended: Statuses that a process may end with then; 0 is that of one that was through.
        worlds: Numbers of processes, of which each store takes one.
    """
    left, complete = count, 0
    while left:
        out, world = chaos.folder / f"{name}-{complete}", chaos.random.choice(worlds)
        ranks = [chaos.start(out, rank, world) for rank in range(world)]
        while ranks and left:
            chaos.moment(0.8)
            victim = chaos.random.choice(ranks)
            os.kill(victim, chaos.random.choice(signals))
            ranks.remove(victim)
            if chaos.wait(victim, {*ended, 0}):
                left -= 1
                ranks.append(chaos.start(out, chaos.random.randrange(world), world))
        for pid in ranks:
            chaos.wait(pid, {0})
        chaos.check(out)
        complete += 1
    return complete


def kills(chaos, count):
    """Kill -9; a process that was killed is started again, now and then in another world size."""
    return disturbed(chaos, "kill", count, [signal.SIGKILL], {-signal.SIGKILL}, (2, 2, 2, 1, 3))


def terms(chaos, count):
    """SIGTERM or SIGUSR1: the process gives its units back and says how far it came."""
    signals = [signal.SIGTERM, signal.SIGUSR1]
    early = {-number for number in signals}  # before the job began to listen
    return disturbed(chaos, "term", count, signals, {STOPPED, *early}, (2,))


def full_disks(chaos, count):
    """The disk is full at a random moment: the job ends with a message and goes on where there is room again."""
    for number in range(count):
        out = chaos.folder / f"full-{number}"
        with small_disk(chaos) as disk:
            inside = disk / "store"
            chaos.wait(chaos.start(inside), {MISTAKE})
            message = (chaos.logs / f"{chaos.started:05d}").read_text()
            if "No space left on device" not in message:
                raise Failure(f"a full disk was told as {message!r}")
            shutil.copytree(inside, out)
        left = [path for path in out.rglob(".*")]
        if left:
            raise Failure(f"a full disk left {left[:3]}")
        chaos.wait(chaos.start(out), {0})
        chaos.check(out)
    return count


@contextlib.contextmanager
def small_disk(chaos):
    """Gives a folder on a file system of its own that is too small for the store; needs root."""
    size = sum(len(content) for content in chaos.truth.values())
    folder = chaos.folder / "disk"
    folder.mkdir()
    room = int(size * chaos.random.uniform(0.1, 0.9))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def file_limits(chaos, count):
    """Where no file system can be mounted: files may not grow beyond a random size."""
    largest = max(len(content) for content in chaos.truth.values())
    for number in range(count):
        out, room = chaos.folder / f"limit-{number}", int(largest * chaos.random.uniform(0.2, 0.9))
        limit = lambda room=room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
        chaos.wait(chaos.start(out, before=limit), {MISTAKE})
        if list(out.rglob(".*")):
            raise Failure(f"a file limit left {list(out.rglob('.*'))[:3]}")
        chaos.wait(chaos.start(out), {0})
        chaos.check(out)
    return count


def two_jobs(chaos, count):
    """Two jobs of two processes on one store: they share the work; a third one with another request is refused."""
    for number in range(count):
        out = chaos.folder / f"two-{number}"
        jobs = [chaos.start(out, rank, 2) for _ in range(2) for rank in range(2)]
        while not (out / "meta.json").exists():
            time.sleep(0.005)
        other = chaos.start(out, **{"request.seed": 1})
        chaos.wait(other, {MISTAKE})
        message = (chaos.logs / f"{chaos.started:05d}").read_text()
        if "request.seed: 0 there, 1 now" not in message:
            raise Failure(f"another request was told as {message!r}")
        for pid in jobs:
            chaos.wait(pid, {0})
        chaos.check(out)
    return count


def hangs(chaos, count):
    """A rank stops for longer than its lease; another one does its unit, and it wakes up too late."""
    for number in range(count):
        out = chaos.folder / f"hang-{number}"
        hung = chaos.start(out, 0, 2, lease=0.5)
        while not list(out.glob("claims/*")) and not (out / "index.json").exists():
            time.sleep(0.002)
        chaos.moment(0.3)
        os.kill(hung, signal.SIGSTOP)
        other = chaos.start(out, 1, 2, lease=0.5)
        chaos.wait(other, {0})
        os.kill(hung, signal.SIGCONT)
        chaos.wait(hung, {0})
        chaos.check(out)
    return count


def can_mount():
    """Tells whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def main():
    """Runs all kinds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="3 kills, one of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    full = full_disks if can_mount() else file_limits
    kinds = {kills: (100, 3), terms: (20, 1), full: (10, 1), two_jobs: (10, 1), hangs: (10, 1)}
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Set(folder, options.seed)
    print(f"{IMAGES} images, units of {UNIT}; one process alone takes {chaos.alone:.2f} s")
    print(f"{'kind':12} {'times':>6} {'stores':>7} {'seconds':>8}")
    for kind, (many, few) in kinds.items():
        times, began = few if options.short else many, time.monotonic()
        try:
            stores = kind(chaos, times)
        except Failure as failure:
            print(f"FAILED in {kind.__name__}: {failure}\nkept: {folder}", file=sys.stderr)
            sys.exit(1)
        print(f"{kind.__name__:12} {times:6} {stores:7} {time.monotonic() - began:8.1f}", flush=True)
    print(f"{chaos.started} processes; every store equal to the undisturbed one, verified, nothing left behind")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
