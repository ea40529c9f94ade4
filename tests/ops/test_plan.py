"""Which path a shape takes, on CPUs of each kind and on GPUs, and how users overrule it."""

import importlib.util

import pytest
import torch

from lk_backbones.ops import _cpu, _cuda, _paths, depthwise_conv2d, explain


def plan(shape, kernel, device="cpu", channels_last=False, dtype=torch.float32, **options):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    input = torch.empty(shape, device="meta", dtype=dtype)
    if channels_last:
        input = input.to(memory_format=torch.channels_last)
    weight = torch.empty(shape[1], 1, *kernel, device="meta", dtype=dtype)
    return explain(input, weight, device=device, **options)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("LK_BACKBONES_DEPTHWISE", raising=False)
    _paths._cached_plan.cache_clear()
    yield
    _paths._cached_plan.cache_clear()


@pytest.fixture
def avx512(monkeypatch):
    monkeypatch.setattr(_cpu, "_instructions", lambda: "AVX512")


@pytest.mark.usefixtures("avx512")
@pytest.mark.parametrize(
    ("shape", "kernel", "nchw", "channels_last"),
    [
        # Far from the border between the paths, whatever the constants are fitted to.
        ((1, 512, 14, 14), 27, ("direct", "direct"), ("native", "direct")),
        ((8, 1024, 7, 7), 13, ("native", "direct"), ("direct", "direct")),  # 13 taps run as 15 in channels_last
        ((1, 1024, 7, 7), 13, ("native", "direct"), ("native", "direct")),  # but not on one small map
        ((1, 3, 16, 16), 15, ("direct", "direct"), ("native", "direct")),  # transforms of three maps: mostly calls
        ((8, 128, 56, 56), 31, ("fft", "fft"), ("fft", "fft")),
        ((1, 128, 128, 128), 31, ("fft", "fft"), ("fft", "fft")),
        ((1, 96, 128, 128), 51, ("fft", "fft"), ("fft", "fft")),
        ((1, 96, 56, 56), (51, 5), ("native", "direct"), ("native", "direct")),
        ((1, 96, 56, 56), (5, 51), ("direct", "direct"), ("native", "direct")),
        ((1, 128, 56, 56), 7, ("native", "direct"), ("native", "direct")),
        ((1, 128, 56, 56), 3, ("native", "native"), ("native", "native")),
        ((1, 128, 56, 56), (51, 3), ("native", "native"), ("native", "native")),
        ((0, 128, 56, 56), 31, ("native", "native"), ("native", "native")),
    ],
)
def test_cpu_rule(shape, kernel, nchw, channels_last):
    for expected, is_channels_last in ((nchw, False), (channels_last, True)):
        chosen = plan(shape, kernel, channels_last=is_channels_last)
        assert (chosen.forward, chosen.backward) == expected
    half = plan(shape, kernel, dtype=torch.bfloat16)  # computed in float32
    assert half.forward == ("direct" if nchw == ("native", "direct") else nchw[0])


# Batch, channels, size and kernel -> the forward in bfloat16 and channels_last, and that of packed weights with AMX.
BFLOAT16 = {
    (1, 128, 56, 7): ("native", "native"),
    (1, 512, 14, 27): ("native", "direct"),  # converting the kernel, too, costs more than a slower convolution
    (8, 512, 14, 27): ("direct", "bands"),
    (1, 256, 28, 29): ("direct", "bands"),
    (8, 256, 28, 29): ("direct", "bands"),
    (8, 128, 128, 31): ("fft", "fft"),
    (8, 1024, 7, 13): ("direct", "direct"),
    (1, 128, 56, 3): ("native", "native"),
}


@pytest.mark.usefixtures("avx512")
@pytest.mark.parametrize("case", BFLOAT16)
def test_cpu_rule_for_bfloat16(case, monkeypatch):
    batch, channels, size, kernel = case
    options = {"channels_last": True, "dtype": torch.bfloat16}
    chosen = {}
    for capable in (False, True):
        monkeypatch.setattr(_cpu, "has_avx512_bf16", lambda capable=capable: capable)
        for amx in (False, True):
            monkeypatch.setattr(_cpu, "has_amx", lambda amx=amx: amx)
            _paths._cached_plan.cache_clear()
            for packed in (False, True):
                plans = plan((batch, channels, size, size), kernel, packed=packed, **options)
                chosen[capable, amx, packed] = plans.forward
                in_float32 = plan((batch, channels, size, size), kernel, channels_last=True)
                assert plans.backward == in_float32.backward  # gradients are computed in float32
    without = "native" if kernel == 3 else "fft" if size == 128 else "direct"  # as ever, through float32
    assert {chosen[False, False, packed] for packed in (False, True)} == {without}
    assert (chosen[True, True, False], chosen[True, True, True]) == BFLOAT16[case]
    assert "bands" not in {chosen[capable, False, packed] for capable in (False, True) for packed in (False, True)}
    assert plan((batch, channels, size, size), kernel, packed=True, channels_last=True).forward != "bands"  # float32
    dilated = plan((batch, channels, size, size), kernel, packed=True, dilation=2, **options)
    assert dilated.forward != "bands"


