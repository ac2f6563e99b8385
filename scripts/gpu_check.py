"""Everything that only a GPU can show, in one JSON file and one table.

    python scripts/gpu_check.py [--out runs/gpu_check]        # scripts/gpu_check.sh makes the environment too
    python scripts/gpu_check.py --only tests modes
    python scripts/gpu_check.py --cpu                         # small sizes; what needs CUDA is marked as left out

"tests" runs the tests with the marker gpu: xformers and SDPA, compile modes, CUDA graphs, bf16, FSDP2, memory that
runs out. Every other check is a bench of scripts/bench, in a process of its own with a time limit; "modes" tells how
far each kernel, dtype and compile mode is from float32, and "job" what `diffrep extract` reaches of the bare forward.
A check that fails is recorded with its last words, and the others go on.

Leaves gpu_check.json, gpu_check.md and what each check printed, logs/NAME.txt. The exit status is 0, 1 when a check
failed, 2 when there is no CUDA device and no --cpu.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"
LAST_WORDS = 2000  # characters of a failed check's output that go into the JSON
LONGEST_NAME = 48  # characters; a longer text of a row is a remark, and no name of it


@dataclass(frozen=True)
class Bench:
    """How a bench is run.

    Attributes:
        script: Its file in scripts/bench.
        gpu: Arguments on a machine with a GPU; NETWORK stands for a folder with a random U-Net of 360 M weights.
        cpu: Arguments where a CPU stands in, so small that all benches together take some minutes.
        limit: Seconds after which it is ended.
    """

    script: str
    gpu: str
    cpu: str
    limit: int = 900


FAMILIES = "--families dit unet2d-condition sd3"
TRANSFORMER = "--size 256 --patch 16 --hidden 768 --depth 12 --encoder-size 256"
BENCHES = {
    "modes": Bench("modes", f"{FAMILIES} --batch 32", "--families dit --batch 1 --rounds 1", limit=1800),
    "job": Bench(
        "job",
        "--source NETWORK --images 4096 --batch 128 --unit 1024 --workers 4 --rounds 3",
        "--images 100 --rounds 1",
    ),
    "job-memory": Bench("job", "--memory --images 20000 --batch 250", "--memory --images 500"),
    "extract": Bench("extract", "--images 240", "--images 8 --rounds 1"),
    "extract-latent": Bench("extract", "--latent --images 240", "--latent --images 8 --rounds 1"),
    "backbones": Bench("backbones", "--batch 64 --no-compile", "--families edm --batch 2 --rounds 1 --no-compile"),
    "train": Bench("train", f"{TRANSFORMER} --batch 64 --workers 8", "--rounds 1 --steps 1 --batch 4 --depth 2"),
    "layers": Bench("layers", "", "edm-cifar10"),
    "store": Bench("store", "", "--rounds 1 --others 0 --share 0.02"),
    "index": Bench("index", "--units 100000 --ranks 256", "--units 3000 --ranks 16"),
    "probe": Bench(
        "probe",
        "--threads 8",
        "--samples 200 --subset 1 --epochs 1 --strengths 1 --images 16 --levels 1 --grid-epochs 1 --rounds 1",
    ),
    "correspond": Bench("correspond", "--threads 8", "--images 3 --rounds 1"),
    "codec": Bench("codec", "--codec CODEC --data DATA", "--codec CODEC --data DATA --limit 8"),
}


def save_network(folder):
    """Saves a random U-Net that keeps a GPU busy, in pixels of 64 x 64, and returns its folder."""
    if not folder.exists():
        import diffusers
        import torch

        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(sample_size=64, block_out_channels=(256, 512, 768, 1024), attention_head_dim=64)
        unet.save_pretrained(folder / "unet")
        diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def environment():
    """Returns versions and what the machine has."""
    sys.path.append(str(BENCH))
    import torch
    from timing import machine

    from diffrep.cli.env import SHOWN

    versions = {}
    for name in SHOWN:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "machine": machine(),
        "versions": versions | {"python": sys.version.split()[0], "cuda": torch.version.cuda},
        "devices": [
            {"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"} for one in devices
        ],
        "driver": words_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": words_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }


def words_of(*command):
    """Returns what a command prints, or None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def run(command, log, limit):
    """Runs a command with its output in a file.

    Returns:
        A dict: "status" ("passed", "failed" or "timed out"), "seconds", and of a failed one "error".
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as file:
        # A session of its own, so that the time limit ends its children too.
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
            status = "failed" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if status != "passed":
        reason = f"after {limit} s" if status == "timed out" else f"exit status {process.returncode}"
        found["error"] = f"{reason}: {log.read_text(errors='replace').strip()[-LAST_WORDS:]}"
    return found


def run_tests(options):
    """Runs the tests with the marker gpu and returns the outcome of each."""
    report = options.out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", f"--junitxml={report}", "-p", "no:cacheprovider"]
    found = run(command, options.out / "logs" / "tests.txt", options.limit or 1800)
    found["tests"] = outcomes(report) if report.exists() else []
    ran = [one for one in found["tests"] if one["outcome"] != "skipped"]
    if options.cpu and found["status"] == "passed" and not ran:
        found |= {"status": "left out", "error": "needs a CUDA device"}
    return found


def outcomes(report):
    """Returns the tests of a JUnit file, each with "test", "outcome", "seconds" and, where there is one, "message"."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        one = {"test": f"{case.get('classname')}.{case.get('name')}", "outcome": "passed"}
        one["seconds"] = float(case.get("time", 0))
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                one |= {"outcome": child.tag.replace("failure", "failed"), "message": child.get("message", "")}
        found.append(one)
    return found


