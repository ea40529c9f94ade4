"""The op inside compiled, exported, transformed, checkpointed and distributed programs."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lk_backbones.ops import depthwise_conv2d


def plain(input, weight):
    return F.conv2d(input, weight, padding="same", groups=weight.shape[0])


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return torch.randn(2, 4, 10, 12), torch.randn(4, 1, 9, 9)


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 1, 9, 9))

    def forward(self, input):
        return depthwise_conv2d(input, self.weight).relu()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiles_without_graph_breaks(operands, memory_format, dynamic):
    input, weight = operands[0].to(memory_format=memory_format), operands[1]
    compiled = torch.compile(
        lambda x, w: depthwise_conv2d(x, w).sin(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for size in (10, 13) if dynamic else (10,):
        results = []
        for function in (compiled, lambda x, w: depthwise_conv2d(x, w).sin()):
            leaves = [input[:, :, :, :size].clone().requires_grad_(), weight.clone().requires_grad_()]
            output = function(*leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for compiled_result, eager_result in zip(*results, strict=True):
            torch.testing.assert_close(compiled_result, eager_result)
        assert all(result.is_contiguous(memory_format=memory_format) for result in results[0][:2])


def test_inductor_runs_the_op():
    torch.manual_seed(0)
    module, input = Convolution(), torch.randn(2, 4, 10, 12)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(input), module(input))
    compiled(input).sum().backward()
    compiled_grad, module.weight.grad = module.weight.grad, None
    module(input).sum().backward()
    torch.testing.assert_close(compiled_grad, module.weight.grad)


def test_compiled_autocast_follows_the_context(operands):
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(*operands).dtype == torch.bfloat16
    assert compiled(*operands).dtype == torch.float32


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_a_plain_convolution(strict):
    program = torch.export.export(Convolution().eval(), (torch.randn(2, 4, 10, 12),), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.relu.default"]


def test_trace_sees_a_plain_convolution(operands):
    traced = torch.jit.trace(Convolution(), operands[0])
    assert "_convolution" in str(traced.inlined_graph)
    assert "lk_backbones::" not in str(traced.inlined_graph)
    stored = io.BytesIO()
    torch.jit.save(traced, stored)


@pytest.mark.filterwarnings("ignore")
def test_onnx_sees_a_plain_convolution(operands):
    onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs the onnx package")
    stored = io.BytesIO()
    torch.onnx.export(Convolution().eval(), (operands[0],), stored, dynamo=False)
    graph = onnx.load_from_string(stored.getvalue()).graph
    assert [node.op_type for node in graph.node] == ["Conv", "Relu"]


def test_function_transforms(operands):
    """They see PyTorch's own convolution, which has a rule for each of them."""
    input, weight = operands
    tangents = torch.randn_like(input), torch.randn_like(weight)
    actual = torch.func.jvp(depthwise_conv2d, operands, tangents)
    expected = torch.func.jvp(plain, operands, tangents)
    torch.testing.assert_close(actual, expected)

    def per_sample(convolve):
        return torch.vmap(torch.func.grad(lambda w, x: convolve(x[None], w).square().sum()), (None, 0))(weight, input)

    torch.testing.assert_close(per_sample(depthwise_conv2d), per_sample(plain))

    ensemble = torch.vmap(depthwise_conv2d, (None, 0))(input, torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(ensemble[1], 2 * plain(input, weight))

    with forward_ad.dual_level():
        dual = depthwise_conv2d(input, forward_ad.make_dual(weight, tangents[1]))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, plain(input, tangents[1]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(operands, use_reentrant):
    results = []
    for run in (depthwise_conv2d, lambda *leaves: checkpoint(depthwise_conv2d, *leaves, use_reentrant=use_reentrant)):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        results.append(torch.autograd.grad(run(*leaves).square().sum(), leaves) if not use_reentrant else None)
        if use_reentrant:
            run(*leaves).square().sum().backward()
            results[-1] = [leaf.grad for leaf in leaves]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_distributed_data_parallel():
    torch.manual_seed(0)
    module, input = Convolution(), torch.randn(2, 4, 10, 12)
    module(input).square().sum().backward()
    expected, module.weight.grad = module.weight.grad, None
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(module)(input).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(module.weight.grad, expected)


def test_inference_mode(operands):
    with torch.inference_mode():
        torch.testing.assert_close(depthwise_conv2d(*operands), plain(*operands))


def test_flops_are_counted(operands):
    def count(function, backward):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        with FlopCounterMode(display=False) as counter:
            output = function(*leaves).sum()
            if backward:
                output.backward()
        return counter.get_total_flops()

    assert count(depthwise_conv2d, False) == count(plain, False) == 2 * operands[0].numel() * 9 * 9
    assert count(depthwise_conv2d, True) == 3 * count(plain, False)  # both gradients cost what the forward does


def test_meta_tensors(operands):
    input, weight = (operand.to("meta") for operand in operands)
    assert depthwise_conv2d(input, weight).shape == input.shape
