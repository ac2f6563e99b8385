"""`diffrep correspond evaluate`: pairs of images in, PCK under named protocols out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, tqdm

from diffrep import dist
from diffrep.backbones import Backbone
from diffrep.config import write_results
from diffrep.config.correspond import CorrespondConfig
from diffrep.correspond.descriptor import Cell, Descriptor, Sides
from diffrep.correspond.pck import AVERAGES, PCK, pck
from diffrep.correspond.pictures import draw_co_pca, draw_matches
from diffrep.correspond.pose import partners_of
from diffrep.correspond.predict import Question, predict_all
from diffrep.data.correspondences import open_pairs
from diffrep.data.pairs import PairSet
from diffrep.errors import ConfigError
from diffrep.report import write_report
from diffrep.report.matches import MATCHES

FEATURES = "features"


def run_evaluate(config: CorrespondConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Judges descriptors on pairs of images; writes `results.json`, `report.html` and the predicted points.

    Each image is read once by each descriptor, whatever the number of pairs, into `out/features`; a run that was
    stopped goes on from there. Processes share images and pairs; only the main process writes.

    Args:
        config: What is judged, on which pairs, and by which rules.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json; `metrics["correspondence"]["scores"]` has one entry for each descriptor
        and protocol.

    Raises:
        DataError: There are no pairs, an image is missing, or a pair lacks what a protocol measures by.
        ConfigError: The parts of the config do not go together.
    """
    dist.state()
    pairs, out = open_pairs(config.pairs), Path(config.out)
    evaluation, descriptors = Evaluation(config, pairs), config.descriptors
    options = {"data": config.pairs.path, "unit_size": config.unit_size, "workers": config.workers}
    for name, one in descriptors.items():
        # What cannot work is told before any work is done.
        light = one.backbone.model_copy(update={"device": "meta", "attention": "auto"})
        Descriptor(name, one.model_copy(update={"backbone": light}), pairs, out, **options).cells  # noqa: B018
    for name, one in descriptors.items():
        loaded = backbone if one.backbone == config.backbone else None
        evaluation.judge(Descriptor(name, one, pairs, out / FEATURES, **options, backbone=loaded))
    return evaluation.finish(out) if dist.state().is_main_process else {}


