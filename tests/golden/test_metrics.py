"""Uniformity against DDAE's own numbers."""

import json

import numpy as np
import torch

from diffrep.metrics import uniformity


def test_uniformity(golden):
    x = torch.from_numpy(np.load(golden / "metrics" / "matrices.npz")["clustered_200x16"])
    expected = json.loads((golden / "metrics" / "expected.json").read_text())["ddae_align_uniform"]["uniformity_t2_X"]
    for rows in (x, x.float()):
        assert abs(uniformity(rows, t=2) - expected) < 1e-6
