"""The model card: what a stranger needs to know before using the weights."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lk_backbones._printing import printable
from lk_backbones.encoders._registry import list_encoders
from lk_backbones.weights.catalogue import PublishedWeights

__all__ = ["CardFacts", "write_card"]

_METRIC_NAMES = {
    "top1": "ImageNet-1K top-1 accuracy",
    "mean_iou": "mean IoU, single-scale",
    "mean_iou_multi_scale": "mean IoU, multi-scale and flip",
    "box_ap": "COCO box AP",
    "mask_ap": "COCO mask AP",
}
_MISSING = "Not stated by the publisher."


@dataclass
class CardFacts:
    """What a card is written from; every field is plain data."""

    kind: str
    name: str
    mean: list[float]
    std: list[float]
    encoder: str = ""
    repo_id: str = ""
    parameters: int = 0
    num_classes: int = 0
    input_size: list[int] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    task_class: str | None = None
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    new_tensors: list[str] = field(default_factory=list)
    published: PublishedWeights | None = None
    claimed: PublishedWeights | None = None
    origin: str | None = None
    origin_sha256: str | None = None
    license: str | None = None
    data: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    noted_metrics: dict[str, float] = field(default_factory=dict)
    command: str | None = None
    description: str | None = None


def write_card(facts: CardFacts, file: Path) -> None:
    """Write ``README.md``.

    Args:
        facts: What it says.
        file: Where to.
    """
    sections = [
        f"---\n{_front_matter(facts).to_yaml()}\n---",
        f"# {facts.repo_id.rpartition('/')[2]}",
        _what_it_is(facts),
        "## Use",
        _usage(facts),
        "## Input",
        _input(facts),
        "## Training data",
        f"{facts.data}." if facts.data else _MISSING,
        "## Results",
        _results(facts),
        "## Where it comes from",
        _provenance(facts),
        "## Licence",
        _licence(facts),
    ]
    if facts.published is not None:
        sections += ["## Citation", _citation(facts.published)]
    file.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(facts: CardFacts) -> ModelCardData:
    encoder = facts.kind == "encoder"
    pipeline = "image-segmentation"
    if encoder:
        pipeline = "image-classification" if facts.num_classes else "image-feature-extraction"
    elif facts.task_class not in (None, "SegmentationTask"):
        pipeline = "object-detection"
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type="custom",
            dataset_name=facts.data or "validation data",
            metric_type=printable(key),
            metric_value=round(value, 4),
        )
        for key, value in (facts.noted_metrics | facts.metrics).items()
    ]
    return ModelCardData(
        license=facts.license,
        library_name="timm" if encoder else "segmentation-models-pytorch" if facts.kind != "task" else "lk_backbones",
        tags=["lk_backbones"]
        + (["large-kernel"] if _is_large_kernel(facts) else [])
        + (["timm"] if encoder else ["segmentation-models-pytorch"]),
        pipeline_tag=pipeline,
        model_name=facts.repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        ignore_metadata_errors=True,
    )


def _what_it_is(facts: CardFacts) -> str:
    lines = [facts.description] if facts.description else []
    kind = {"encoder": "encoder", "segmentation_model": "segmentation model", "task": "model"}[facts.kind]
    classes = f", {facts.num_classes} classes" if facts.num_classes else ", without a classifier"
    large = "large-kernel " if _is_large_kernel(facts) else ""
    lines.append(f"`{facts.name}`: a {large}{kind} of {facts.parameters / 1e6:.1f} M parameters{classes}.")
    if facts.published is not None:
        lines.append(f"The weights are those published as *{facts.published.paper}*, converted, not retrained.")
    if facts.arguments:
        given = ", ".join(_code(f"{key}={value}") for key, value in facts.arguments.items())
        lines.append(f"Built with {given}.")
    if facts.new_tensors:
        lines.append(
            f"{', '.join(map(_code, facts.new_tensors))}: new, not trained. It is the norm in front of a classifier, "
            f"which the encoder of a dense model does not have."
        )
    if facts.class_names:
        lines.append(f"Classes, in order: {', '.join(map(_inline, facts.class_names))}.")
    return "\n\n".join(lines)


def _usage(facts: CardFacts) -> str:
    repo = facts.repo_id
    install = (
        "With the Python package `lk_backbones` installed; importing it makes the architecture known to timm and smp."
    )
    if facts.kind == "encoder":
        architecture = facts.name.partition(".")[0]
        own_name = (
            ""
            if facts.arguments
            else (
                "\n# or as an encoder of segmentation-models-pytorch\n"
                f'model = smp.Unet("{architecture}", encoder_weights="hf-hub:{repo}", classes=2)\n'
            )
        )
        code = (
            "import segmentation_models_pytorch as smp\nimport timm\nfrom lk_backbones import hub\n\n"
            f'model = timm.create_model("hf-hub:{repo}", pretrained=True)\n{own_name}\n'
            "# or in any model that contains such an encoder; prints what was loaded\n"
            f'print(hub.load_weights(model, "hf-hub:{repo}"))'
        )
    elif facts.kind == "segmentation_model":
        task = (
            ""
            if facts.task_class is None
            else (
                "\n\n# or with everything that training and evaluation need\n"
                f'task = hub.load_model("hf-hub:{repo}")\n'
                "label_map = task(image).argmax(1)  # image (N, 3, H, W) in [0, 1], of any size"
            )
        )
        code = (
            "import segmentation_models_pytorch as smp\nfrom lk_backbones import hub\n\n"
            f'model = smp.from_pretrained("{repo}").eval(){task}'
        )
    else:
        code = f'from lk_backbones import hub\n\ntask = hub.load_model("hf-hub:{repo}")'
    return f"{install}\n\n```python\n{code}\n```"


def _is_large_kernel(facts: CardFacts) -> bool:
    return facts.encoder.removeprefix("tu-").partition(".")[0] in list_encoders()


def _input(facts: CardFacts) -> str:
    whose = "The weights' own" if facts.published is not None else "The architecture's usual"
    size = (
        f" {whose} size is {facts.input_size[1]}×{facts.input_size[2]} pixels; others work." if facts.input_size else ""
    )
    who = " The task normalises by itself." if facts.task_class else ""
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (facts.mean, facts.std))
    return f"RGB in [0, 1], normalised by mean ({mean}) and standard deviation ({std}).{who}{size}"


def _results(facts: CardFacts) -> str:
    parts = []
    how = f"Measured with {_code(facts.command)}:" if facts.command else "As stated by the publisher:"
    for where, metrics in (("Noted in the training checkpoint:", facts.noted_metrics), (how, facts.metrics)):
        if metrics:
            rows = "\n".join(f"| {_inline(key)} | {value:.4f} |" for key, value in metrics.items())
            parts.append(f"{where}\n\n| metric | value |\n|---|---|\n{rows}")
    if facts.published is not None and facts.published.metrics:
        rows = "\n".join(f"| {_METRIC_NAMES.get(k, k)} | {v:.1f} |" for k, v in facts.published.metrics.items())
        parts.append(
            f"As reported by the [authors]({facts.published.page}), not measured again for this repository:\n\n"
            f"| metric | % |\n|---|---|\n{rows}"
        )
    return "\n\n".join(parts) or _MISSING


def _provenance(facts: CardFacts) -> str:
    lines = []
    if facts.published is not None:
        lines.append(f"Published by the authors as `{facts.published.name}`: {facts.published.page}.")
    if facts.origin is not None:
        lines.append(f"Converted from {_code(facts.origin)}, SHA-256 `{facts.origin_sha256}`.")
    if facts.claimed is not None:
        known = facts.claimed.sha256
        why = (
            f"the file that it knows has a SHA-256 that begins with {known}, this one has another"
            if known
            else "it holds no checksum of those weights"
        )
        lines.append(
            f"Its publisher calls the file `{facts.claimed.name}`, but the catalogue of lk_backbones cannot confirm "
            f"that: {why}. No accuracy, data or licence of those weights is claimed here. They were published at "
            f"{facts.claimed.page}."
        )
    started = facts.hyper_parameters.get("encoder_weights")
    if started:
        lines.append(f"The encoder started from {_code(started)}.")
    lines.append("Written with lk_backbones.")
    return "\n".join(lines)


def _licence(facts: CardFacts) -> str:
    weights = f"The weights: {facts.license}." if facts.license else "The weights: not stated by the publisher."
    note = ""
    if facts.published is not None and "MegData73M" in facts.published.data:
        note = " MegData73M, on which they were trained, is not public."
    return f"{weights}{note} The code that loads them, lk_backbones: MIT."


def _inline(text: object) -> str:
    """Text from outside, such as the name of a class, without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", printable(text))


def _code(text: object) -> str:
    return f"`{printable(text).replace('`', chr(39))}`"


def _citation(published: PublishedWeights) -> str:
    key = published.authors.partition(",")[0].lower() + str(published.year) + published.family.lower()
    return (
        f"```bibtex\n@article{{{key},\n  title={{{published.paper}}},\n  author={{{published.authors}}},\n"
        f"  journal={{arXiv preprint arXiv:{published.arxiv}}},\n  year={{{published.year}}}\n}}\n```"
    )
