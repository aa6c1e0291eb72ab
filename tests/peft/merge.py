"""Merges adapters into a sharded transformers model with `burn-boft merge` and with PEFT, and compares.

    cargo build --release -p burn-boft-cli
    python tests/peft/merge.py

One line per case; the exit code is 1 if any failed.
"""

import copy
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import BOFTConfig, OFTConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/burn-boft"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Relative to the largest number, by precision of the base: one rounding of a bf16 number is 2^-8 of it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}

CASES = {
    "oft-neumann": OFTConfig(target_modules=ALL, oft_block_size=8, use_cayley_neumann=True),
    "oft-exact": OFTConfig(target_modules=ALL, oft_block_size=8, use_cayley_neumann=False),
    "boft": BOFTConfig(target_modules=ALL, boft_block_size=4, boft_n_butterfly_factor=1),
    "boft-head": BOFTConfig(
        target_modules=["q_proj", "down_proj"],
        boft_block_size=4,
        boft_n_butterfly_factor=1,
        modules_to_save=["lm_head"],
    ),
}


def randomized(model):
    """Moves everything that is trained away from where it starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tensors(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.state_dict()


def check(name, config, dtype, place):
    torch.manual_seed(1)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=96)
    base = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype)
    base.save_pretrained(place / "base", max_shard_size="60KB")
    randomized(get_peft_model(copy.deepcopy(base).float(), config)).save_pretrained(place / "adapter")

    arguments = ["merge", "--base", "base", "--adapter", "adapter", "--output", "ours"]
    subprocess.run([TOOL, *arguments], cwd=place, check=True, capture_output=True)
    shards = sorted(path.name for path in (place / "base").glob("*.safetensors"))
    assert len(shards) > 1 and shards == sorted(path.name for path in (place / "ours").glob("*.safetensors"))

    # In f32, and rounded once, as the tool does.
    wide = copy.deepcopy(base).float()
    merged = PeftModel.from_pretrained(wide, place / "adapter").merge_and_unload().to(dtype)
    merged.save_pretrained(place / "theirs")
    ours, theirs, before = tensors(place / "ours"), tensors(place / "theirs"), base.state_dict()
    assert ours.keys() == theirs.keys()
    worst, change = 0.0, 0.0
    for key, tensor in theirs.items():
        size = tensor.float().abs().max()
        worst = max(worst, ((ours[key].float() - tensor.float()).abs().max() / size).item())
        change = max(change, ((before[key].float() - tensor.float()).abs().max() / size).item())
    assert change > 0.01, "the adapter changes nothing"
    assert worst <= TOLERANCE[dtype], f"differs by {worst:.1e}"
    return f"{len(shards)} shards, weights agree to {worst:.1e}, changed by up to {change:.1e}"


def main():
    warnings.simplefilter("ignore")
    failed = False
    for dtype in TOLERANCE:
        for name, config in CASES.items():
            with tempfile.TemporaryDirectory() as place:
                try:
                    outcome = "ok    {}: {}"
                    text = check(name, copy.deepcopy(config), dtype, Path(place))
                except (AssertionError, subprocess.CalledProcessError) as error:
                    outcome, failed = "FAIL  {}: {}", True
                    text = getattr(error, "stderr", None) or error
            print(outcome.format(f"{name} {dtype}", text), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
