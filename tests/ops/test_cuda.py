"""What the operator does on a CUDA device, on a CPU: kernels through Triton's interpreter, and a made-up clock."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lk_backbones.layers import DepthwiseConv2d
from lk_backbones.ops import (
    _cuda,
    _fft,
    _operators,
    _paths,
    _tuning,
    depthwise_conv2d,
    depthwise_conv2d_and_more,
    explain,
    has_fused_depthwise,
)

pytest.importorskip("triton", reason="Triton does not exist for this platform")
if torch.cuda.is_available():
    pytest.skip("this is the pretence for machines without a GPU", allow_module_level=True)

from lk_backbones.ops import _triton

KINDS = ("forward", "input_gradient", "weight_gradient")


def restart():
    """What another process would know."""
    old = _cuda.tuner
    _cuda.tuner = _tuning.Tuner(old._device_name, old._timer, old._file)


def operands(dtype=torch.float32, channels_last=False):
    torch.manual_seed(0)
    input, weight, bias = torch.randn(2, 3, 8, 10), torch.randn(3, 1, 9, 9), torch.randn(3)
    if channels_last:
        input = input.to(memory_format=torch.channels_last)
    return [tensor.to(dtype).requires_grad_() for tensor in (input, weight, bias)]


def step(tensors, dilation=1, method="auto"):
    output = depthwise_conv2d(*tensors, dilation=dilation, method=method)
    torch.manual_seed(1)
    return [output, *torch.autograd.grad(output, tensors, torch.randn(output.shape).to(output.dtype))]


def expected(tensors, dilation=1):
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    padding = dilation * (tensors[1].shape[2] // 2)
    output = F.conv2d(*tensors, padding=padding, dilation=dilation, groups=tensors[1].shape[0])
    torch.manual_seed(1)
    grad = torch.randn(output.shape)
    return [output, *torch.autograd.grad(output, tensors, grad.double())]


def close(actual, exact, tolerance=1e-5):
    return all(((a.double() - b).norm() / b.norm()).item() <= tolerance for a, b in zip(actual, exact, strict=True))


@pytest.mark.parametrize(("dilation", "channels_last"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("path", ["triton", "triton-wide", "fft", "native", "cudnn", "aten", "other format"])
def test_whatever_is_fastest_computes_the_same(pretended_gpu, path, dilation, channels_last):
    if path == "other format":
        path = "native-contiguous" if channels_last else "native-channels_last"
    if path in _cuda.LIBRARIES and not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        pytest.skip("this PyTorch cannot be told which library to use")
    pretended_gpu[path] = 1.0
    tensors = operands(channels_last=channels_last)
    for _ in range(2):  # as it measures, and as it knows
        results = step(tensors, dilation)
        assert close(results, expected(tensors, dilation))
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert all(result.is_contiguous(memory_format=wanted) for result in results[:2])
    plan = explain(*tensors[:2], dilation)
    assert (plan.forward, plan.input_gradient, plan.weight_gradient) == (path,) * 3
    if hasattr(torch.backends.cudnn, "depthwise_kernel"):
        assert torch.backends.cudnn.depthwise_kernel == "auto"  # as the user had it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pretended_gpu, dtype):
    pretended_gpu["triton"] = 1.0
    tensors = operands(dtype)
    results = step(tensors)
    assert {result.dtype for result in results} == {dtype}
    exact = expected(tensors)
    assert close(results[:1], exact[:1], 2**-7)
    assert explain(*tensors[:2]).forward == "triton"


def test_each_result_has_a_path_of_its_own(pretended_gpu, monkeypatch):
    fastest = {"forward": "triton", "input_gradient": "fft", "weight_gradient": "native"}
    current = []
    monkeypatch.setattr(_cuda.tuner, "_timer", lambda run, calls: 1.0 if run.args[0] == fastest[current[-1]] else 100.0)
    measure = _cuda.tuner.measure
    monkeypatch.setattr(
        _cuda.tuner, "measure", lambda problem, *rest: current.append(problem.kind) or measure(problem, *rest)
    )
    tensors = operands()
    assert close(step(tensors), expected(tensors))
    assert current == list(KINDS)
    plan = explain(*tensors[:2])
    assert (plan.forward, plan.input_gradient, plan.weight_gradient) == tuple(fastest.values())
    text = str(plan)
    assert text.startswith(
        "forward triton, input gradient fft, weight gradient native: measured on Pretended Card (9.0)"
    )
    assert "\n  weight gradient, ms: native 1.000, " in text


def test_only_what_is_needed_is_measured(pretended_gpu):
    input, weight, _ = operands()
    with torch.no_grad():
        depthwise_conv2d(input, weight)
    plan = explain(input, weight)
    assert list(plan.milliseconds) == ["forward"]
    assert "not yet measured: input gradient, weight gradient (estimated" in str(plan)
    output = depthwise_conv2d(input.detach(), weight)
    output.sum().backward()
    assert list(explain(input, weight).milliseconds) == ["forward", "weight_gradient"]


def test_it_is_measured_once_and_known_to_other_processes(pretended_gpu):
    pretended_gpu["triton-wide"] = 1.0
    tensors = operands()
    step(tensors)
    measured = len(pretended_gpu["timed"])
    assert measured > 0
    step(tensors)
    restart()
    assert explain(*tensors[:2]).forward == "triton-wide"
    step(tensors)
    assert len(pretended_gpu["timed"]) == measured


@pytest.mark.parametrize("as_argument", [True, False])
@pytest.mark.parametrize("method", ["lookup", "rule", "fft", "native", "triton"])
def test_methods_other_than_auto_measure_nothing(pretended_gpu, method, as_argument, monkeypatch):
    tensors = operands()
    if not as_argument:
        monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", method)
    passed = method if as_argument else "auto"
    assert close(step(tensors, method=passed), expected(tensors))
    assert not pretended_gpu["timed"]
    reason = explain(*tensors[:2], method=passed).reason
    assert reason.startswith("estimated" if method in ("lookup", "rule") else f"method '{method}' asked for")


def test_lookup_uses_what_was_measured(pretended_gpu):
    pretended_gpu["fft"] = 1.0
    tensors = operands()
    step(tensors)
    measured = len(pretended_gpu["timed"])
    assert explain(*tensors[:2], method="lookup").forward == "fft"
    assert close(step(tensors, method="lookup"), expected(tensors))
    # What was measured is not what the rule says.
    assert explain(*tensors[:2], method="rule").forward == "native"
    assert len(pretended_gpu["timed"]) == measured


def test_what_a_graph_captures_ran_before(pretended_gpu, monkeypatch):
    pretended_gpu["triton-wide"] = 1.0
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "tf32")  # for which the rule says "triton"
    ran = []
    convolve = _cuda.convolve

    def watch(input, weight, bias, path, *more):
        ran.append((len(input), bias is not None, path, *map(bool, more)))
        return convolve(input, weight, bias, path, *more)

    monkeypatch.setattr(_cuda, "convolve", watch)
    input, weight, bias = (tensor.detach() for tensor in operands())
    problems = [torch.cat([input] * times)[:batch] for times, batch in ((4, 8), (3, 6))]  # of one class

    def compute_all():
        ran.clear()
        for maps, shift in itertools.product(problems, (None, bias)):
            depthwise_conv2d(maps, weight, shift)
            depthwise_conv2d_and_more(maps, weight, shift, relu=True)
        return set(ran)

    compute_all()
    warm = compute_all()
    assert {path for _, _, path, *_ in warm} == {"triton-wide"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert compute_all() == warm  # kernels cannot be loaded while a graph is captured
    timed = len(pretended_gpu["timed"])
    ran.clear()
    depthwise_conv2d(input.repeat(1, 1, 2, 2), weight)
    assert len(pretended_gpu["timed"]) == timed  # nor may anything be measured
    assert [path for _, _, path, *_ in ran] == ["triton"]


def test_the_rule_decides_where_nothing_may_depend_on_measuring(pretended_gpu, monkeypatch):
    pretended_gpu["fft"] = 1.0
    tensors = operands()
    step(tensors)
    assert explain(*tensors[:2]).forward == "fft"
    measured = len(pretended_gpu["timed"])
    torch.use_deterministic_algorithms(True)
    assert explain(*tensors[:2]).forward == "native"
    step(operands(torch.float64))  # something new
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert explain(*tensors[:2]).forward == "native"
    step(operands(torch.float64))
    assert len(pretended_gpu["timed"]) == measured


def test_compiled_programs_trace_without_measuring(pretended_gpu):
    input, weight, _ = operands()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager")
    seen = []

    def watch(*arguments):
        seen.append(torch.compiler.is_compiling())
        return original(*arguments)

    original = _paths._measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_paths, "_measure", watch)
        output = compiled(input, weight)
    assert close([output], [expected([input, weight])[0]])
    assert True not in seen


def test_a_path_with_wrong_numbers_is_never_adopted(pretended_gpu, monkeypatch, caplog):
    pretended_gpu["fft"] = 1.0
    right = _cuda.convolve

    def wrong(input, weight, bias, path):
        output = right(input, weight, bias, path)
        return output if path != "fft" else output * 1.001

    monkeypatch.setattr(_cuda, "convolve", wrong)
    tensors = operands()
    with caplog.at_level(logging.WARNING):
        output = depthwise_conv2d(*tensors)
    assert close([output], [expected(tensors)[0]])
    assert "path fft is not used for Pretended Card (9.0)" in caplog.text
    assert explain(*tensors[:2]).forward != "fft"


def test_the_rule_knows_what_gave_wrong_numbers(pretended_gpu, monkeypatch):
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "tf32")  # for which the rule says Triton
    right = _triton.convolve
    monkeypatch.setattr(_triton, "convolve", lambda *args, **options: right(*args, **options) * 1.1)
    tensors = operands()
    exact = expected(tensors)[:1]
    assert close([depthwise_conv2d(*tensors)], exact)
    restart()  # another process, which measures nothing
    for method in ("rule", "lookup"):
        assert close([depthwise_conv2d(*tensors, method=method)], exact)
    torch.use_deterministic_algorithms(True)
    assert close([depthwise_conv2d(*tensors)], exact)
    assert explain(*tensors[:2]).forward == "native"
    assert not close([depthwise_conv2d(*tensors, method="triton")], exact)  # who insists gets it


def test_a_path_that_crashes_is_never_adopted(pretended_gpu, monkeypatch):
    pretended_gpu["triton"] = 1.0

    def crash(*arguments, **options):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(_triton, "convolve", crash)
    monkeypatch.setattr(_triton, "weight_gradient", crash)
    tensors = operands()
    assert close(step(tensors), expected(tensors))
    (choice, *_) = _cuda.tuner.known.values()
    assert choice.rejected["triton"] == "RuntimeError: out of resource: shared memory"
    # Nor does the rule run into it, also where nothing could be measured.
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "tf32")
    tensors = operands()
    assert _paths.plan_for(*tensors[:2], (1, 1), "rule", "cuda").forward == "triton"
    assert close(step(tensors), expected(tensors))
    assert close(step(tensors, method="rule"), expected(tensors))
    assert explain(*tensors[:2], method="rule").forward == "native"
    halves = operands(torch.float16)
    (depthwise_conv2d(*halves) * 0).sum().backward()
    assert explain(*halves[:2]).backward == "native"  # as it was computed, although nothing could be measured
    torch.use_deterministic_algorithms(True)
    assert close(step(tensors), expected(tensors))
    torch.use_deterministic_algorithms(False)


def test_a_path_that_lacks_memory_once_is_not_given_up(pretended_gpu, monkeypatch):
    convolve = _triton.convolve

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_triton, "convolve", full)
    depthwise_conv2d(*operands())
    monkeypatch.setattr(_triton, "convolve", convolve)
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "tf32")
    assert explain(*operands()[:2], method="rule").forward == "triton"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuFFT error: 5")])
def test_where_nothing_can_be_compared_with_the_rule_decides(pretended_gpu, monkeypatch, caplog, error):
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "tf32")  # for which the rule says "triton"
    tried = []

    def fail(*arguments, **options):
        tried.append(arguments)
        raise error

    tensors = operands()
    exact = expected(tensors)[:1]
    monkeypatch.setattr(_operators, "native", fail)
    monkeypatch.setattr(_fft, "convolve", fail)
    for _ in range(3):
        assert close([depthwise_conv2d(*tensors)], exact)
    assert len(tried) == 2  # once by each
    assert caplog.text.count("nothing could be measured for Pretended Card (9.0)") == 1


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch has no error of its own for it")
@pytest.mark.parametrize("broken", ["reference", "candidate"])
def test_a_lost_device_is_no_matter_of_choice(pretended_gpu, monkeypatch, broken):
    def lose(*arguments, **options):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(*((_operators, "native") if broken == "reference" else (_triton, "convolve")), lose)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        depthwise_conv2d(*operands())


def test_a_triton_without_a_compiler_is_done_without(monkeypatch, caplog):
    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton.triton.runtime, "driver", Driver())
    assert _cuda._kernels.__wrapped__() is None
    assert "as Triton cannot be used: Failed to find C compiler" in caplog.text


def test_a_first_step_whose_gradients_are_zero_or_not_finite_decides_nothing(pretended_gpu):
    pretended_gpu["fft"] = 1.0
    input, weight, _ = operands()
    before = torch.get_rng_state()
    for number, factor in enumerate((0.0, float("inf"), 0.0)):
        output = depthwise_conv2d(input, weight)
        grads = torch.autograd.grad((output * factor).sum(), (input, weight))
        assert all(grad.isnan().any() or grad.isinf().any() or not grad.any() for grad in grads)
        decided = list(explain(input, weight).milliseconds)
        assert decided == (["forward"] if number < 2 else list(KINDS))
    assert torch.equal(torch.get_rng_state(), before)  # made-up numbers take none of the program's


def test_a_module_trains(pretended_gpu):
    pretended_gpu["triton"] = 1.0
    torch.manual_seed(0)
    module = DepthwiseConv2d(3, 3, 9, padding=4, groups=3)
    plain = torch.nn.Conv2d(3, 3, 9, padding=4, groups=3)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(2, 3, 8, 10)
    for either in (module, plain):
        optimizer = torch.optim.SGD(either.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            either(input).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
    assert set(pretended_gpu["timed"]) >= {"triton", "native", "fft"}


def test_gradients_of_any_order(pretended_gpu):
    pretended_gpu["fft"] = 1.0
    shapes = (1, 2, 3, 4), (2, 1, 7, 7), (2,)
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(depthwise_conv2d, tensors)
    assert torch.autograd.gradgradcheck(depthwise_conv2d, tensors)


def test_a_choice_of_a_later_release_is_passed_over(pretended_gpu):
    tensors = operands()
    step(tensors)
    file = _cuda.tuner.file
    file.write_text(file.read_text().replace('"path": "', '"path": "quantum-'))
    restart()
    assert not explain(*tensors[:2]).forward.startswith("quantum")
    assert close(step(tensors), expected(tensors))


def test_kernels_that_pytorch_is_fast_at_are_not_measured(pretended_gpu):
    tensors = [torch.randn(2, 3, 8, 10), torch.randn(3, 1, 3, 3), torch.randn(3)]
    depthwise_conv2d(*tensors)
    assert not pretended_gpu["timed"]
    empty = depthwise_conv2d(torch.randn(0, 3, 8, 10), torch.randn(3, 1, 9, 9))
    assert empty.shape == (0, 3, 8, 10)
    assert not pretended_gpu["timed"]


@pytest.mark.parametrize("kernel", [(9, 9), (51, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("path", ["triton", "fft", "native"])
def test_a_sum_and_a_relu_are_computed_along(pretended_gpu, path, dilation, channels_last, kernel):
    pretended_gpu[path] = 1.0
    torch.manual_seed(0)
    input, weight, bias = torch.randn(2, 3, 20, 10), torch.randn(3, 1, *kernel), torch.randn(3)
    addend = torch.randn(2, 3, 20, 10)
    if channels_last:
        input, addend = (tensor.to(memory_format=torch.channels_last) for tensor in (input, addend))
    padding = [dilation * (size // 2) for size in kernel]
    exact = F.conv2d(input.double(), weight.double(), bias.double(), padding=padding, dilation=dilation, groups=3)
    kept = addend.clone()
    for more, relu in itertools.product((None, addend), (False, True)):
        expected = exact if more is None else exact + addend.double()
        output = depthwise_conv2d_and_more(input, weight, bias, more, relu, dilation)
        assert close([output], [expected.relu() if relu else expected]), (more is None, relu)
        assert output.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(addend, kept)
    assert explain(input, weight, dilation).forward == path


def test_when_there_is_something_to_fuse(pretended_gpu):
    input, weight, bias = (tensor.detach() for tensor in operands())
    assert has_fused_depthwise(input, weight, bias, None)
    assert not has_fused_depthwise(input, weight.clone().requires_grad_())
    with torch.no_grad():
        assert has_fused_depthwise(input, torch.nn.Parameter(weight))
    assert not has_fused_depthwise(input, weight.half())
    assert not has_fused_depthwise(input[0], weight)
    with FlopCounterMode(display=False):
        assert not has_fused_depthwise(input, weight)
    with pytest.raises(
        ValueError, match=r"addend must be as the input, \(2, 3, 8, 10\) torch.float32 on cpu, got \(1,"
    ):
        depthwise_conv2d_and_more(input, weight, bias, input[:1])
    with pytest.raises(ValueError, match=r"input must be \(N, C, H, W\), got shape \(3, 8, 10\)"):
        depthwise_conv2d_and_more(input[0], weight)
