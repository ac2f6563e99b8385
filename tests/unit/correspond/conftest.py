import json

import numpy as np
import pytest
from PIL import Image

SIZES = [(20, 28), (24, 16), (32, 32), (17, 23)]  # (W, H)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A set of pairs: four images of other sizes, seven pairs, keys with a left and a right, two categories."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (4, 4), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    pairs = []
    for source, target in ((0, 1), (1, 0), (2, 0), (0, 3), (3, 2), (1, 3), (2, 1)):
        points = [rng.integers(0, SIZES[one], (3, 2)).tolist() for one in (source, target)]
        pairs.append(
            {
                "source_path": f"{source}.png",
                "target_path": f"{target}.png",
                "source_points": points[0],
                "target_points": points[1],
                "keys": ["left", "right", "nose"],
                "category": "cat" if source < 2 else "dog",
                "source_bounding_box": [0, 0, *SIZES[source]],
                "target_bounding_box": [0, 0, *SIZES[target]],
            }
        )
    mirrored = {name: {"left": "right", "right": "left"} for name in ("cat", "dog")}
    (folder / "pairs.json").write_text(json.dumps({"name": "photos", "pairs": pairs, "mirrored": mirrored}))
    return folder
