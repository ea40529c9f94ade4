"""Weight files that lie: other kinds of numbers, keys, sizes and checksums. Each is one error of file and key."""

from __future__ import annotations

import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

from lk_backbones import hub as lk_hub
from lk_backbones.encoders._names import translate
from lk_backbones.weights import WeightsError, pull
from tests.conftest import load_golden
from tests.hostile.conftest import Refused

TINY: dict[str, Any] = {"depths": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "kernel_sizes": 3, "num_classes": 5}
KEY = "stem.0.conv.weight"
CONVERT = ["convert", "--model", "replknet_31n", "--model-kwargs", json.dumps(TINY), "--to", "out"]


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(timm.create_model("replknet_31n", **TINY).state_dict())


def floats(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change every weight; the counters of batch norms stay."""
    return lambda state: {k: function(v) if v.is_floating_point() else v for k, v in state.items()}


def one(function: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: state | {KEY: function(state[KEY])}


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return change


# What is done to an honest state dict, and what the error must name.
KINDS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "int8": (floats(lambda v: v.to(torch.int8)), "numbers of type int8 instead of float32"),
    "int64": (floats(lambda v: v.long()), "numbers of type int64 instead of float32"),
    "one int32": (one(lambda v: v.int()), f"{KEY} holds numbers of type int32"),
    "bool": (floats(lambda v: v > 0), "numbers of type bool instead of float32"),
    "complex": (one(lambda v: v.to(torch.complex64)), f"{KEY} holds numbers of type complex64"),
    "float8": (one(lambda v: v.to(torch.float8_e4m3fn)), f"{KEY} holds numbers of type float8_e4m3fn"),
    "NaN": (one(with_value(float("nan"))), f"{KEY} holds NaN or infinity"),
    "infinity": (one(with_value(float("-inf"))), f"{KEY} holds NaN or infinity"),
    "too large for float32": (one(lambda v: v.double() * 1e300), f"{KEY} holds numbers that float32 cannot hold"),
    "all NaN": (floats(lambda v: v * float("nan")), "holds NaN or infinity and"),
    "sparse": (one(lambda v: v.to_sparse()), f"'{KEY}' is sparse_coo"),
    "sparse rows": (one(lambda v: v.flatten(1).to_sparse_csr()), f"'{KEY}' is sparse_csr"),
    "nested": (one(lambda v: torch.nested.nested_tensor([v[0], v[1]])), "nested"),
    "without values": (one(lambda v: v.to("meta")), f"'{KEY}' is without values"),
    "quantised": (one(lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), f"'{KEY}' is quantised"),
    "a number repeated": (one(lambda v: torch.zeros(1, 1, 1, 1).expand(v.shape)), f"'{KEY}' is of shape (8, 3, 3, 3)"),
    "a tiny file of 40 GB": (one(lambda v: torch.zeros(1).expand(10**10)), "does not hold as many numbers"),
    "overlapping rows": (one(lambda v: torch.zeros(30).as_strided((8, 3, 3, 3), (1, 1, 1, 1))), "as many numbers"),
    "a key of bytes": (lambda state: state | {b"stem": torch.ones(1)}, "key b'stem', which is no text but a bytes"),
    "a number for a key": (lambda state: state | {3: torch.ones(1)}, "the key 3, which is no text but a int"),
    "None for a key": (lambda state: state | {None: torch.ones(1)}, "the key None"),
    "a key of a million letters": (lambda state: state | {"x" * 10**6: torch.ones(1)}, "a key of 1000000 letters"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "name"), KINDS.values(), ids=KINDS)
def test_what_is_no_weight_is_named(
    change: Callable[..., Any], name: str, state: dict[str, Any], workspace: Path, refused: Refused
) -> None:
    torch.save({"state_dict": change(state)}, "weights.pth")
    refused([*CONVERT, "weights.pth"], "weights.pth", name)


@pytest.mark.parametrize("kind", ["int8", "bool", "complex", "float8", "NaN", "infinity", "too large for float32"])
def test_the_same_as_safetensors(kind: str, state: dict[str, Any], workspace: Path, refused: Refused) -> None:
    if kind == "complex":
        pytest.importorskip("safetensors", minversion="0.7")  # the first that knows them
    change, name = KINDS[kind]
    save_file({key: value.contiguous() for key, value in change(state).items()}, "weights.safetensors")
    refused([*CONVERT, "weights.safetensors"], "weights.safetensors", name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(dtype: torch.dtype, state: dict[str, Any], workspace: Path) -> None:
    torch.save({key: value.to(dtype) for key, value in state.items()}, "weights.pth")  # the counters too
    model = timm.create_model("replknet_31n", **TINY)
    report = lk_hub.load_weights(model, "weights.pth")
    assert len(report.loaded) == len(state)
    assert torch.equal(model.state_dict()[KEY], state[KEY].to(dtype).float())
    model = timm.create_model("replknet_31n", **TINY).to(dtype)
    lk_hub.load_weights(model, "weights.pth")
    assert torch.equal(model.state_dict()[KEY], state[KEY].to(dtype))


def test_integers_and_infinity_where_the_model_has_them(workspace: Path) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    model.register_buffer("index", torch.arange(4))
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(expected, "weights.pth")
    lk_hub.load_weights(model, "weights.pth")
    assert torch.equal(model.mask, expected["mask"])
    torch.save(expected | {"index": torch.tensor([0.5, 1, 2, 3])}, "weights.pth")
    with pytest.raises(WeightsError, match=r"weights\.pth' holds no usable weights: index holds fractions"):
        lk_hub.load_weights(model, "weights.pth")


def test_tied_and_strided_weights_are_weights(state: dict[str, Any], workspace: Path) -> None:
    twisted = {key: v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() > 1 else v for key, v in state.items()}
    torch.save(twisted | {"tied": twisted[KEY]}, "weights.pth")
    model = timm.create_model("replknet_31n", **TINY)
    lk_hub.load_weights(model, "weights.pth", strict=False)
    assert torch.equal(model.state_dict()[KEY], state[KEY])


def test_smp_loads_no_nan_either(state: dict[str, Any]) -> None:
    encoder = smp.encoders.get_encoder("replknet_31n", weights=None)
    own = {key: value.clone() for key, value in encoder.state_dict().items()}
    first = next(iter(own))
    with pytest.raises(WeightsError, match=r"holds NaN"):
        encoder.load_state_dict(own | {first: own[first] * float("nan")})
    with pytest.raises(WeightsError, match=r"type int32"):
        encoder.load_state_dict(own | {first: own[first].int()})
    encoder.load_state_dict(own)


# --- archives and pickles ---


def compressed(file: Path) -> None:
    torch.save({"a": torch.zeros(10_000_000)}, "honest.pth")
    with zipfile.ZipFile("honest.pth") as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    Path("honest.pth").unlink()


def flipped(file: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncated(file: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, file)
    file.write_bytes(file.read_bytes()[:-300])


def deep(file: Path) -> None:
    # a pickle of 100 000 lists in lists, written by hand: Python's own pickler would not get that far
    body = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    torch.save({"a": torch.zeros(1)}, "honest.pth")
    with zipfile.ZipFile("honest.pth") as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, body if is_pickle else source.read(entry))
    Path("honest.pth").unlink()


def lying_legacy(file: Path) -> None:
    """An old-format file whose storage claims 40 GB."""
    torch.save({"a": torch.zeros(4)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert content.count(struct.pack("<q", 4)) == 1
    file.write_bytes(content.replace(struct.pack("<q", 4), struct.pack("<q", 10**10)))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed 1000 times": (compressed, "is a compressed archive, which would grow from"),
    "a bit flipped": (flipped, "checksum of 'weights/data/0' in it is wrong"),
    "truncated": (truncated, "truncated"),
    "nested": (deep, "weights.pth"),
    "40 GB in the old format": (lying_legacy, "cannot be read as weights"),
    "empty": (lambda file: file.write_bytes(b""), "truncated"),
    "only the start of an archive": (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(100)), "no whole archive"),
    "of another kind": (lambda file: file.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100)), "truncated or no weight file"),
    "a list": (lambda file: torch.save([torch.zeros(1)], file), "holds a list, not weights by name"),
    "nothing": (lambda file: torch.save({}, file), "holds no tensors by name"),
    "dictionaries in dictionaries": (lambda file: torch.save({"model": {"model": {}}}, file), "no tensors by name"),
    "an ordered empty one": (lambda file: torch.save(OrderedDict(state_dict=OrderedDict()), file), "no tensors"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("write", "name"), FILES.values(), ids=FILES)
def test_a_broken_file_is_named(write: Callable[[Path], object], name: str, workspace: Path, refused: Refused) -> None:
    write(Path("weights.pth"))
    error = refused(["hub", "pull", "weights.pth"], "weights.pth", name)
    assert "weights_only" not in error  # torch's advice, which would run what is in the file


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = {
    "header too long": safetensors({"a": entry()}, bytes(8), 10_000),
    "header of an exabyte": safetensors({"a": entry()}, bytes(8), 1 << 60),
    "header of -1": safetensors({"a": entry()}, bytes(8), (1 << 64) - 1),
    "header cut": safetensors({"a": entry()}, bytes(8), 5),
    "overlapping": safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": safetensors({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": safetensors({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "backwards": safetensors({"a": entry(offsets=(8, 0))}, bytes(8)),
    "absurd shape": safetensors({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)),
    "product of 0 and 2**63": safetensors({"a": entry(shape=(1 << 63, 1 << 63, 0), offsets=(0, 0))}),
    "negative shape": safetensors({"a": entry(shape=(-2,))}, bytes(8)),
    "shape of text": safetensors({"a": entry(shape="ab")}, bytes(8)),
    "offsets of text": safetensors({"a": entry(offsets="ab")}, bytes(8)),
    "unheard-of type": safetensors({"a": entry(dtype="F31")}, bytes(8)),
    "no object": safetensors([1, 2]),
    "deep": safetensors(b"[" * 100_000),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "no tensors": safetensors({}),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "left over": safetensors({"a": entry()}, bytes(80)),
    "a key of a million letters": safetensors({"x" * 10**6: entry()}, bytes(8)),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors_that_lie(content: bytes, workspace: Path, refused: Refused) -> None:
    Path("weights.safetensors").write_bytes(content)
    refused(["hub", "pull", "weights.safetensors"], "weights.safetensors")


# --- files as published, altered ---

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
UNIREPLKNET = {
    "depths": (2, 2, 4, 2),
    "channels": (8, 16, 32, 64),
    "kernel_sizes": (3, 13, (13, 3), 13),
    "num_classes": 10,
}
DILATED = "stages.1.0.dwconv.dil_conv_k5_1.weight"
ALTERED: dict[str, Change] = {
    "a bias of a block that is not there": lambda s: s | {"stages.9.9.pwconv2.0.bias": torch.ones(8)},
    "a bias of no block": lambda s: s | {"stages.x.pwconv2.0.bias": torch.ones(8)},
    "another dilation": lambda s: s | {DILATED.replace("k5_1", "k3_9"): torch.ones(16, 1, 3, 3)},
    "a dilation of many digits": lambda s: s | {DILATED.replace("k5_1", f"k3_{'9' * 900}"): torch.ones(16, 1, 3, 3)},
    "a flat first convolution": lambda s: s | {"downsample_layers.0.0.weight": torch.ones(3)},
    "no dimensions": lambda s: s | {"stages.0.0.pwconv2.0.weight": torch.tensor(1.0)},
    "too many dimensions": lambda s: s | {"stages.0.0.pwconv2.0.weight": torch.ones(1, 1, 1, 1, 1)},
    "a long response norm": lambda s: s | {"stages.0.0.act.1.gamma": torch.ones(1, 7, 7, 7)},
    "not finite": lambda s: s | {"stages.0.0.gamma": torch.full((8,), torch.nan)},
    "whole numbers": lambda s: s | {"stages.0.0.gamma": torch.ones(8, dtype=torch.int8)},
}


@pytest.mark.parametrize("way", ["hub", "timm"])
@pytest.mark.parametrize("name", ALTERED)
def test_a_published_file_that_was_altered(name: str, way: str, workspace: Path) -> None:
    torch.save(ALTERED[name](load_golden("unireplknet_tiny")["state"]), "altered.pth")
    if way == "hub":
        with pytest.raises(WeightsError, match=r"altered\.pth") as raised:
            lk_hub.load_weights(timm.create_model("unireplknet_a", **UNIREPLKNET), "altered.pth")
        assert len(str(raised.value)) < 2500
    else:  # timm reads the file; what it holds comes through our names
        file = {"pretrained": True, "pretrained_cfg_overlay": {"file": "altered.pth", "num_classes": 10}}
        with pytest.raises((WeightsError, RuntimeError)):
            timm.create_model("unireplknet_a", **UNIREPLKNET, **file)


def test_many_copies_of_an_encoder_are_not_all_compared(workspace: Path) -> None:
    """Every name could be that of the first of a copy's tensors."""
    state = load_golden("unireplknet_tiny")["state"]
    torch.save(state | {f"{i}.stem.0.conv.weight": torch.ones(1) for i in range(20_000)}, "copies.pth")
    model = timm.create_model("unireplknet_a", **UNIREPLKNET)
    compared = 0

    class Counted(dict):
        def __contains__(self, key: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__contains__(key)

    translate(Counted(torch.load("copies.pth")), model, model)
    assert compared < 500_000


# --- names of sources ---

SOURCES = {
    "": "the source of the weights is empty",
    "local-dir:": "the source of the weights is empty",
    "hf-hub:": "is no Hub repository",
    "hf-hub:you": "is no Hub repository",
    "hf-hub:/": "is no Hub repository",
    "hf-hub:you/x/../../y": "is no Hub repository",
    "hf-hub:you/..": "is no Hub repository",
    ".": "'.' holds no model.safetensors",
    "local-dir:.": "'.' holds no model.safetensors",
    "x" * 5000: "is neither a file, a folder nor published weights",
    "x" * 5000 + ".pth": "there is no file or folder 'xxx",
    "local-dir:" + "x" * 5000: "there is no file or folder",
    "nul\0.pth": "there is no file or folder",
    "~nobody-of-this-name/x.pth": "there is no file or folder",
    "~nobody-of-this-name": "is neither a file, a folder nor published weights",
    "a/" * 3000 + "x.ckpt": "there is no file or folder",
}


@pytest.mark.parametrize(("source", "name"), SOURCES.items(), ids=[s[:20] or "empty" for s in SOURCES])
def test_a_source_that_is_none(source: str, name: str, workspace: Path, refused: Refused) -> None:
    message = refused(["hub", "pull", source], name)
    assert len(message) < 1000


@pytest.mark.parametrize("call", [pull, lk_hub.load_model, lambda s: lk_hub.load_weights(torch.nn.Module(), s)])
def test_an_empty_source_in_python(call: Callable[[str], Any], workspace: Path) -> None:
    with pytest.raises(WeightsError, match=r"source of the weights is empty.*'hf-hub:owner/name', a folder"):
        call("")


def test_a_pickle_is_not_asked_what_it_holds_when_it_is_unsafe(workspace: Path, refused: Refused, canary: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (canary,))

    torch.save({"state_dict": {"a": Payload()}}, "weights.pth")
    refused(["hub", "pull", "weights.pth"], "weights.pth", "pickle of more than weights")
