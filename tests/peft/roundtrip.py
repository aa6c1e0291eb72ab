"""Checks by hand that adapters travel between PEFT and this crate without loss. `README.md` says how to run it."""

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import BOFTConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2ForImageClassification
from transformers.utils import logging

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures/peft"
sys.path.insert(0, str(FIXTURES))
import make  # noqa: E402  the toy models; also lets PEFT run BOFT with several factors

DINOV2_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def near(what, found, expected, tolerance):
    """Asserts that two tensors agree, relative to the largest number expected."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
    assert error <= tolerance, f"{what} differs by {error:.1e}"
    return error


def same_bits(what, found, expected):
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    found, expected = found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    assert torch.equal(found, expected), f"{what} has changed"


def load_in_peft(model, folder):
    """The model with the adapter, where PEFT has nothing to say about the files."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What PEFT says about any adapter with such a size, and what transformers says about PEFT.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Invalid `(oft_block_size|r)`")
        model = PeftModel.from_pretrained(model, folder).eval()
        result = model.load_adapter(folder, "default")
    assert not result.missing_keys and not result.unexpected_keys, result
    make.rotate_conv_weights(model)
    return model


def is_older_series(config):
    """Whether the adapter needs the Neumann series of PEFT 0.16 and 0.17, which PEFT no longer computes."""
    version = [int(part) for part in re.findall(r"\d+", config.get("peft_version") or "0.0")[:2]]
    return config.get("use_cayley_neumann", False) and version < [0, 18]


