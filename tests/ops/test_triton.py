"""The kernels for GPUs against float64 convolution: on a GPU as they are, elsewhere through Triton's interpreter."""

import inspect
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton does not exist for this platform")
from lk_backbones.ops import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("the kernels are for compute capability 8.0 and newer", allow_module_level=True)
# On a GPU these are the kernels as they are, which nothing else shows.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

# The interpreter takes its time, so small blocks; what differs between the configurations is in them.
CONFIGS = (
    {
        "plain": _triton.Config(16, 64, 64, 4, 3),
        "large": _triton.Config(32, 128, 64, 4, 3, cached=False),
        "small": _triton.Config(16, 32, 32, 4, 3),
        "narrow": _triton.Config(16, 64, 64, 4, 3, pad=False, narrow=True),
    }
    if DEVICE == "cpu"
    else _triton.CONFIGS
)
ANY = next(iter(CONFIGS.values()))
# Relative L2 errors. The interpreter cuts float32 off to bfloat16 rather than rounding it.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
# The interpreter knows float32 as it is only.
PRECISION = "tf32x3" if DEVICE == "cuda" else "ieee"

# Batch, channels, map, kernel.
CASES = [
    (2, 2, (7, 7), (13, 13)),
    (3, 2, (14, 14), (27, 27)),
    (1, 2, (9, 13), (5, 7)),
    (2, 1, (5, 11), (21, 21)),  # a kernel larger than the map
    (2, 1, (28, 28), (29, 29)),
    (1, 1, (10, 70), (21, 31)),  # several tiles across
    (1, 1, (5, 100), (9, 51)),
    (2, 1, (17, 9), (51, 5)),  # tall: turned
    (2, 1, (9, 66), (5, 51)),
    (3, 2, (6, 40), (7, 7)),
    (1, 1, (1, 1), (3, 3)),
    (1, 1, (30, 1), (31, 1)),
    (5, 1, (9, 28), (7, 7)),  # rows of a multiple of eight bytes, not of sixteen
    (1, 1, (3, 130), (1, 101)),
    (1, 1, (70, 12), (101, 3)),
    (17, 3, (4, 8), (9, 9)),  # more images than a program takes
]


def convolution(input, weight, bias=None):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(input, weight, bias, padding=padding, groups=weight.shape[0])


def relative_error(actual, expected, size=None):
    """The error's norm over that of ``size``, or of what is expected."""
    size = expected if size is None else size
    return ((actual.double() - expected).norm() / size.norm().clamp_min(1e-30)).item()


def operands(batch, channels, size, kernel, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, channels, *size), (channels, 1, *kernel), (batch, channels, *size)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def exact_results(input, weight, grad):
    """Output, input's and weight's gradient."""
    exact_operands = [tensor.double().requires_grad_() for tensor in (input, weight)]
    exact = convolution(*exact_operands)
    return [exact, *torch.autograd.grad(exact, exact_operands, grad.double())]


def errors(input, weight, grad, config, of_magnitudes=False):
    """Errors of output, input's and weight's gradient, relative to these.

    With ``of_magnitudes``, relative to the sums of magnitudes instead: where everything is one sum, or a few, its terms
    may cancel, but not their rounding errors.
    """
    exact = exact_results(input, weight, grad)
    sizes = exact_results(input.abs(), weight.abs(), grad.abs()) if of_magnitudes else exact
    options = {"config": config, "precision": PRECISION}
    results = [
        _triton.convolve(input, weight, **options),
        _triton.convolve(grad, weight, flip=True, **options),
        _triton.weight_gradient(grad, input, tuple(weight.shape[2:]), **options),
    ]
    return list(map(relative_error, results, exact, sizes))


@pytest.mark.parametrize("config", [name for name in CONFIGS if name not in ("large", "small")])  # see test_any_shape
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64_convolution(case, config):
    assert max(errors(*operands(*case), CONFIGS[config])) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[12]], ids=str)
