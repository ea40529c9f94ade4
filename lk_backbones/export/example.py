"""A program of ten lines beside every file that runs it on a picture, with nothing of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["example"]

_IMPORTS = {
    "onnxruntime": "import onnxruntime",
    "torch.export": "import torch",
    "AOTInductor": "import torch",
}
_LOAD = {
    "onnxruntime": 'session = onnxruntime.InferenceSession(folder / "{file}")',
    "torch.export": 'program = torch.export.load(folder / "{file}").module()',
    "AOTInductor": 'program = torch._inductor.aoti_load_package(str(folder / "{file}"))',
}
_RUN = {
    "onnxruntime": 'outputs = session.run(None, {{"image": {image}}})',
    "torch.export": "outputs = [output.detach().numpy() for output in program(torch.from_numpy({image}))]",
    "AOTInductor": "outputs = [output.numpy() for output in program(torch.from_numpy({image}))]",
}
_SHOW = {
    "label_map": """labels, counts = np.unique(outputs[0][0], return_counts=True)
for label, count in zip(labels, counts):
    print(f"{about['class_names'][label]}: {count / counts.sum():.1%} of the picture")""",
    "logits_of_pixels": """scores = outputs[0][0]
label_map = scores.argmax(axis=0) if len(scores) > 1 else (scores[0] > 0).astype(int)
labels, counts = np.unique(label_map, return_counts=True)
for label, count in zip(labels, counts):
    print(f"{about['class_names'][label]}: {count / counts.sum():.1%} of the picture")""",
    "scores": """for label in outputs[0][0].argsort()[::-1][:5]:
    print(f"{about['class_names'][label]}: {outputs[0][0][label]:.3f}")""",
    "others": """for name, output in zip(about["outputs"], outputs):
    print(name, output.shape)""",
}


def example(file: str, script: str, runtime: str, metadata: Mapping[str, Any]) -> str:
    """Write the program.

    Args:
        file: Name of the file that it runs, in the same folder.
        script: Its own name.
        runtime: What runs it, as `Format.runtime` says.
        metadata: What is written about the file.
    """
    picture = 'Image.open(sys.argv[1]).convert("RGB")'
    if metadata["preprocessing"]:
        prepare = f"image = np.array({picture})[None]  # (1, height, width, 3), 8 bits"
        image = "image"
    else:
        height, width = metadata["input_size"]
        prepare = (
            f"picture = {picture}.resize(({width}, {height}))\n"
            'image = (np.asarray(picture, dtype=np.float32) / 255 - about["mean"]) / about["std"]'
        )
        image = "image.transpose(2, 0, 1)[None].astype(np.float32)"
    kinds = {"segmentation": "logits_of_pixels", "classification": "scores"}
    show = "label_map" if metadata["outputs"] == ["label_map"] else kinds.get(metadata["kind"], "others")
    lines = [
        f'"""Run {file} on a picture: python {script} PICTURE"""',
        "",
        "import json",
        "import sys",
        "from pathlib import Path",
        "",
        "import numpy as np",
        _IMPORTS[runtime],
        "from PIL import Image",
        "",
        "folder = Path(__file__).parent",
        'about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))',
        _LOAD[runtime].format(file=file),
        prepare,
        _RUN[runtime].format(image=image if runtime == "onnxruntime" else f"np.ascontiguousarray({image})"),
        _SHOW[show],
    ]
    return "\n".join([*lines, ""])
