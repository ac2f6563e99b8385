"""What extraction costs beside the least possible work and beside the usual script.

    python scripts/bench/extract.py [--source fashion-unet] [--images 48] [--rounds 7] [--json FILE]

Runs everything in turn within each round and prints medians, so that a busy machine disturbs all alike. "The usual
script" encodes the image again for every layer, timestep and draw, runs the whole network and keeps one hook's
output. With --latent the table is made for a tiny latent-diffusion pipeline with random weights, whose encoder
counts too.
"""

import argparse
import tempfile

import torch
from timing import median_times, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import FeatureRequest, load_backbone
from diffrep.extract import Extractor
from diffrep.noise import mix, sample_noise

BATCH = 48


def usual_script(backbone, images, ids, layers, times, draws, cond):
    """One layer and one timestep at a time: encode, noise, full forward, one hook, mean over draws."""
    results = {}
    for layer in layers:
        kept = []
        hook = backbone.network.get_submodule(layer).register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for t in times:
            level = backbone.schedule.level(t)
            total = 0
            for draw in range(draws):
                with torch.no_grad():
                    latents = backbone.codec.encode(images.to(backbone.device)).mean
                    noise = torch.stack([sample_noise(latents.shape[1:], 0, i, level.key, draw) for i in ids])
                    rows = torch.full((len(ids),), 1.0, device=latents.device)
                    x = mix(latents, noise.to(latents.device), rows * level.signal, rows * level.noise)
                    backbone.denoise(x, t, cond)
                total = total + kept.pop().mean((2, 3))
            results[layer, level.key] = (total / draws).cpu()
        hook.remove()
    return results


def bare_loop(backbone, inputs, layer, cond):
    """The truncated network on ready inputs: no encoding, noise, pooling or copies. The floor of any extraction."""
    for x, t in inputs:
        backbone.capture(x, t, [layer], cond)


def ready_inputs(backbone, images, ids, times, draws):
    """The noised inputs of all (image, level, draw) rows, cut into batches as the extractor cuts them."""
    with torch.no_grad():
        latents = backbone.codec.encode(images.to(backbone.device)).mean.cpu()
    rows = [
        (latents[i], backbone.schedule.level(t), sample_noise(latents.shape[1:], 0, ids[i], f"t={t}", d))
        for i in range(len(ids))
        for t in times
        for d in range(draws)
    ]
    batches = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        signal, noise = (torch.tensor([getattr(level, name) for _, level, _ in part]) for name in ("signal", "noise"))
        x = mix(torch.stack([r[0] for r in part]), torch.stack([r[2] for r in part]), signal, noise)
        time = torch.tensor([level.time for _, level, _ in part])
        batches.append((x.to(backbone.device), time.to(backbone.device)))
    return batches


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="fashion-unet")
    parser.add_argument("--latent", action="store_true")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.latent:
            from diffrep.testing import save_tiny

            options.source = str(save_tiny("unet2d-condition", folder))
        backbone = load_backbone(options.source, dtype="float32")
    cond = torch.zeros(77, backbone.conditioner.shapes["prompt_embeds"][-1]) if options.latent else None
    size = backbone.image_size
    images = torch.rand(options.images, backbone.image_channels, size, size)
    ids = [str(i) for i in range(options.images)]
    blocks = backbone.blocks()
    middle = blocks[len(blocks) // 2]
    spread = [blocks[i] for i in (1, len(blocks) // 2 - 1, len(blocks) // 2, len(blocks) // 2 + 1)]
    cases = {
        "1 layer, 1 timestep, 8 draws": ([middle], [100], 8),
        "4 layers, 4 timesteps, 1 draw": (spread, [10, 50, 100, 200], 1),
    }
    print(
        f"{options.source}, {options.images} images, {backbone.device}, {torch.get_num_threads()} threads, "
        f"medians of {options.rounds}"
    )
    print(f"{'case':32} {'FLOPs / least':>14} {'time / bare loop':>17} {'usual script / diffrep':>23}")
    rows = []
    for name, (layers, times, draws) in cases.items():
        request = FeatureRequest(layers, times, draws=draws, pool="mean", dtype="float32")
        extractor = Extractor(backbone, request, BATCH)
        least = extractor.plan(size, size, backbone.condition(cond, 1)).flops * options.images
        # The counter does not know the fused attention of the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            found = extractor(images, ids, cond)
        for key, expected in usual_script(backbone, images, ids, layers, times, draws, cond).items():
            # TF32 rounds to three digits, in other ways for other sizes of batches.
            near = 1e-4 if backbone.device.type == "cpu" else 2e-2
            torch.testing.assert_close(found[key], expected, atol=near, rtol=near)
        inputs = ready_inputs(backbone, images, ids, times, draws)
        deepest = max(layers, key=blocks.index)
        calls = {
            "ours": lambda e=extractor: e(images, ids, cond),
            "bare": lambda i=inputs, d=deepest: bare_loop(backbone, i, d, cond),
            "usual": lambda a=(layers, times, draws): usual_script(backbone, images, ids, *a, cond),
        }
        seconds = median_times(options.rounds, calls)
        flops = counter.get_total_flops() / least
        bare, usual = seconds["ours"] / seconds["bare"], seconds["usual"] / seconds["ours"]
        print(f"{name:32} {flops:14.3f} {bare:17.3f} {usual:22.1f}x")
        rows.append({"case": name, "flops": flops, "bare": bare, "usual": usual, "seconds": seconds["ours"]})
    write_json(options.json, "extract", rows)


if __name__ == "__main__":
    main()
