"""Names and weights of encoders: what is understood, and what is refused with which words."""

import argparse
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

from lk_backbones.tasks.encoder import EncoderSpec, load_encoder_weights, resolve_encoder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("resnet18", None), EncoderSpec("resnet18", None)),
        (("resnet18", "imagenet"), EncoderSpec("resnet18", "imagenet")),
        (("resnet18", True), EncoderSpec("resnet18", "imagenet")),
        (("resnet18", "ssl"), EncoderSpec("resnet18", "ssl")),
        (("tu-resnet18", None), EncoderSpec("tu-resnet18", None)),
        (("tu-resnet18", False), EncoderSpec("tu-resnet18", None)),
        (("tu-resnet18", "pretrained"), EncoderSpec("tu-resnet18", True)),
        (("tu-resnet18", "a1_in1k"), EncoderSpec("tu-resnet18.a1_in1k", True)),
        (("tu-resnet18.a1_in1k", True), EncoderSpec("tu-resnet18.a1_in1k", True)),
        (
            ("convnext_atto", None, {"drop_path_rate": 0.1}),
            EncoderSpec("tu-convnext_atto", None, {"drop_path_rate": 0.1}),
        ),
        # without loading: a file may be gone, a tag stays
        (("tu-resnet18", "gone.pth", None, False), EncoderSpec("tu-resnet18", None)),
        (("tu-resnet18", "a1_in1k", None, False), EncoderSpec("tu-resnet18.a1_in1k", None)),
        (("resnet18", "imagenet", None, False), EncoderSpec("resnet18", None)),
        # one of ours goes through timm under either name, so that its keyword arguments arrive
        (
            ("replknet_31n", None, {"drop_path_rate": 0.1}),
            EncoderSpec("tu-replknet_31n", None, {"drop_path_rate": 0.1}),
        ),
        # weights that we fetch and map ourselves: our own, and every source
        (("replknet_31b", "in1k"), EncoderSpec("tu-replknet_31b.in1k", None, {}, "replknet_31b.in1k")),
        (("replknet_31b.in1k_384", True), EncoderSpec("tu-replknet_31b.in1k_384", None, {}, "replknet_31b.in1k_384")),
        (("replknet_31b", True), EncoderSpec("tu-replknet_31b", None, {}, "replknet_31b")),
        (("replknet_31b", "in1k", None, False), EncoderSpec("tu-replknet_31b.in1k", None)),
        (
            ("replknet_31b", "upernet_replknet_31b.in1k_ade20k_512"),
            EncoderSpec("tu-replknet_31b", None, {}, "upernet_replknet_31b.in1k_ade20k_512"),
        ),
        (("replknet_31n", "hf-hub:you/name@v1"), EncoderSpec("tu-replknet_31n", None, {}, "hf-hub:you/name@v1")),
        (("resnet18", "hf-hub:you/name"), EncoderSpec("resnet18", None, {}, "hf-hub:you/name")),
        (("tu-resnet18", "hf-hub:you/name", None, False), EncoderSpec("tu-resnet18", None)),
    ],
)
def test_understood(arguments, expected) -> None:
    assert resolve_encoder(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replknet_31m", None), "unknown encoder 'replknet_31m'; did you mean 'replknet_31"),
        (("resnet19", None), "unknown encoder 'resnet19'; did you mean 'resnet1"),
        (("tu-convnext_ato", None), "unknown encoder 'tu-convnext_ato'; did you mean 'convnext_atto'"),
        (("resnet18", None, {"drop_path_rate": 0.1}), r"\['drop_path_rate'\] would be dropped.*'tu-resnet18'"),
        (("resnet18", "imagenett"), r"smp has no weights 'imagenett' for 'resnet18'.*did you mean 'imagenet'"),
        (
            ("tu-resnet18", "a1_in2k"),
            "'a1_in2k' is neither a Hub repository.*, a local file nor weights of 'tu-resnet18'.*'a1_in1k'",
        ),
        (("tu-resnet18.a1_in1k", "a2_in1k"), "neither a Hub repository.*nor weights of 'tu-resnet18.a1_in1k'"),
        (("replknet_31n", True), "nobody published weights for 'replknet_31n'"),
    ],
)
def test_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_encoder(*arguments)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'nowhere/weights\.safetensors'"):
        resolve_encoder("tu-resnet18", "nowhere/weights.safetensors")


def build(spec: EncoderSpec) -> torch.nn.Module:
    encoder = smp.encoders.get_encoder(spec.name, weights=spec.weights, **spec.kwargs)
    load_encoder_weights(encoder, spec)
    return encoder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_local_file_arrive(tmp_path: Path, suffix: str) -> None:
    source = timm.create_model("replknet_31n")
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    encoder = build(resolve_encoder("replknet_31n", str(file)))
    state = source.state_dict()
    torch.testing.assert_close(encoder.state_dict()["model.stem_0.conv.weight"], state["stem.0.conv.weight"])
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, state[name.removeprefix("model.").replace("_", ".", 1)])


class _Payload:
    """What a malicious checkpoint does: run a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


def test_a_pickle_of_more_than_weights_is_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"state_dict": {}, "evil": _Payload(trace)}, file)
    with pytest.raises(ValueError, match=r"evil\.pth' is a pickle of more than weights.*safetensors"):
        build(resolve_encoder("tu-resnet18", str(file)))
    assert not trace.exists()


def test_the_command_line_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "with_args.pth"
    source = timm.create_model("resnet18")
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1e-3)}, file)
    encoder = build(resolve_encoder("tu-resnet18", str(file)))
    torch.testing.assert_close(encoder.state_dict()["model.conv1.weight"], source.conv1.weight.detach())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("convnext_atto").state_dict(), file)
    with pytest.raises(
        RuntimeError, match=r"weights\.safetensors' does not hold weights of 'resnet18': .*missing.*conv1\.weight"
    ):
        build(resolve_encoder("tu-resnet18", str(file)))
    with pytest.raises(RuntimeError, match=r"'convnext_femto': .*of another shape.*stem_0\.weight \(40, 3"):
        build(resolve_encoder("tu-convnext_femto", str(file)))
    file.write_bytes(b"not a weight file")
    with pytest.raises(ValueError, match=r"weights\.safetensors' is not a whole safetensors file"):
        build(resolve_encoder("tu-resnet18", str(file)))


def test_a_few_missing_tensors_are_only_mentioned(tmp_path: Path) -> None:
    state = timm.create_model("convnext_atto").state_dict()
    del state["stages.3.blocks.1.conv_dw.bias"]
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    with pytest.warns(UserWarning, match=r"lacks 1 tensors of 'tu-convnext_atto'.*stages_3\.blocks\.1\.conv_dw\.bias"):
        build(resolve_encoder("tu-convnext_atto", str(file)))