class Evaluation:
    """Descriptors judged one after another on the same pairs.

    Args:
        config: Protocols, alphas, seed and pictures.
        pairs: The pairs.

    Attributes:
        scores: (descriptor, cell, PCK) in the order of judgement, the protocols of a cell in the config's order.
    """

    def __init__(self, config: CorrespondConfig, pairs: PairSet):
        self.config, self.pairs = config, pairs
        self.scores: list[tuple[Descriptor, Cell, PCK]] = []
        self.predictions: dict[tuple[str, str], list[np.ndarray]] = {}

    def judge(self, descriptor: Descriptor) -> None:
        """Predicts and scores every cell of a descriptor under every protocol."""
        sizes = [frame.original for frame in descriptor.frames]
        for cell in descriptor.cells:
            for protocol in self.config.protocols:
                found = predict_pairs(descriptor.sides(cell, protocol), self.pairs, cell.name)
                self.predictions[cell.name, protocol.name] = found
                scored = pck(found, self.pairs, protocol, self.config.alphas, sizes, self.config.seed)
                self.scores.append((descriptor, cell, scored))

    def finish(self, out: Path) -> dict[str, Any]:
        """Writes results, pictures and report, and returns the metrics."""
        metrics = self._metrics()
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            out / "predictions.npz",
            counts=[len(pair.source_points) for pair in self.pairs.pairs],
            **{f"{cell}|{protocol}": np.concatenate(found) for (cell, protocol), found in self.predictions.items()},
        )
        metrics["correspondence"]["pictures"], drawn = self._pictures()
        np.savez_compressed(out / MATCHES, **drawn)
        write_results(out, self.config, self.config.seed, metrics)
        write_report(out)
        return metrics

    def _metrics(self) -> dict[str, Any]:
        first = self.config.protocols[0]
        scores = []
        for descriptor, cell, one in self.scores:
            plain = one.to_plain()
            plain["categories"] = {
                name: values["per_image"][str(one.alphas[0])] for name, values in plain["categories"].items() if name
            }
            where = {
                "name": cell.name,
                "read": ["@".join(part) for part in cell.parts],
                "flops": descriptor.plan().flops,
            }
            scores.append(where | plain | {"own": one.protocol.average})
        dropped = ", ".join(f"{count} {what}" for what, count in self.pairs.dropped.items() if count)
        return {
            "title": f"{next(iter(self.config.descriptors))} on {self.pairs.name}",
            "correspondence": {"protocol": first.name, "alphas": list(self.config.alphas), "scores": scores},
            "images": len(self.pairs.images),
            "notes": [f"{one.name}: {one.text()}" for one in self.config.protocols]
            + ([f"Left out by the reader: {dropped}."] if dropped else []),
        }

    def _pictures(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Draws some pairs as the best cell under the first protocol matched them."""
        first = self.config.protocols[0]
        alpha = self.config.alphas[0]
        own = [entry for entry in self.scores if entry[2].protocol == first]
        descriptor, cell, best = max(own, key=lambda entry: entry[2].headline[alpha].value)
        able = [number for number, pair in enumerate(self.pairs.pairs) if len(pair.source_points)]
        count = min(self.config.pictures, len(able))
        chosen = np.random.default_rng(self.config.seed).choice(able, count, replace=False)
        right, listed, drawn = best.right(alpha), [], {}
        for number, which in enumerate(sorted(chosen.tolist())):
            pair = self.pairs.pairs[which]
            source, target = (self.pairs.images[one] for one in (pair.source, pair.target))
            found = self.predictions[cell.name, first.name][which]
            drawn[f"match.{number}"] = draw_matches(
                source.read(), target.read(), pair.source_points, found, right[which], pair.target_points
            )
            maps = tuple(descriptor.map(cell, one) for one in (pair.source, pair.target))
            frames = tuple(descriptor.frames[one] for one in (pair.source, pair.target))
            drawn[f"pca.{number}"] = draw_co_pca(maps, frames)
            title = f"{source.id} → {target.id}"
            listed.append({"title": title, "of": cell.name, "pck": float(right[which].mean())})
        return listed, drawn


@torch.no_grad()
def predict_pairs(sides: Sides, pairs: PairSet, title: str | None = None) -> list[np.ndarray]:
    """Predicts the target points of all pairs, target by target, so that each target is prepared once.

    Processes share the targets, and all get all predictions.

    Args:
        sides: The images' maps.
        pairs: The pairs.
        title: Of a progress bar; None shows none.

    Returns:
        (K, 2) fp64 for each pair, as its target points are annotated.
    """
    state, posed = dist.state(), sides.protocol.pose != "none"
    if posed and not pairs.mirrored:
        raise ConfigError(
            f"the protocol {sides.protocol.name!r} aligns poses, and {pairs.name} does not say which key points "
            "change places in a mirror; set pose=none, or give 'mirrored' in a JSON of pairs"
        )
    by_target: dict[int, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs.pairs):
        by_target[pair.target].append(number)
    mine = sorted(by_target)[state.process_index :: state.num_processes]
    found: list[tuple[int, np.ndarray]] = []
    if not sides.descriptor.live:
        for mirrored in (False, True)[: 1 + posed]:  # processes share the images, before they part for the pairs
            sides.descriptor.extract(mirrored)
    for target in tqdm(mine, desc=dist.label(f"match {title}"), unit="image", disable=title is None, leave=False):
        numbers = by_target[target]
        questions = []
        for number in numbers:
            pair = pairs.pairs[number]
            extra = (sides(pair.source, mirrored=True), partners_of(pair, pairs.mirrored)) if posed else ()
            questions.append(Question(sides(pair.source), sides(target), pair.source_points, *extra))
        found += zip(numbers, predict_all(questions), strict=True)
    found = gather_object(found) if state.num_processes > 1 else found
    return [points for _, points in sorted(found, key=lambda one: one[0])]


def table(metrics: dict[str, Any]) -> str:
    """Returns the scores as lines for a terminal, each with the name of its protocol."""
    found = metrics["correspondence"]
    alphas = [str(alpha) for alpha in found["alphas"]]
    width = max(len(one["name"]) for one in found["scores"])
    rules = max(len(one["protocol"]) for one in found["scores"])
    lines = []

    def own(one: dict[str, Any]) -> dict[str, list[float]]:
        return one[AVERAGES[one["rules"]["average"]]]

    for one in sorted(found["scores"], key=lambda one: -own(one)[alphas[0]][0]):
        cells = "  ".join(f"@{alpha} {own(one)[alpha][0]:.3f}" for alpha in alphas)
        low, high = own(one)[alphas[0]][1:]
        lines.append(
            f"{one['name']:{width}}  {one['protocol']:{rules}}  per {one['rules']['average']}  {cells}  "
            f"({low:.3f} - {high:.3f})"
        )
    return "\n".join(lines)
