"""What tells two networks apart."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


def hash_of_weights(*modules: nn.Module | None) -> str:
    """Returns a digest of all names and values of the modules."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        for name, tensor in module.state_dict().items() if module is not None else ():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of_config(network: nn.Module) -> str:
    """Returns a digest of what weights cannot tell: number of heads, attention order, preconditioning."""
    config = dict(getattr(network, "arguments", None) or getattr(network, "config", {}))
    config["precond"] = getattr(network, "precond", None)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
