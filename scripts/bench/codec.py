"""What an autoencoder loses: PSNR of images that were encoded and decoded.

    python scripts/bench/codec.py --codec FOLDER --data FOLDER_OF_IMAGES [--size 256] [--limit 1000] [--json FILE]

Images are centre-cropped to a square, resized to --size by Lanczos' filter (a softer one leaves less detail and gives
more dB: bicubic 0.8, bilinear 2.2), encoded to the mode of their posterior and decoded. PSNR is over all pixels and
channels of an image in [0, 1]; the line gives its mean, least and greatest over the images.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from timing import write_json
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from diffrep.backbones.folders import load_codec

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def centre_crop(file, size):
    """Returns the largest central square of an image at (3, size, size) in [0, 1]."""
    image = Image.open(file).convert("RGB")
    square = F.center_crop(image, min(image.size))
    return F.to_tensor(F.resize(square, size, interpolation=InterpolationMode.LANCZOS))


def psnr(images, decoded):
    """Returns the PSNR of each image in dB: -10 log10 of the mean squared error at a peak of 1."""
    return -10 * (images - decoded).square().flatten(1).mean(1).log10()


@torch.no_grad()
def main():
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, required=True, help="folder of an autoencoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched through")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--limit", type=int, default=1000, help="first so many files by name")
    parser.add_argument("--json", metavar="FILE", help="also write the row there")
    options = parser.parse_args()
    codec = load_codec(options.codec, torch.device("cpu"), torch.float32)
    codec.module().eval()
    files = sorted(file for file in options.data.rglob("*") if file.suffix.lower() in ENDINGS)[: options.limit]
    if not files:
        parser.error(f"no images ({', '.join(ENDINGS)}) in {options.data}")
    values = []
    for file in files:
        images = centre_crop(file, options.size)[None]
        values.append(psnr(images, codec.decode(codec.encode(images).mean)))
    found = torch.cat(values)
    row = {"codec": codec.describe()["kind"], "images": len(files), "size": options.size}
    row |= {"psnr": found.mean().item(), "least": found.min().item(), "greatest": found.max().item()}
    print(
        f"{row['codec']}, {len(files)} images of {options.size} px: PSNR {row['psnr']:.2f} dB "
        f"(least {row['least']:.2f}, greatest {row['greatest']:.2f})"
    )
    write_json(options.json, "codec", [row])


if __name__ == "__main__":
    main()