def comparable(key, tensor, config):
    """What of a tensor carries meaning: the skew part of BOFT's squares; the projection of constrained numbers."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if key.endswith(".boft_R"):
        return 0.5 * (tensor - tensor.mT)
    if key.endswith((".oft_R.weight", ".oft_embedding_R.weight")) and config["coft"]:
        radius = config["eps"] / len(tensor) ** 0.5
        return tensor * (radius / (2**0.5 * tensor.norm(dim=1, keepdim=True))).clamp_max(1)
    return tensor


def check_tensors(folder, rewritten):
    """Asserts that the tensors are the same, bit for bit, where they carry meaning."""
    config, before = read(folder)
    _, after = read(rewritten)
    # Two keys that PEFT writes by mistake where all biases and a whole module are saved.
    before = {key: t for key, t in before.items() if not re.search(r"\.(original_module|modules_to_save)\.", key)}
    assert after.keys() == before.keys(), f"keys: {sorted(after.keys() ^ before.keys())}"
    for key in before:
        found, expected = (comparable(key, tensors[key], config) for tensors in (after, before))
        if config.get("coft") and key.endswith((".oft_R.weight", ".oft_embedding_R.weight")):
            near(key, found, expected, 1e-6)  # a projection of a projection rounds
        else:
            same_bits(key, found, expected)


def toy(case, program):
    """One fixture: through the program, into PEFT, and through the program once more."""
    with safe_open(case / "reference.safetensors", "pt") as file:
        metadata = file.metadata()
    reference = load_file(case / "reference.safetensors")
    base = {key.removeprefix("base."): t for key, t in reference.items() if key.startswith("base.")}
    if metadata["model"] == "linear":
        model = make.Linear(*reversed(base["layer.weight"].shape), bias="layer.bias" in base)
    else:
        model = {"mlp": make.Mlp, "conv": make.Conv, "text": make.Text, "stack": make.Stack}[metadata["model"]]
        model = model(metadata["norm"]) if "norm" in metadata else model()
    model.load_state_dict(base)
    model.eval()

    with tempfile.TemporaryDirectory() as scratch:
        out, again = Path(scratch) / "out", Path(scratch) / "again"
        subprocess.run([program, case, out], check=True)
        output = load_file(out / "output.safetensors")["output"]
        error = near("output", output, reference["output"], 1e-5)
        if case.parent.name == "cases":
            check_tensors(case, out)
        if not is_older_series(read(out)[0]):
            near("PEFT's output", load_in_peft(model, out)(reference["input"]), output, 1e-5)

        shutil.copyfile(case / "reference.safetensors", out / "reference.safetensors")
        subprocess.run([program, out, again], check=True)
        check_tensors(out, again)
        assert read(out)[0] == read(again)[0], "the settings have changed on the second way"
    return error


def dinov2_backbone(num_labels):
    """The backbone of `examples/dinov2` in transformers, with a new head."""
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=8, patch_size=2, num_channels=1)
    with tempfile.TemporaryDirectory() as scratch:
        Dinov2Config(**sizes, num_labels=num_labels).save_pretrained(scratch)
        tensors = load_file(ROOT / "examples/dinov2/data/backbone.safetensors")
        save_file(tensors, Path(scratch) / "model.safetensors", {"format": "pt"})
        model, report = Dinov2ForImageClassification.from_pretrained(scratch, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}, report
    assert not report["unexpected_keys"], report
    return model.eval()


def dinov2(adapter, program):
    """Logits of an adapter that `examples/dinov2` trained, and of one that PEFT made, on both sides."""
    config, tensors = read(adapter)
    head = next(tensor for key, tensor in tensors.items() if key.endswith("classifier.weight"))
    model, generator = dinov2_backbone(len(head)), torch.Generator().manual_seed(7)
    pixels = torch.randn(5, 1, 8, 8, generator=generator)

    def compare(what, wrapped, folder, scratch):
        layers = [layer for layer in wrapped.modules() if isinstance(layer, BaseTunerLayer)]
        assert len(layers) == 24, f"{len(layers)} layers are adapted, expected 24"
        expected = wrapped(pixels).logits
        change = (expected - model(pixels).logits).abs().max()
        assert change > 0.01, f"{what}: the adapter moves the logits by no more than {change}"
        save_file({"pixels": pixels}, scratch / "pixels.safetensors")
        subprocess.run([program, folder, scratch / "pixels.safetensors", scratch / "logits.safetensors"], check=True)
        error = near(what, load_file(scratch / "logits.safetensors")["logits"], expected, 1e-4)
        print(f"ok    {what}: logits agree to {error:.1e}")

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        compare("DINOv2, Burn to PEFT", load_in_peft(copy.deepcopy(model), adapter), adapter, scratch)

        sizes = dict(boft_block_size=4, boft_n_butterfly_factor=2, bias="boft_only", modules_to_save=["classifier"])
        wrapped = get_peft_model(copy.deepcopy(model), BOFTConfig(target_modules=DINOV2_TARGETS, **sizes)).eval()
        make.perturb_adapter(wrapped, generator, strength=0.1)
        wrapped.save_pretrained(scratch / "adapter")
        compare("DINOv2, PEFT to Burn", wrapped, scratch / "adapter", scratch)


def main():
    parser = argparse.ArgumentParser(description="Checks that adapters travel between PEFT and burn-boft without loss.")
    parser.add_argument("cases", nargs="*", type=Path, help="fixture folders; all if none is given")
    parser.add_argument("--dinov2", type=Path, metavar="FOLDER", help="an adapter that examples/dinov2 trained")
    programs = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"
    parser.add_argument("--program", type=Path, default=programs / "roundtrip", help="the toy program")
    parser.add_argument("--logits", type=Path, default=programs / "logits", help="the DINOv2 program")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()

    if args.dinov2:
        dinov2(args.dinov2, args.logits)
    if args.dinov2 and not args.cases:
        return
    failed = 0
    for case in args.cases or sorted(FIXTURES.glob("*/*")):
        name = f"{case.parent.name}/{case.name}"
        try:
            print(f"ok    {name}: output agrees to {toy(case, args.program):.1e}", flush=True)
        except Exception as error:  # every case gets its line
            failed += 1
            print(f"FAIL  {name}: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
