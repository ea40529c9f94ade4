"""What a hook has kept of a module stays what the module gave: nothing later changes it in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from lk_backbones import prepack_weights, reparameterize
from lk_backbones.layers import restore_conv2d
from tests.conftest import randomize_norms

FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "folded": reparameterize,
    "packed": prepack_weights,
    "restored": restore_conv2d,
}


def changed_outputs(model: nn.Module, *args: object) -> list[str]:
    """Names of the modules whose output, or input, is another one after the forward pass than when a hook saw it."""
    kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            for kind, value in (("input", inputs), ("output", output)):
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        kept.append((f"{kind} of {name}", tensor, tensor.detach().clone()))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    model(*args)
    for handle in handles:
        handle.remove()
    assert kept
    return [name for name, tensor, before in kept if not torch.equal(tensor, before)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradients", [True, False])
def test_no_encoder_changes_what_a_hook_has_kept(small_encoder: str, form: str, gradients: bool) -> None:
    torch.manual_seed(0)
    model = FORMS[form](randomize_norms(timm.create_model(small_encoder, drop_path_rate=0.3)))
    with torch.set_grad_enabled(gradients):
        assert changed_outputs(model, torch.randn(2, 3, 64, 64)) == []


def test_grad_cam_of_a_branch(small_encoder: str) -> None:
    """Grad-CAM, from the activations of a module and their gradient, equals that of the same sum written out."""
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(small_encoder, num_classes=5)).eval()
    branches = [
        name.removesuffix(".conv")  # with its norm
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.kernel_size) > 5
    ]
    assert branches
    x = torch.randn(1, 3, 64, 64)
    for name in branches[-2:]:
        kept = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, args, output, kept=kept: kept.extend([output, output.detach().clone()])
        )
        score = model(x)[0, 1]
        handle.remove()
        activation, expected = kept
        (gradient,) = torch.autograd.grad(score, activation)
        weights = gradient.mean((2, 3), keepdim=True)
        cams = [(weights * maps).sum(1).relu() for maps in (activation, expected)]
        torch.testing.assert_close(cams[0], cams[1], rtol=0, atol=0)


def test_a_whole_segmentation_model(small_encoder: str) -> None:
    model = smp.create_model("upernet_openmmlab", small_encoder, encoder_weights=None, classes=3)
    assert changed_outputs(model, torch.randn(2, 3, 64, 64)) == []