@pytest.mark.usefixtures("avx512")
def test_rule_sees_what_is_computed():
    for channels_last in (False, True):  # cropped to 27 taps, which PyTorch does not do
        far = plan((1, 64, 14, 14), 101, channels_last=channels_last)
        assert (far.forward, far.backward) == ("direct", "direct")
    assert plan((1, 64, 128, 128), 31, dilation=8).forward == "direct"  # sixty-four dense maps of 16
    assert plan((1, 64, 64, 64), (5, 5), dilation=2).forward == "native"
    assert plan((1, 64, 64, 64), (5, 5), dilation=4).forward == "direct"
    assert plan((1, 64, 64, 64), (5, 5), dilation=2).backward == "direct"
    assert plan((1, 8, 56, 56), 31, dtype=torch.float64).forward == "fft"
    assert plan((1, 8, 56, 56), 5, dtype=torch.float64).forward == "native"


def test_narrow_registers_favour_the_transform(monkeypatch):
    shape, kernel = (1, 256, 28, 28), 29
    monkeypatch.setattr(_cpu, "_instructions", lambda: "AVX512")
    assert plan(shape, kernel).forward == "direct"
    monkeypatch.setattr(_cpu, "_instructions", lambda: "AVX2")
    _paths._cached_plan.cache_clear()
    assert plan(shape, kernel).forward == "fft"


def test_without_a_fast_transform_nothing_is_transformed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert plan((1, 96, 128, 128), 51).forward == "direct"


@pytest.mark.parametrize(
    ("shape", "kernel", "forward", "backward"),
    [
        ((64, 128, 56, 56), 31, "fft", "fft"),
        ((16, 128, 128, 128), 31, "fft", "fft"),
        ((64, 1024, 7, 7), 13, "native", "native"),
        ((64, 96, 56, 56), (51, 5), "native", "native"),
        ((64, 128, 56, 56), 5, "native", "native"),
        ((0, 128, 56, 56), 31, "native", "native"),
    ],
)
def test_cuda_rule(shape, kernel, forward, backward, monkeypatch):
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "ieee")  # as PyTorch's flags may be
    chosen = plan(shape, kernel, device="cuda")
    assert (chosen.forward, chosen.backward) == (forward, backward)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton does not exist for this platform")
@pytest.mark.parametrize(
    ("dtype", "precision", "capability", "expected"),
    [
        (torch.bfloat16, "ieee", (8, 0), "triton"),
        (torch.float16, "ieee", (12, 0), "triton"),
        (torch.float32, "tf32", (9, 0), "triton"),
        (torch.float32, "ieee", (9, 0), "fft"),  # TF32 is not allowed
        (torch.float64, "ieee", (9, 0), "fft"),
        (torch.float16, "ieee", (7, 5), "fft"),  # Triton's code for tensor cores of that age spills
    ],
)
def test_cuda_rule_takes_tensor_cores_where_they_are_exact_enough(dtype, precision, capability, expected, monkeypatch):
    monkeypatch.setattr(_cuda, "precision", lambda dtype: precision)
    monkeypatch.setattr(_cuda, "capability", lambda device: capability)
    assert plan((64, 128, 56, 56), 31, device="cuda", dtype=dtype).forward == expected
    assert plan((64, 96, 56, 56), (51, 5), device="cuda", dtype=dtype).forward in (expected, "native")
    assert plan((64, 128, 56, 56), 5, device="cuda", dtype=dtype).forward == "native"
    forced = plan((64, 128, 56, 56), 31, device="cuda", dtype=dtype, method="triton")
    if dtype == torch.float64 or capability < (8, 0):
        assert forced.forward == "fft"
        assert forced.reason.startswith("method 'triton' asked for, which is not to be had for this device and dtype; ")
    else:
        assert forced.forward == "triton"


def test_precision_is_what_pytorch_may_do():
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            assert _cuda.precision(torch.float32) == ("tf32" if allowed else "ieee")
            assert _cuda.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("method", ["triton", "cudnn", "aten", "rule", "lookup"])
def test_what_only_gpus_have_leaves_the_cpu_its_rule(method):
    shape, kernel = (1, 128, 56, 56), 31
    assert plan(shape, kernel, method=method).forward == plan(shape, kernel).forward


def test_other_devices_keep_their_own_operator():
    assert plan((8, 128, 56, 56), 31, device="mps").forward == "native"
    assert plan((8, 128, 56, 56), 31, device="mps", method="rule").forward == "native"


@pytest.mark.parametrize("method", ["direct", "fft", "native"])
def test_method_overrules(method, monkeypatch):
    shape, kernel = (1, 128, 56, 56), 31
    assert plan(shape, kernel, method=method).forward == method
    monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", method)
    assert plan(shape, kernel).backward == method
    assert plan(shape, kernel, method="fft").forward == "fft"  # the argument wins
    on_gpu = plan(shape, kernel, device="cuda")
    assert on_gpu.forward == ("fft" if method == "fft" else "native")


def test_environment_variable_reaches_the_op(monkeypatch):
    input, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 7, 7)
    monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", "fft")
    assert torch.equal(depthwise_conv2d(input, weight), depthwise_conv2d(input, weight, method="fft"))
    monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", "quick")
    with pytest.raises(
        ValueError, match=r"LK_BACKBONES_DEPTHWISE must be one of auto, lookup, rule, direct, .*, got 'quick'"
    ):
        depthwise_conv2d(input, weight)


def test_plan_reads_as_a_sentence():
    text = str(plan((1, 128, 56, 56), 31))
    assert text.startswith("forward ")
    assert "NCHW" in text
    assert "estimated cost of fft over direct" in text