def test_half_precision_is_rounded_once(case, dtype):
    input, weight, grad = operands(*case, dtype)
    output, grad_input, grad_weight = errors(input, weight, grad, ANY)
    assert max(output, grad_input) <= TOLERANCES[dtype]
    assert grad_weight <= TOLERANCES[torch.float32]  # stays float32
    assert _triton.convolve(input, weight, config=ANY).dtype == dtype
    assert _triton.weight_gradient(grad, input, case[3], config=ANY).dtype == torch.float32


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 2),
    size=st.tuples(st.integers(1, 12), st.integers(1, 40)),
    kernel=st.tuples(*(st.integers(0, 8).map(lambda n: 2 * n + 1) for _ in range(2))),
    config=st.sampled_from(list(CONFIGS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape(batch, channels, size, kernel, config, seed):
    tensors = operands(batch, channels, size, kernel, seed=seed)
    assert max(errors(*tensors, CONFIGS[config], of_magnitudes=True)) <= TOLERANCES[torch.float32]


def test_any_strides():
    input, weight, grad = operands(2, 3, (6, 24), (9, 9))
    expected = [
        _triton.convolve(input, weight, config=ANY),
        _triton.weight_gradient(grad, input, (9, 9), config=ANY),
    ]
    wide = torch.zeros(2, 3, 6, 25, device=DEVICE)
    wide[..., 1:] = input
    views = {
        "channels_last": input.to(memory_format=torch.channels_last),
        "a view that begins anywhere": wide[..., 1:],
        "turned": input.transpose(2, 3).contiguous().transpose(2, 3),
        "not at sixteen bytes": torch.cat([input.new_zeros(1), input.flatten()])[1:].view_as(input),
    }
    for name, view in views.items():
        assert torch.equal(view, input)
        assert torch.equal(_triton.convolve(view, weight, config=ANY), expected[0]), name
        assert torch.equal(_triton.weight_gradient(grad, view, (9, 9), config=ANY), expected[1]), name
    expanded = grad[:, :1, :1, :1].expand_as(grad)  # as a sum's gradient comes
    assert torch.equal(
        _triton.weight_gradient(expanded, input, (9, 9), config=ANY),
        _triton.weight_gradient(expanded.contiguous(), input, (9, 9), config=ANY),
    )


@pytest.mark.parametrize("kernel", [(9, 9), (51, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_bias_addend_and_relu_are_computed_along(kernel, flip):
    input, weight, addend = operands(2, 2, (17, 9), kernel)
    bias = torch.tensor([0.5, -0.25], device=DEVICE)
    parts = {"bias": (None, bias), "addend": (None, addend), "relu": (False, True)}
    kernels = weight.flip(2, 3) if flip else weight
    for values in itertools.product(*parts.values()):
        chosen = dict(zip(parts, values, strict=True))
        exact = convolution(input.double(), kernels.double())
        exact += 0 if chosen["bias"] is None else bias.double()[:, None, None]
        exact += 0 if chosen["addend"] is None else addend.double()
        exact = exact.relu() if chosen["relu"] else exact
        output = _triton.convolve(input, weight, flip=flip, config=ANY, precision=PRECISION, **chosen)
        assert relative_error(output, exact) <= TOLERANCES[torch.float32], chosen


def test_what_is_not_finite_stays_in_its_window():
    input, weight, _ = operands(1, 2, (9, 16), (7, 7))
    input[0, 0, 4, 8] = math.nan
    input[0, 1, 0, 0] = math.inf
    for relu in (False, True):
        output = _triton.convolve(input, weight.abs() + 0.1, relu=relu, config=ANY, precision="ieee")
        expected = convolution(input, weight.abs() + 0.1)
        # Products with the zeros around the kernel are not a number either: within the window's steps, not beyond.
        finite = torch.isfinite(output)
        assert not finite[torch.isnan(expected) | torch.isinf(expected)].any()
        assert finite[0, 1, 8].all()


def test_the_weight_gradient_is_deterministic_however_it_is_shared_out(monkeypatch):
    input, weight, grad = operands(3, 4, (9, 24), (9, 9))
    size = tuple(weight.shape[2:])
    exact_weight = weight.double().requires_grad_()
    (exact,) = torch.autograd.grad(convolution(input.double(), exact_weight), exact_weight, grad.double())
    for multiprocessors, scratch in ((1, 2**27), (64, 2**27), (1, 1), (64, 2**18)):
        monkeypatch.setattr(_triton, "_multiprocessors", lambda tensor, count=multiprocessors: count)
        monkeypatch.setattr(_triton, "SCRATCH_BYTES", scratch)
        first, again = (_triton.weight_gradient(grad, input, size, config=ANY, precision=PRECISION) for _ in range(2))
        assert torch.equal(first, again)
        assert relative_error(first, exact) <= TOLERANCES[torch.float32], (multiprocessors, scratch)


def test_offsets_within_a_program_fit_into_32_bits(monkeypatch):
    for images, rows in ((1, 4), (7, 1), (200, 2), (3, 28)):
        for values in (1000, 2**26, 2**30, 2**33):
            taken = _triton._split_rows(images, rows, 64, values)
            assert 64 % taken == 0
            assert taken == 1 or taken * values < 2**31
    # The numbers are the same when images no longer fit together.
    input, weight, grad = operands(3, 2, (5, 16), (7, 7))
    before = errors(input, weight, grad, ANY)
    monkeypatch.setattr(_triton, "LARGEST_OFFSET", 1)
    _triton._split_rows.cache_clear()
    try:
        assert _triton._split_rows(3, 2, 16, 160) == 1
        assert errors(input, weight, grad, ANY) == pytest.approx(before, rel=0.5)
    finally:
        _triton._split_rows.cache_clear()


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    kernel=st.tuples(*(st.integers(0, 50).map(lambda n: 2 * n + 1) for _ in range(2))),
    config=st.sampled_from(list(_triton.CONFIGS)),
    itemsize=st.sampled_from([2, 4]),
)
def test_tiles_cover_the_map_and_windows_every_tap(height, width, kernel, config, itemsize):
    config = _triton.CONFIGS[config]
    tiling = _triton.choose_tiling(height, width, kernel, config, itemsize)
    low, high = _triton._shift_range(tiling, width, kernel[1])
    assert 16 <= tiling.rows * tiling.columns <= config.block_n  # tl.dot takes no less than 16
    assert tiling.window_rows * tiling.window_columns == config.block_k // (itemsize // 2)
    assert tiling.reach % 8 == 0
    assert tiling.row_steps * tiling.window_rows >= kernel[0] - 1 + tiling.rows
    # What the docstrings say about memory.
    assert (
        tiling.rows - 1 + tiling.row_steps * tiling.window_rows <= kernel[0] + config.block_n // 4 + config.block_k // 8
    )
    assert high - low + 1 <= kernel[1] + 217
    assert tiling.row_steps * tiling.window_rows <= kernel[0] + config.block_n // 8 + config.block_k // 8
    whole = _triton.choose_tiling(height, width, kernel, config, itemsize, clipped=False)
    assert whole.column_steps * whole.window_columns <= kernel[1] + 136
    for first in range(0, width, tiling.columns):
        start, end = _triton._window(first, tiling.columns, width, tiling.reach, kernel[1])
        half = kernel[1] // 2
        assert start <= max(0, first - half)
        assert end >= min(width, first + tiling.columns + half)
        assert (start - first) % 8 == 0
        # The first entry and the last of the Toeplitz block lie within the copy.
        steps = -(-(end - start) // tiling.window_columns)
        assert low <= start - first - (tiling.columns - 1) + half
        assert start - first + steps * tiling.window_columns - 1 + half <= high


def test_sizes_share_kernels():
    kernels = (_triton._copy_kernel, _triton._convolve_kernel, _triton._toeplitz_gradient_kernel, _triton._sum_kernel)
    parameters = [set(inspect.signature(kernel.fn).parameters) for kernel in kernels]
    assert set(_triton.VARYING) <= set.union(*parameters)  # else Triton would be told nothing
    wide = ("weight_gradient", (64, 64, 56, 56))
    assert "triton-wide" not in _triton.worth_timing(*wide, torch.float32, "tf32")
    assert "triton-wide" in _triton.worth_timing(*wide, torch.bfloat16, "ieee")


def test_what_is_supported():
    shape, config = (2, 8, 56, 56), _triton.CONFIGS["triton"]
    for dtype, expected in (
        (torch.float16, True),
        (torch.bfloat16, True),
        (torch.float32, True),
        (torch.double, False),
    ):
        assert _triton.is_supported(shape, (31, 31), dtype, config) == expected
    assert not _triton.is_supported((1, 1, 2**13, 2**13), (31, 31), torch.float16, config)
    unpadded = _triton.CONFIGS["triton-unpadded"]
    widths = [w for w in range(1, 33) if _triton.is_supported((1, 1, 8, w), (7, 7), torch.float16, unpadded)]
    assert widths == [4, 12, 20, 28]


# What the compiler makes of the kernels needs no GPU; compiled as they are, not interpreted, so in another process.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lk_backbones.ops import _triton

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

class Recorder:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return lambda *args, **options: calls.append((self.kernel, args, options))

def compile_call(kernel, args, options, capability):
    compiler = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    values = dict(zip((p.name for p in kernel.params), args)) | options
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler)

def main_loop(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(binary)
    text = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    Path(file.name).unlink()
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\\.L_\\S+):", line.strip()))}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*`\\((\\.L_\\S+)\\)", line)
        if jump and labels.get(jump[1], i) < i:
            loops.append("\\n".join(lines[labels[jump[1]] : i + 1]))
    count = lambda pattern, text: len(re.findall(pattern, text))
    mma = r"\\b(?:HMMA|HGMMA|UTC\\w*MMA)"
    loop = max(loops, key=lambda loop: count(mma, loop))
    return {
        "products": count(mma, loop), "spills": count(r"\\b(?:STL|LDL)\\b", loop),
        "copies": count(r"\\bLDGSTS", loop), "copies of 16 bytes": count(r"\\bLDGSTS\\S*\\.128", loop),
        "narrow loads": count(r"\\bLDG\\S*\\.(?:U16|U8|S16)", loop),
    }

for name in ("_copy_kernel", "_convolve_kernel", "_toeplitz_gradient_kernel", "_sum_kernel"):
    setattr(_triton, name, Recorder(getattr(_triton, name)))
results = []
capability, cases = json.loads(sys.argv[1])
for shape, kernel, dtype, config, precision in cases:
    calls = []
    input = torch.empty(shape, dtype=getattr(torch, dtype))
    weight = torch.empty(shape[1], 1, *kernel, dtype=input.dtype)
    options = {"config": _triton.CONFIGS[config], "precision": precision}
    _triton.convolve(input, weight, **options)
    _triton.weight_gradient(input, input, tuple(kernel), **options)
    for kernel_function, args, settings in calls:
        compiled = compile_call(kernel_function, args, dict(settings), capability)
        name = kernel_function.__name__
        if name in ("_convolve_kernel", "_toeplitz_gradient_kernel"):
            loop = main_loop(compiled.asm["cubin"]) | {"shared memory": compiled.metadata.shared}
            results.append([name, [shape, kernel, dtype, config, precision], loop])
print(json.dumps(results))
"""

STAGES = [((64, 128, 56, 56), (31, 31)), ((64, 256, 28, 28), (29, 29)), ((64, 1024, 7, 7), (13, 13))]
COMPILED = [
    *((shape, kernel, "bfloat16", "triton", "ieee") for shape, kernel in STAGES),
    ((2, 128, 128, 128), (31, 31), "float16", "triton", "ieee"),
    ((2, 96, 128, 128), (101, 101), "bfloat16", "triton", "ieee"),
    ((64, 96, 56, 56), (51, 5), "bfloat16", "triton", "ieee"),
    (*STAGES[0], "bfloat16", "triton-wide", "ieee"),
    (*STAGES[0], "bfloat16", "triton-narrow", "ieee"),
    (*STAGES[0], "bfloat16", "triton-small", "ieee"),
    (*STAGES[0], "float32", "triton", "tf32"),
    (*STAGES[0], "float32", "triton-small", "tf32x3"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="Triton for Windows brings no disassembler")
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_compiled_loops_load_vectors_and_spill_nothing(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    chosen = {80: (0, 6, 10), 86: (0, 10), 100: (0, 9)}.get(capability, range(len(COMPILED)))
    cases = [COMPILED[index] for index in chosen]
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([capability, cases])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) >= 2 * len(cases)
    for kernel, case, loop in results:
        assert loop["products"] > 0, (kernel, case, loop)
        # Of smaller cards, 8.6, 8.9 and 12.0 alike; what does not fit larger ones' is not launched there.
        fits = loop["shared memory"] <= (101_376 if capability == 86 else 166_912)
        assert fits or (case[3] == "triton-wide" and capability == 86), (kernel, case, loop)
        assert loop["narrow loads"] == 0, (kernel, case, loop)
        if case[4] == "tf32x3" and kernel == "_toeplitz_gradient_kernel":
            continue  # three products of each kind leave too few registers
        assert loop["spills"] == 0, (kernel, case, loop)
        if case[2] == "float32" and kernel == "_toeplitz_gradient_kernel":
            continue  # tensor cores take TF32 in one order only, for which the transposed operand loads in parts
        assert loop["copies"] == loop["copies of 16 bytes"] > 0, (kernel, case, loop)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "kernel"), [*STAGES, ((2, 96, 128, 128), (101, 101)), ((64, 96, 56, 56), (51, 5))])
def test_real_shapes_on_a_gpu(shape, kernel, dtype):
    batch, channels, *size = shape
    input, weight, grad = operands(min(batch, 8), channels, size, kernel, dtype)
    for config in _triton.worth_timing("forward", shape, dtype, "ieee"):
        output, grad_input, grad_weight = errors(input, weight, grad, _triton.CONFIGS[config])
        assert max(output, grad_input) <= TOLERANCES[dtype], config
        assert grad_weight <= TOLERANCES[torch.float32] * 4, config


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_more_than_two_billion_values_on_a_gpu():
    shape, kernel = (33, 64, 1024, 1024), (7, 7)
    if torch.cuda.mem_get_info()[0] < 5 * 2 * math.prod(shape):
        pytest.skip("needs more memory than this GPU has free")
    input = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    input[-1, -1] = torch.randn(1024, 1024, device=DEVICE)
    weight = torch.randn(64, 1, *kernel, device=DEVICE, dtype=torch.float16)
    output = _triton.convolve(input, weight)
    expected = convolution(input[-1, -1][None, None].double(), weight[-1:].double())
    assert relative_error(output[-1:, -1:], expected) <= TOLERANCES[torch.float16]
    assert not output[0].any()
