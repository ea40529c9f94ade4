"""``lk-backbones tune`` on a pretended GPU, and what it says where there is none."""

import pytest
import timm
import torch

from lk_backbones.analysis.tuning import tune
from lk_backbones.cli import main
from lk_backbones.ops import _cuda, choices_file, measured_choices

KINDS = ("forward", "input_gradient", "weight_gradient")


@pytest.fixture
def without_triton(monkeypatch, pretended_gpu):  # the interpreter takes its time
    monkeypatch.setattr(_cuda, "_kernels", lambda: None)
    return pretended_gpu


def test_every_layer_is_measured_once(without_triton):
    without_triton["fft"] = 1.0
    torch.manual_seed(0)
    model = timm.create_model("replknet_31n")
    options = {"size": (64, 64), "batch_size": 2, "device": "cpu", "dtype": torch.float32}
    tuned = tune(model, **options)
    kernels = {tuple(m.kernel_size) for m in model.modules() if getattr(m, "groups", 1) > 1 and m.kernel_size[0] > 5}
    # Four stages, each with its map; the small kernels beside the large ones are PyTorch's.
    assert tuned.measured == len(tuned.choices) >= 3 * len(kernels)
    assert choices_file().is_file()
    assert tuned.choices == measured_choices()
    assert {choice.path for choice in tuned.choices.values()} == {"fft"}
    for kind in KINDS:
        assert sum(f"result {kind};" in key for key in tuned.choices) >= len(kernels)
    again = tune(model, **options)
    assert again.choices == tuned.choices
    assert again.measured == 0
    inference = tune(model, **{**options, "batch_size": 8}, training=False)
    assert inference.measured == len(inference.choices) == len(tuned.choices) / 3
    assert all("result forward;" in key and "batch ~8;" in key for key in inference.choices)


def test_tables(without_triton, capsys):
    without_triton["fft"] = 0.125
    command = ["tune", "replknet_31n", "--input-size", "64", "--batch-size", "1", "--dtype", "float32"]
    main([*command, "--device", "cpu", "--no-training"])
    out = capsys.readouterr().out
    assert "classes of problems, " in out
    assert "measured now, in" in out
    main(["tune", "--show"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Pretended Card (9.0), torch" in shown
    assert "0.125" in shown
    assert "native 100.000" in shown
    assert f"classes of problems in {choices_file()}" in shown.replace("\n", "") or str(choices_file()) in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "replknet_31n", "--input-size", "64", "--batch-size", "1"])
    assert "that is for CUDA devices and auto" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("args", [[], ["replknet_31n", "--show"], ["--input-size", "0", "replknet_31n"]])
def test_bad_arguments(args, capsys):
    with pytest.raises(SystemExit):
        main(["tune", *args])
    assert capsys.readouterr().err