def run_bench(name, options):
    """Runs a bench and returns its outcome with the rows that it wrote."""
    bench = BENCHES[name]
    words = bench.cpu if options.cpu else bench.gpu
    if "CODEC" in words and not (options.codec and options.data):
        return {"status": "left out", "seconds": 0.0, "error": "needs --codec FOLDER and --data FOLDER", "rows": []}
    given = {"NETWORK": options.out / "network", "CODEC": options.codec, "DATA": options.data}
    if "NETWORK" in words:
        save_network(given["NETWORK"])
    words = [str(given.get(word, word)) for word in words.split()]
    file = options.out / "benches" / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(BENCH / f"{bench.script}.py"), *words, "--json", str(file)]
    found = run(command, options.out / "logs" / f"{name}.txt", options.limit or bench.limit)
    written = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if found["status"] == "passed" and not written["rows"]:
        found |= {"status": "failed", "error": "no rows were written"}
    return found | {"arguments": words, **written}


def figures(value):
    """Returns a number or a text for the table."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|")


def table(found):
    """Returns the checks as one table in Markdown: a line for each check, failed test and row of a bench."""
    devices = ", ".join(one["name"] for one in found["devices"]) or f"{found['machine']['cores']} CPU cores, no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    lines = [f"{devices}; {versions}; {found['machine']['time']}", ""]
    lines += ["| check | outcome | seconds | what | figures |", "|---|---|---|---|---|"]
    for name, check in found["checks"].items():
        tests = check.get("tests", [])
        counts = Counter(one["outcome"] for one in tests)
        told = check.get("error", "").rpartition("\n")[2] or ", ".join(f"{n} {kind}" for kind, n in counts.items())
        lines.append(f"| {name} | {check['status']} | {check['seconds']} | | {figures(told)} |")
        for one in tests:
            if one["outcome"] in ("failed", "error"):
                told = f"{one['outcome']} | {one['seconds']} | {one['test']} | {figures(one['message'])}"
                lines.append(f"| {name} | {told} |")
        for row in check.get("rows", []):
            names = {key: value for key, value in row.items() if isinstance(value, str) and len(value) <= LONGEST_NAME}
            what = ", ".join(map(figures, names.values()))
            rest = {key: value for key, value in row.items() if key not in names and value is not None}
            told = ", ".join(f"{key} {figures(value)}" for key, value in rest.items())
            lines.append(f"| {name} | | | {what} | {told} |")
    return "\n".join(lines) + "\n"


def write(found, out):
    """Writes both files; after every check, so that a machine that is taken away leaves what it has shown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(found, indent=2) + "\n")
    (out / "gpu_check.md").write_text(table(found))


def main():
    """Runs the checks and returns the exit status."""
    names = ["tests", *BENCHES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="do without a GPU, at small sizes")
    which = f"of {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=which)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--limit", type=int, metavar="SECONDS", help="time limit of each check, in place of its own")
    parser.add_argument("--codec", type=Path, help="folder of an autoencoder, for the check codec")
    parser.add_argument("--data", type=Path, help="folder of images, for the check codec")
    options = parser.parse_args()
    options.out = options.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the check under way too
    found = environment()
    if not found["devices"] and not options.cpu:
        torch, cuda = found["versions"]["torch"], found["versions"]["cuda"]
        print(
            f"gpu_check: torch {torch} (built for CUDA {cuda or 'none'}) sees no CUDA device; run this where there is "
            "one, or give --cpu for small sizes on the CPU",
            file=sys.stderr,
        )
        return 2
    found["checks"] = {}
    for name in names:
        if name in options.only:
            found["checks"][name] = run_tests(options) if name == "tests" else run_bench(name, options)
            check = found["checks"][name]
            print(f"{name:16} {check['status']:10} {check['seconds']:8.1f} s", flush=True)
            write(found, options.out)
    found["failed"] = [name for name, one in found["checks"].items() if one["status"] in ("failed", "timed out")]
    write(found, options.out)
    print(f"{options.out / 'gpu_check.json'}\n{options.out / 'gpu_check.md'}")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
