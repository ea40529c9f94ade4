"""Fold, export, compare: what a user deploys computes what the trained encoder did, without this package."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import lk_backbones
from tests.conftest import assert_golden, randomize_norms

onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs the [export] extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs the [export] extra")


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(small_encoder: str, dynamo: bool, tmp_path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="exporting to ONNX needs the [export] extra")
    model = randomize_norms(timm.create_model(small_encoder, num_classes=5, depths=(1, 1, 2, 1))).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
    path = tmp_path / "model.onnx"
    torch.onnx.export(lk_backbones.reparameterize(model), (x,), path, dynamo=dynamo)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    folded = lk_backbones.reparameterize(model).modules()
    assert [n.op_type for n in nodes].count("Conv") == sum(isinstance(m, torch.nn.Conv2d) for m in folded)
    (output,) = onnxruntime.InferenceSession(path).run(None, {onnx.load(path).graph.input[0].name: x.numpy()})
    assert_golden(torch.from_numpy(np.asarray(output)), expected, 1e-4)
