"""What a whole extraction job costs beside its network, on one process and on two, and whether its memory grows.

    python scripts/bench/job.py [--source fashion-unet] [--images 2000] [--rounds 5] [--json FILE]
    python scripts/bench/job.py --memory [--images 20000]

"bare loop" is the truncated network on ready, noised inputs; "extractor" adds noise, pooling and the copy to the
CPU; "job" is all of `diffrep extract`: claims, decoding, writing with checksum and fsync, index. All run in turn
within each round, in processes of one thread that are forked from one that has imported everything, and medians are
printed. On a GPU everything runs in this process, since CUDA does not survive a fork, and there is no row of two. With
--memory a job over all images and one over a tenth of them run in processes of their own; the table shows the most
memory that each has held.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timing
import torch

from diffrep import ExtractConfig, ExtractJob, load_backbone
from diffrep.extract.feed import ImageFeed
from diffrep.noise import mix, sample_noise

LEVEL = 100


def save_images(folder, count, channels, size):
    """Writes random images as one array and returns the file."""
    shape = (count, size, size) if channels == 1 else (count, size, size, channels)
    file = Path(folder, "images.npz")
    np.savez(file, all_images=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return file


def config_of(options, data, out, **more):
    """Returns the job's config."""
    request = {"layers": [options.layer], "levels": [LEVEL], "pool": "mean"}
    given = {"backbone": options.source, "data": str(data), "out": str(out), "request": request}
    sizes = {"batch_size": options.batch, "unit_size": options.unit, "workers": options.workers}
    return ExtractConfig(**given | sizes | more)


def forked(work):
    """Runs a function in a fork and returns the seconds it took there and the bytes it has held at most."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(write, f"{seconds} {peak}".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    text = os.read(read, 1000).decode()
    os.close(read)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the job failed")
    seconds, peak = text.split()
    return float(seconds), int(peak)


def here(work):
    """Runs a function in this process and returns the seconds it took, the GPU's work included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def together(works):
    """Runs functions in forks at the same time and returns the seconds until the last one is through."""
    pids, began = [], time.perf_counter()
    for rank, work in enumerate(works):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(works)), "LOCAL_RANK": str(rank)}
                work()
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    if any([os.waitpid(pid, 0)[1] for pid in pids]):
        raise RuntimeError("a job failed")
    return time.perf_counter() - began


def run_quietly(job):
    """Runs a job without its live line."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        job.run()


def speed(options, folder):
    """Prints and returns the rows of the table of times."""
    backbone = load_backbone(options.source)
    data = save_images(folder, options.images, backbone.image_channels, backbone.image_size)
    sample = ExtractJob(config_of(options, data, Path(folder, "never")), backbone)
    batches = [b for _, b in ImageFeed(sample.images, options.batch)(sample.units) if b is not None]
    level = backbone.schedule.level(LEVEL)
    inputs = []
    for batch in batches:
        clean = backbone.codec.encode(batch.images.to(backbone.device)).mean
        noise = torch.stack([sample_noise(clean.shape[1:], 0, one, level.key, 0) for one in batch.ids])
        noise = noise.to(clean.device)
        rows = torch.ones(len(clean), device=clean.device)
        inputs.append((mix(clean, noise, rows * level.signal, rows * level.noise), rows.to(torch.int64) * LEVEL))

    def bare():
        for x, t in inputs:
            backbone.capture(x, t, [options.layer])

    def extractor():
        for batch in batches:
            sample.extractor(batch.images, ids=batch.ids)

    number = iter(range(10**6))

    def job():
        out = Path(folder, str(next(number)))
        return lambda: run_quietly(ExtractJob(config_of(options, data, out), backbone))

    ways = {
        "bare loop": lambda: forked(bare)[0],
        "extractor": lambda: forked(extractor)[0],
        "job": lambda: together([job()]),
        "job, 2 processes": lambda: together([job()] * 2),
    }
    if backbone.device.type == "cuda":
        ways = {"bare loop": lambda: here(bare), "extractor": lambda: here(extractor), "job": lambda: here(job())}
        here(bare)  # kernels are loaded and chosen
    seconds = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    where = f"{backbone.device}, one thread a process, {os.cpu_count()} cores"
    print(f"{options.source}, {options.layer}, {options.images:,} images, {where}")
    print(f"{'':18} {'seconds':>8} {'images/s':>9} {'/ bare loop':>12} {'/ extractor':>12} {'/ job':>7}")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, value in middle.items():
        ratios = [value / middle[other] for other in ("bare loop", "extractor", "job")]
        rows.append(
            {"what": name, "seconds": value, "images_per_second": options.images / value, "of_bare": ratios[0]}
        )
        print(f"{name:18} {value:8.2f} {options.images / value:9.1f}" + "".join(f"{r:12.3f}" for r in ratios))
    if "job, 2 processes" in middle:
        print(f"two processes do {middle['job'] / middle['job, 2 processes']:.2f} times the images of one")
    return rows


def memory(options, folder):
    """Prints and returns the rows of the table of memory."""
    rows = []
    for count in (options.images // 10, options.images):

        def run(count=count):
            backbone = load_backbone(options.source)
            data = save_images(folder, options.images, backbone.image_channels, backbone.image_size)
            config = config_of(options, data, Path(folder, f"of-{count}"))
            config = config.model_copy(update={"data": config.data.model_copy(update={"limit": count})})
            run_quietly(ExtractJob(config, backbone))

        seconds, peak = forked(run)
        rows.append({"images": count, "seconds": seconds, "peak_bytes": peak})
        print(f"{count:8,} images: {peak / 1e6:8.1f} MB at most, {seconds:.0f} s", flush=True)
    print(f"{rows[1]['peak_bytes'] / rows[0]['peak_bytes']:.3f} of the memory for ten times the images")
    return rows


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="fashion-unet")
    parser.add_argument("--layer", default="mid_block")
    parser.add_argument("--images", type=int)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--unit", type=int, default=250)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    options.images = options.images or (20000 if options.memory else 2000)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = (memory if options.memory else speed)(options, folder)
    if options.json:
        timing.write_json(options.json, "job memory" if options.memory else "job", rows)


if __name__ == "__main__":
    main()
