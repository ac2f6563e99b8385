"""The model card of a head: what it reads, how it is applied, what it reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

if TYPE_CHECKING:
    from diffrep.heads.head import Head

TASK = "image-classification"
REQUEST = ("layers", "levels", "draws", "pool", "noise", "posterior", "tokens", "seed", "dtype")
READS = "It reads features of a frozen diffusion model, extracted with diffrep"
SITS = "It sits on a frozen diffusion model, which diffrep loads and which is no part of these files"


def model_card(head: Head, source: str) -> ModelCard:
    """Writes the card of a head from its facts.

    Args:
        head: Head with `about`.
        source: Folder or hub id that the card says to load.
    """
    kind = type(head).__name__
    data = ModelCardData(
        library_name="diffrep",
        tags=["diffrep", "diffusion-features", kind],
        pipeline_tag=TASK,
        metrics=["accuracy"],
        model_name=kind,
        eval_results=_results(head.about),
    )
    text = f"""---
{data.to_yaml()}
---

# {kind}

{(type(head).__doc__ or "A head.").splitlines()[0]}
{SITS if head.live else READS}; {sum(parameter.numel() for parameter in head.parameters()):,} parameters.

{_table(head.about)}

## Use

```python
{_snippet(head, source)}
```
"""
    return ModelCard(text)


def _results(about: dict[str, Any]) -> list[EvalResult] | None:
    if not {"dataset", "accuracy"} <= about.keys():
        return None
    dataset = str(about["dataset"])
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_value=about["accuracy"],
        )
    ]


def _table(about: dict[str, Any]) -> str:
    def written(value: Any) -> str:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"| {name.replace('_', ' ')} | {written(value)} |" for name, value in about.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _snippet(head: Head, source: str) -> str:
    about = head.about
    opening = [f"head = load_head({source!r})"]
    names = ["load_head"]
    if not {"backbone", "layers", "levels"} <= about.keys():
        if head.live:
            body = ["network = head.attach(backbone)  # the backbone that it was trained on"]
        else:
            body = [f"{head.gives} = {head.applied.format(features='features')}"]
        return "\n".join([f"from diffrep.heads import {', '.join(names)}", "", *opening, *body])
    options = "".join(f", {name}={value!r}" for name, value in about.get("backbone_options", {}).items())
    opening += [
        f"backbone = diffrep.load_backbone({about['backbone']!r}{options})",
        f"side = {about.get('image_size') or 'backbone.image_size'}",
        "images = torch.rand(2, backbone.image_channels, side, side)  # yours, in [0, 1]",
    ]
    imports, cond = [], ""
    if about.get("cond") is not None:
        imports, cond = ["from diffrep.extract.job import read_cond"], f"read_cond({about['cond']!r})"
    if head.live:
        imports.append("from diffrep.heads.feedback import noised_inputs")
        body = _on_images(about, cond)
    else:
        body = _on_features(head, cond)
        if about.get("read_pool") is not None:
            names.append("pool_features")
    if "class_names" in about:
        body.append('print([head.about["class_names"][index] for index in scores.argmax(1)])')
    imports = sorted([*imports, f"from diffrep.heads import {', '.join(names)}"])
    return "\n".join(["import torch", "", "import diffrep", *imports, "", *opening, *body])


def _on_features(head: Head, cond: str) -> list[str]:
    """Lines that end in what a head gives for features that a probe read as `Reading` does."""
    about = head.about
    asked = ", ".join(f"{name}={about[name]!r}" for name in REQUEST if name in about)
    pairs = [(layer, level) for layer in about["layers"] for level in about["levels"]]
    lines = [
        f"request = diffrep.FeatureRequest({asked})",
        f"features = backbone.extract(images, request{', cond=' + cond if cond else ''})",
    ]
    if about.get("read_pool") is not None:
        lines.append(f"features = {{key: pool_features(features[key], {about['read_pool']}) for key in {pairs!r}}}")
    if head.reads_mapping:
        read = "features"
    elif len(pairs) == 1:
        read = f"features[{pairs[0][0]!r}, {pairs[0][1]!r}]"
    else:
        read = f"torch.cat([features[key].flatten(1) for key in {pairs!r}], dim=1)"
    return [*lines, f"{head.gives} = {head.applied.format(features=read)}"]


def _on_images(about: dict[str, Any], cond: str) -> list[str]:
    """Lines that end in the scores of a head that runs the network itself."""
    asked = "".join(f", {name}={about[name]!r}" for name in ("seed", "noise") if name in about)
    return [
        "network = head.attach(backbone)",
        f"inputs = noised_inputs(backbone, images, {about['levels']!r}{asked})",
        "with torch.no_grad():",
        f"    scores = network(inputs{', ' + cond if cond else ''})",
    ]
