"""The model card of a head: what it reads, how it is applied, what it reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

if TYPE_CHECKING:
    from diffrep.heads.head import Head

TASK = "image-classification"
REQUEST = ("layers", "levels", "draws", "pool", "noise", "posterior", "tokens", "seed")


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

{(type(head).__doc__ or "A head.").splitlines()[0]} It reads features of a frozen diffusion model, extracted with
diffrep; {sum(parameter.numel() for parameter in head.parameters()):,} parameters.

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
    opening = ["from diffrep.heads import load_head", "", f"head = load_head({source!r})"]
    if not {"backbone", "layers", "levels"} <= about.keys():
        return "\n".join([*opening, f"scores = {head.applied.format(features='features')}"])
    asked = ", ".join(f"{name}={about[name]!r}" for name in REQUEST if name in about)
    pairs = [(layer, level) for layer in about["layers"] for level in about["levels"]]
    if head.reads_mapping:
        features = "features"
    elif len(pairs) == 1:
        features = f"features[{pairs[0][0]!r}, {pairs[0][1]!r}]"
    else:
        features = f"torch.cat([features[key].flatten(1) for key in {pairs!r}], dim=1)"
    lines = [
        "import torch",
        "",
        "import diffrep",
        *opening,
        f"backbone = diffrep.load_backbone({about['backbone']!r})",
        f"request = diffrep.FeatureRequest({asked})",
        "side = backbone.image_size",
        "images = torch.rand(2, backbone.image_channels, side, side)  # yours, in [0, 1]",
        "features = backbone.extract(images, request)",
        f"scores = {head.applied.format(features=features)}",
    ]
    if "class_names" in about:
        lines.append('print([head.about["class_names"][index] for index in scores.argmax(1)])')
    return "\n".join(lines)
