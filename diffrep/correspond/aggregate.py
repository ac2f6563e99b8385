"""`diffrep correspond train`: pairs of images in, a trained aggregation network and its results out."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from diffrep import dist
from diffrep.backbones import Backbone
from diffrep.config import to_plain, to_yaml, write_results
from diffrep.config.correspond import AggregateConfig, DescriptorConfig
from diffrep.correspond.descriptor import Descriptor
from diffrep.correspond.evaluate import FEATURES
from diffrep.data.correspondences import open_pairs
from diffrep.data.pairs import PairSet
from diffrep.errors import ConfigError
from diffrep.extract.job import open_backbone
from diffrep.heads import save_head
from diffrep.heads.aggregation import AggregationNetwork
from diffrep.probe.feedback import OPTIONS
from diffrep.probe.trained import claim_run
from diffrep.probe.trained_data import CHECKPOINT
from diffrep.report import write_report
from diffrep.store.layout import write_whole

HEAD = "head"
# What may differ between a run and its resume: none of it changes a number.
FREE_KEYS = ("out", "loggers", "workers", "unit_size", "batch_size", "live", "checkpoint")


def run_aggregate(config: AggregateConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Trains an aggregation network, or goes on with the run in `config.out`.

    Writes `head/` with the weights of the epoch whose validation PCK was best, which `aggregation` of the evaluation
    and `load_head` take, `results.json`, `report.html`, checkpoints and logs. Processes share the pairs of each step
    and of each evaluation; only the main process writes.

    Args:
        config: What is trained, on which pairs.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json.

    Raises:
        ConfigError: The folder holds another run, or pairs are in both sets.
        DiffrepError: The loss is not finite.
        CheckpointError: The checkpoint cannot be read.
    """
    from diffrep.correspond.training import fit  # Lightning takes seconds to import

    state, out = dist.state(), Path(config.out)
    if config.pairs_per_step % state.num_processes:
        raise ConfigError(
            f"pairs_per_step {config.pairs_per_step} does not divide among {state.num_processes} processes"
        )
    backbone = backbone or open_backbone(config.backbone)
    sets = {"train": open_pairs(config.pairs), "val": open_pairs(config.val_pairs)}
    plain = DescriptorConfig(**{name: getattr(config, name) for name in DescriptorConfig.model_fields})
    train, val = (
        Descriptor(
            "aggregation",
            plain,
            pairs,
            out / FEATURES,
            given.path,
            config.unit_size,
            config.workers,
            config.live or (config.augment and pairs is sets["train"]),
            backbone,
        )
        for pairs, given in zip(sets.values(), (config.pairs, config.val_pairs), strict=True)
    )
    network = _network(config, train)
    _claim(out, config, sets, backbone)
    best = fit(config, network, train, val, out)
    gc.collect()  # a DDP wrapper alive at exit can abort the process
    network.load_state_dict(best["state"])
    if not state.is_main_process:
        return {}
    return _finish(out, config, network.cpu().eval(), sets, best)


def _network(config: AggregateConfig, train: Descriptor) -> AggregationNetwork:
    """Builds the network; its first weights depend on the seed alone."""
    plan = train.plan()
    flat = [name for name, shape in plan.shapes.items() if len(shape) != 3]
    if flat:
        raise ConfigError(f"an aggregation network reads maps, and {flat[0]} is {plan.shapes[flat[0]]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AggregationNetwork(
            {name: shape[0] for name, shape in plan.shapes.items()},
            list(plan.levels.levels),
            config.width,
            config.groups,
            learn_scale=config.learn_scale,
            dropout=config.dropout,
            checkpoint=config.checkpoint,
        )


def _finish(
    out: Path, config: AggregateConfig, network: AggregationNetwork, sets: dict[str, PairSet], best: dict[str, Any]
) -> dict[str, Any]:
    plain = to_plain(config.request)
    given = {name: getattr(config.backbone, name) for name in OPTIONS}
    about = {name: plain[name] for name in ("draws", "noise", "posterior", "seed", "dtype")} | {
        "backbone": config.backbone.source,
        "backbone_options": {name: value for name, value in given.items() if value is not None} or None,
        "layers": list(network.layers),
        "levels": network.levels,
        "image_size": config.size,
        "dataset": sets["train"].name,
        "trained_pairs": len(sets["train"].pairs),
        "val_pck": best["val"],
        "protocol": config.protocol.name,
        "alpha": config.alpha,
        "best_epoch": best["epoch"],
    }
    save_head(network, out / HEAD, {name: value for name, value in about.items() if value is not None})
    metrics = {
        "title": f"Aggregation network: {config.backbone.source} on {sets['train'].name}",
        "mixing": [{"name": "aggregation", **network.mixing()}],
        "val": best["val"],
        "protocol": config.protocol.name,
        "alpha": config.alpha,
        "best_epoch": best["epoch"],
        "epochs": best["epochs"],
        "pairs": {name: len(pairs.pairs) for name, pairs in sets.items()},
        "notes": [
            f"Trained on {len(sets['train'].pairs):,} pairs. The best of {best['epochs']} epochs is epoch "
            f"{best['epoch']}: PCK@{config.alpha:g} of {best['val']:.3f} on {len(sets['val'].pairs):,} validation "
            "pairs.",
            f"{config.protocol.name}: {config.protocol.text()}",
        ],
    }
    write_results(out, config, config.seed, metrics)
    write_report(out)
    return metrics


def _claim(out: Path, config: AggregateConfig, sets: dict[str, PairSet], backbone: Backbone) -> None:
    """Takes the run folder, or refuses one that holds another run."""
    plain = {name: value for name, value in to_plain(config).items() if name not in FREE_KEYS}
    plain |= {f"{name}_images": pairs.fingerprint() for name, pairs in sets.items()}
    plain["weights"] = backbone.weights_hash
    claim_run(out, plain, (out / CHECKPOINT).exists(), "network")
    if dist.state().is_main_process:
        write_whole(out / "config.yaml", to_yaml(config).encode())
