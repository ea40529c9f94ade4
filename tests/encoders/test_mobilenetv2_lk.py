"""MobileNetV2 with large kernels: what is replaced, what it costs, and that it folds."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import lk_backbones
from lk_backbones.layers.reparam import ReparamDepthwiseConv2d
from lk_backbones.tasks import SegmentationTask
from tests.conftest import assert_golden, count_parameters, randomize_norms

LAST = [3] * 6


@pytest.mark.parametrize(
    ("size", "millions"),
    # arXiv 2410.08049, Table 2d; the parameters there are those of a width of 0.75
    [(3, 2.64), (7, 2.67), (9, 2.69), (13, 2.75)],
)
def test_the_last_stage_has_the_published_parameters(size: int, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_lk_075", kernel_sizes=[*LAST, size])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_as_it_is_it_is_timms() -> None:
    ours, timms = timm.create_model("mobilenetv2_lk_050").eval(), timm.create_model("mobilenetv2_050").eval()
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(1, 3, 64, 48)
    assert torch.equal(ours(x), timms(x))
    assert ours.pretrained_cfg["architecture"] == "mobilenetv2_lk_050"  # by which a task builds it again
    assert "mobilenetv2_lk_050" not in lk_backbones.list_encoders()
    assert count_parameters("mobilenetv2_lk_100") == count_parameters("mobilenetv2_100")


@pytest.mark.parametrize("arguments", [{"small_kernel": 3}, {"shortcut": False}, {"small_kernel": 3, "dilation": 2}])
def test_large_kernels_everywhere_fold(arguments: dict[str, Any]) -> None:
    model = timm.create_model("mobilenetv2_lk_050", kernel_sizes=9, **arguments)
    model = randomize_norms(model).eval()
    depthwise = [block.conv_dw for stage in model.blocks for block in stage]
    assert len(depthwise) == 17
    assert all(isinstance(conv, ReparamDepthwiseConv2d) == ("small_kernel" in arguments) for conv in depthwise)
    skips = sum(block.has_skip for stage in model.blocks for block in stage)
    assert skips == (10 if arguments.get("shortcut", True) else 0)
    folded = lk_backbones.reparameterize(model)
    large = [m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.kernel_size for m in large] == [(9, 9)] * 17
    assert sorted({m.stride[0] for m in large}) == [1, 2]
    assert {m.dilation[0] for m in large} == {arguments.get("dilation", 1)}
    x = torch.randn(1, 3, 37, 32)
    with torch.no_grad():
        assert_golden(folded(x), model(x), 1e-5)


def test_a_dilated_encoder_keeps_its_large_kernels() -> None:
    encoder = {"encoder": "tu-mobilenetv2_lk_050", "encoder_kwargs": {"kernel_sizes": 7, "small_kernel": 3}}
    decoder = {"encoder_output_stride": 8, "decoder_channels": 16}
    task = SegmentationTask("deeplabv3plus", architecture_kwargs=decoder, num_classes=5, **encoder).eval()
    blocks = [m.branches[0].conv for m in task.modules() if isinstance(m, ReparamDepthwiseConv2d)]
    assert {conv.kernel_size for conv in blocks} == {(7, 7)}
    assert {conv.dilation[0] for conv in blocks} == {1, 2, 4}
    with torch.no_grad():
        assert task(torch.rand(1, 3, 65, 64)).shape == (1, 5, 65, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_sizes": 4}, "kernel_sizes must be odd and positive, got 4"),
        ({"kernel_sizes": [3, 13]}, "kernel_sizes must be one size or 7, got 2"),
        ({"small_kernel": 2}, "small_kernel must be odd and positive, got 2"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"pretrained": True}, "nobody published weights of mobilenetv2_lk_050"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        timm.create_model("mobilenetv2_lk_050", **arguments)
