"""The op's numbers, gradients, dtypes, memory formats and refusals, against float64 convolution."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lk_backbones.ops import _operators, depthwise_conv2d

TOLERANCE = 5e-6  # relative L2 error in float32
METHODS = ("auto", "direct", "fft", "native")
FORMATS = (torch.contiguous_format, torch.channels_last)


def reference(input, weight, bias=None, dilation=(1, 1)):
    padding = [step * (size // 2) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    return F.conv2d(input, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def relative_error(actual, expected, scale=None):
    """Relative L2 error; ``scale`` stands in for the norm of ``expected`` where terms cancel."""
    scale = expected.norm() if scale is None else scale
    return ((actual.double() - expected).norm() / scale.clamp_min(1e-30)).item()


def errors(input, weight, bias, dilation, method):
    """Relative errors of the output and of the three gradients."""
    operands = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    output = depthwise_conv2d(*operands, dilation=dilation, method=method)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, operands, grad)
    exact_operands = [tensor.detach().double().requires_grad_() for tensor in operands]
    exact = reference(*exact_operands, dilation=dilation)
    exact_grads = torch.autograd.grad(exact, exact_operands, grad.double())
    bias_scale = grad.double().square().sum((0, 2, 3)).sqrt().norm()
    return [
        relative_error(output, exact),
        relative_error(grads[0], exact_grads[0]),
        relative_error(grads[1], exact_grads[1]),
        relative_error(grads[2], exact_grads[2], bias_scale),
    ]


odd = st.integers(0, 9).map(lambda n: 2 * n + 1)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from((1, 2, 3, 8, 16, 17)),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    kernel=st.tuples(odd, odd),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    memory_format=st.sampled_from(FORMATS),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**31),
)
def test_equals_float64_convolution(batch, channels, height, width, kernel, dilation, memory_format, method, seed):
    torch.manual_seed(seed)
    input = torch.randn(batch, channels, height, width).to(memory_format=memory_format)
    weight, bias = torch.randn(channels, 1, *kernel), torch.randn(channels)
    assert max(errors(input, weight, bias, dilation, method)) <= TOLERANCE


@pytest.fixture
def thread_count():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 16, 56, 56), (31, 31)),
        ((2, 32, 14, 14), (27, 27)),
        ((3, 64, 7, 7), (13, 13)),
        ((1, 16, 80, 70), (13, 13)),  # more taps than one band of the weight gradient holds
        ((1, 16, 56, 56), (51, 5)),
        ((1, 16, 56, 56), (5, 51)),
        ((5, 16, 14, 14), (51, 51)),
        ((2, 24, 20, 20), (7, 7)),
        ((2, 24, 20, 20), (11, 11)),
    ],
)
def test_published_shapes(shape, kernel):
    torch.manual_seed(0)
    operands = [torch.randn(shape), torch.randn(shape[1], 1, *kernel)]
    grad = torch.randn(shape)
    exact_operands = [operand.double().requires_grad_() for operand in operands]
    exact = reference(*exact_operands)
    exact_results = [exact, *torch.autograd.grad(exact, exact_operands, grad.double())]
    for threads, memory_format, method in itertools.product((1, 2), FORMATS, ("auto", "direct", "fft")):
        torch.set_num_threads(threads)
        input = operands[0].to(memory_format=memory_format).requires_grad_()
        weight = operands[1].clone().requires_grad_()
        output = depthwise_conv2d(input, weight, method=method)
        results = [output, *torch.autograd.grad(output, (input, weight), grad)]
        assert max(map(relative_error, results, exact_results)) <= TOLERANCE, (threads, memory_format, method)


@pytest.mark.parametrize(("size", "step"), [(7, 2), (3, 5), (9, 2)])
@pytest.mark.parametrize("shape", [(2, 16, 14, 14), (1, 16, 7, 7), (2, 3, 80, 70)])  # the last in bands
def test_dilated_branches_of_unireplknet(shape, size, step):
    torch.manual_seed(0)
    input, weight, bias = torch.randn(shape), torch.randn(shape[1], 1, size, size), torch.randn(shape[1])
    for memory_format, dtype in itertools.product(FORMATS, (torch.float32, torch.bfloat16)):
        operands = [tensor.to(dtype) for tensor in (input.to(memory_format=memory_format), weight, bias)]
        tolerance = TOLERANCE if dtype == torch.float32 else 2**-8
        assert max(errors(*operands, (step, step), "auto")) <= tolerance, (memory_format, dtype)


@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("method", ["direct", "fft", "native"])
def test_gradients_of_any_order(method, dilation):
    torch.manual_seed(0)
    shapes = (2, 2, 4, 5), (2, 1, 7, 3), (2,)
    operands = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]

    def convolve(input, weight, bias):
        return depthwise_conv2d(input, weight, bias, dilation, method)

    assert torch.autograd.gradcheck(convolve, operands)
    assert torch.autograd.gradgradcheck(convolve, operands)


@pytest.mark.parametrize("frozen", [0, 1])
def test_second_order_with_one_frozen_operand(frozen):
    torch.manual_seed(0)
    operands = [torch.randn(2, 2, 4, 5, dtype=torch.double), torch.randn(2, 1, 5, 5, dtype=torch.double)]
    operands[1 - frozen].requires_grad_()

    def convolve(free):
        pair = (operands[0], free) if frozen == 0 else (free, operands[1])
        return depthwise_conv2d(*pair, method="direct").square()

    assert torch.autograd.gradgradcheck(convolve, operands[1 - frozen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("method", ["direct", "fft"])
def test_operators_are_well_registered(method, memory_format, dtype):
    input = torch.randn(2, 3, 5, 6, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(3, 1, 7, 3, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 3, 5, 6, dtype=dtype, requires_grad=True)
    torch.library.opcheck(_operators.convolution_op, (input, weight, bias, (1, 1), method))
    torch.library.opcheck(_operators.convolution_op, (input, weight, None, (2, 1), method))
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(_operators.gradients_op, (grad, input, weight, (1, 1), method, mask))


def test_only_wanted_gradients_are_computed(monkeypatch):
    from lk_backbones.ops import _cpu

    masks = []
    backward = _cpu.gradients

    def record(grad_output, input, weight, path, output_mask):
        masks.append(output_mask)
        return backward(grad_output, input, weight, path, output_mask)

    monkeypatch.setattr(_cpu, "gradients", record)
    for input_grad, weight_grad in ((True, False), (False, True), (False, False)):
        input = torch.randn(1, 4, 9, 9, requires_grad=input_grad)
        weight = torch.randn(4, 1, 9, 9, requires_grad=weight_grad)
        bias = torch.randn(4, requires_grad=True)
        depthwise_conv2d(input, weight, bias, method="direct").sum().backward()
        assert (input.grad is not None, weight.grad is not None) == (input_grad, weight_grad)
        assert torch.equal(bias.grad, torch.full((4,), 81.0))
    assert masks == [[True, False], [False, True]]  # none at all when only the bias learns


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_format_is_kept(memory_format, method):
    input = torch.randn(2, 8, 12, 10).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(8, 1, 13, 13).to(memory_format=memory_format).requires_grad_()
    output = depthwise_conv2d(input, weight, method=method)
    output.backward(torch.randn(2, 8, 12, 10))  # NCHW, whatever the output was
    assert output.stride() == input.stride()
    assert input.grad.stride() == input.stride()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["expanded", "sliced", "transposed", "scalar"])
def test_any_strides_of_input_and_gradient(kind, method):
    torch.manual_seed(0)
    make = {
        "expanded": lambda: torch.randn(1, 4, 1, 9).expand(2, 4, 9, 9),
        "sliced": lambda: torch.randn(2, 8, 9, 18).to(memory_format=torch.channels_last)[:, ::2, :, ::2],
        "transposed": lambda: torch.randn(9, 9, 4, 2).permute(3, 2, 0, 1),
        "scalar": lambda: torch.randn(()).expand(2, 4, 9, 9),
    }[kind]
    input, weight, grad = make().requires_grad_(), torch.randn(4, 1, 7, 7, requires_grad=True), make()
    output = depthwise_conv2d(input, weight, method=method)
    actual = [output, *torch.autograd.grad(output, (input, weight), grad)]
    exact_operands = [input.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    exact_output = reference(*exact_operands)
    exact = [exact_output, *torch.autograd.grad(exact_output, exact_operands, grad.double())]
    assert max(relative_error(a, e) for a, e in zip(actual, exact, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method):
    shape = (0, 4, 9, 9)
    input, weight = torch.randn(shape, requires_grad=True), torch.randn(4, 1, 7, 7, requires_grad=True)
    output = depthwise_conv2d(input, weight, method=method)
    output.sum().backward()
    assert output.shape == input.grad.shape == shape
    assert weight.grad.shape == weight.shape
    assert not weight.grad.any()


def test_unbatched():
    input, weight = torch.randn(4, 9, 9, requires_grad=True), torch.randn(4, 1, 7, 7)
    output = depthwise_conv2d(input, weight)
    assert output.shape == (4, 9, 9)
    assert torch.equal(output, depthwise_conv2d(input[None], weight)[0])
    output.sum().backward()
    assert input.grad.shape == (4, 9, 9)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic(method):
    torch.manual_seed(0)
    input, weight = torch.randn(2, 32, 30, 30, requires_grad=True), torch.randn(32, 1, 21, 21, requires_grad=True)
    grad = torch.randn(2, 32, 30, 30)
    runs = []
    for _ in range(2):
        output = depthwise_conv2d(input, weight, method=method)
        runs.append([output, *torch.autograd.grad(output, (input, weight), grad)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["direct", "fft"])
def test_half_precision_is_no_worse_than_torch(method, dtype):
    torch.manual_seed(0)
    operands = [torch.randn(2, 8, 12, 12).to(dtype), torch.randn(8, 1, 9, 9).to(dtype), torch.randn(8).to(dtype)]
    grad = torch.randn(2, 8, 12, 12).to(dtype)

    def run(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in operands]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    ours = run(lambda *leaves: depthwise_conv2d(*leaves, method=method), dtype)
    theirs, exact = run(reference, dtype), run(reference, torch.double)
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.dtype == dtype
        assert relative_error(our, true) <= max(1.01 * relative_error(their, true), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_convolution_does(dtype):
    torch.manual_seed(0)
    input, weight = torch.randn(1, 8, 12, 12), torch.randn(8, 1, 9, 9, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = depthwise_conv2d(input, weight, bias), reference(input, weight, bias)
        assert ours.dtype == theirs.dtype == dtype
        grads = torch.autograd.grad(ours.float().square().sum(), (weight, bias))
    exact = reference(input.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double())
    assert relative_error(ours, exact) <= torch.finfo(dtype).eps / 2
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    with torch.autocast("cpu", dtype=dtype):
        double = depthwise_conv2d(input.double(), weight.double())
    assert double.dtype == torch.float64
    assert relative_error(double, reference(input.double(), weight.double())) <= 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_what_the_docs_say(value):
    input, weight = torch.randn(2, 2, 20, 20), torch.randn(2, 1, 7, 7)
    input[0, 1, 4, 5] = value
    window = torch.zeros(2, 2, 20, 20, dtype=torch.bool)
    window[0, 1, 1:8, 2:9] = True
    for method in ("direct", "native"):
        assert torch.equal(~depthwise_conv2d(input, weight, method=method).isfinite(), window)
    whole_map = torch.zeros_like(window)
    whole_map[0, 1] = True
    assert torch.equal(~depthwise_conv2d(input, weight, method="fft").isfinite(), whole_map)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(9, 9)}, r"input must be \(N, C, H, W\) or \(C, H, W\), got shape \(9, 9\)"),
        ({"weight": torch.randn(5, 1, 7, 7)}, r"weight must be \(4, 1, kH, kW\).*got \(5, 1, 7, 7\)"),
        ({"weight": torch.randn(4, 4, 7, 7)}, r"weight must be \(4, 1, kH, kW\).*got \(4, 4, 7, 7\)"),
        ({"weight": torch.randn(4, 7, 7)}, r"weight must be \(4, 1, kH, kW\).*got \(4, 7, 7\)"),
        ({"weight": torch.randn(4, 1, 8, 7)}, r"kernel sizes must be odd.*got \(8, 7\)"),
        ({"bias": torch.randn(3)}, r"bias must be \(4,\).*got \(3,\)"),
        ({"weight": torch.randn(4, 1, 7, 7).double()}, "share one floating point dtype.*weight torch.float64"),
        ({"input": torch.ones(1, 4, 9, 9, dtype=torch.long)}, "share one floating point dtype.*input torch.int64"),
        ({"weight": torch.randn(4, 1, 7, 7, device="meta")}, "on one device.*weight meta"),
        ({"dilation": 0}, "dilation must be .*positive.*got 0"),
        ({"dilation": (1, 2, 3)}, r"dilation must be .*got \(1, 2, 3\)"),
        ({"dilation": 1.5}, r"dilation must be .*got 1.5"),
        (
            {"method": "fastest"},
            "method must be one of auto, lookup, rule, direct, fft, native, triton, cudnn, aten, got 'fastest'",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"input": torch.randn(1, 4, 9, 9), "weight": torch.randn(4, 1, 7, 7), **change}
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**arguments)


@pytest.mark.parametrize("method", ["direct", "fft", "native"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_output_may_be_changed_in_place(method, dilation, memory_format):
    torch.manual_seed(0)
    input = torch.randn(2, 16, 14, 18).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(16, 1, 9, 9, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        output = torch.nn.functional.relu(depthwise_conv2d(input, weight, None, dilation, method), inplace=inplace)
        gradients.append(torch.autograd.grad(output.square().sum(), (input, weight)))
    for plain, in_place in zip(*gradients, strict=True):
        torch.testing.assert_close(in_place, plain, rtol=0, atol=0)
