"""The 1x1 layer as a drop-in for nn.Conv2d."""

import io

import pytest
import torch
import torch.nn as nn

from lk_backbones.layers import ConvNorm, InputConvNorm, PointwiseConv2d


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"stride": 2}, {"padding": 1}, {"padding": "same"}, {"groups": 2}],
    ids=str,
)
def test_same_as_conv2d(options):
    torch.manual_seed(0)
    ours, theirs = PointwiseConv2d(8, 6, 1, **options), nn.Conv2d(8, 6, 1, **options)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 8, 5, 7)
    for input in (maps, maps.to(memory_format=torch.channels_last), maps[0]):
        torch.testing.assert_close(ours(input), theirs(input), rtol=1e-5, atol=1e-6)


def test_refuses_wider_kernels():
    with pytest.raises(ValueError, match=r"needs kernel_size=1, got \(3, 3\)"):
        PointwiseConv2d(8, 8, 3)


def test_script_holds_plain_convolutions():
    layer = nn.Sequential(InputConvNorm(3, 8, 3, stride=2, act_layer=nn.ReLU), ConvNorm(8, 4, 1)).eval()
    assert isinstance(layer[1].conv, PointwiseConv2d)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    maps = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(torch.jit.load(buffer)(maps), layer(maps), rtol=1e-5, atol=1e-6)
