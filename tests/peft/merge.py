"""Merges adapters into transformers models with `burn-boft merge` and with PEFT, and compares.

    cargo build --release -p burn-boft-cli
    python tests/peft/merge.py                           # a Llama in shards
    python tests/peft/merge.py --random 400 --seed 1     # small models and configurations drawn at random

One line per case; the exit code is 1 if any failed. A case that is drawn at random must come out as PEFT merges it, or be
refused with a reason; its seed alone makes it again.
"""

import argparse
import collections
import copy
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from peft import BOFTConfig, OFTConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/fixtures/peft"))
import make  # noqa: E402  It lets PEFT run any number of factors without its CUDA extension.

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


# ----------------------------------------------------------------------------------------------------------------------
# Drawn at random
# ----------------------------------------------------------------------------------------------------------------------


def draw_model(rng):
    """A small model with random numbers, and names of its modules that are no layers to rotate."""
    width, inner, depth = rng.choice([24, 32, 48]), rng.choice([40, 64, 72]), rng.choice([1, 2, 3])
    text = dict(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=4, vocab_size=40,
        max_position_embeddings=16, pad_token_id=0,
    )
    image = dict(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, image_size=8, patch_size=4, num_channels=3,
        num_labels=rng.choice([2, 5]),
    )
    gpt2 = dict(n_embd=width, n_layer=depth, n_head=4, n_inner=inner, vocab_size=40, n_positions=16, pad_token_id=0)
    t5 = dict(
        d_model=width, d_kv=8, d_ff=inner, num_layers=depth, num_heads=4, vocab_size=40, decoder_start_token_id=0,
        feed_forward_proj=rng.choice(["relu", "gated-gelu"]), tie_word_embeddings=rng.random() < 0.5,
    )
    tied = rng.random() < 0.5
    kinds = {
        "llama": (LlamaForCausalLM, LlamaConfig(**text, num_key_value_heads=2), ["norm", "embed_tokens"]),
        "llama-tied": (LlamaForCausalLM, LlamaConfig(**text, tie_word_embeddings=True), ["norm", "embed_tokens"]),
        "llama-classes": (LlamaForSequenceClassification, LlamaConfig(**text, num_labels=3), ["score", "norm"]),
        "gpt2": (GPT2LMHeadModel, GPT2Config(**gpt2, tie_word_embeddings=tied), ["ln_f", "c_proj", "wte"]),
        "gpt2-classes": (GPT2ForSequenceClassification, GPT2Config(**gpt2, num_labels=3), ["score", "ln_f"]),
        "bert": (BertForMaskedLM, BertConfig(**text), ["LayerNorm", "transform", "word_embeddings"]),
        "bert-classes": (BertForSequenceClassification, BertConfig(**text, num_labels=3), ["pooler", "classifier"]),
        "vit": (ViTForImageClassification, ViTConfig(**image, intermediate_size=inner), ["layernorm", "classifier"]),
        "dinov2": (
            Dinov2ForImageClassification,
            Dinov2Config(**image, mlp_ratio=2, use_swiglu_ffn=rng.random() < 0.5),
            ["layernorm", "classifier"],
        ),
        "swin": (
            SwinForImageClassification,
            SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
            ["layernorm", "classifier"],
        ),
        "t5": (T5ForConditionalGeneration, T5Config(**t5), ["layer_norm", "shared"]),
        "mixtral": (
            MixtralForCausalLM,
            MixtralConfig(**text, num_key_value_heads=2, num_local_experts=4),
            ["gate", "norm"],
        ),
    }
    name = rng.choice(sorted(kinds))
    kind, config, others = kinds[name]
    return name, kind(config), others


def draw_targets(rng, model, layers):
    """Names of layers in one of the ways that PEFT takes them."""
    names = sorted({path.rsplit(".", 1)[-1] for path in layers})
    some = rng.sample(names, rng.randint(1, min(4, len(names))))
    way = rng.random()
    if way < 0.1:
        return "all-linear"
    if way < 0.2:
        return r".*\.(" + "|".join(some) + ")"
    if way < 0.35:
        return rng.sample(layers, rng.randint(1, min(5, len(layers))))
    return some


def draw_config(rng, model, others):
    linear = (torch.nn.Linear, torch.nn.Conv2d, transformers.pytorch_utils.Conv1D)
    is_oft = rng.random() < 0.5
    kinds = (*linear, torch.nn.Embedding) if is_oft and rng.random() < 0.4 else linear
    # A layer that PEFT cannot adapt is drawn seldom: it ends the case.
    keep = kinds if rng.random() < 0.1 else tuple(kind for kind in kinds if kind.__name__ != "Conv1D")
    layers = [path for path, module in model.named_modules() if isinstance(module, keep)]
    method = "oft" if is_oft else "boft"
    common = dict(
        target_modules=draw_targets(rng, model, layers),
        bias=rng.choice(["none", "none", "all", f"{method}_only"]),
        modules_to_save=rng.sample(others, rng.randint(1, len(others))) if rng.random() < 0.4 else None,
        init_weights=rng.random() < 0.8,
        fan_in_fan_out=rng.random() < 0.05,
    )
    if rng.random() < 0.15:
        common["layers_to_transform"] = rng.choice([0, [0], [0, 1]])
    if rng.random() < 0.1:
        common["exclude_modules"] = [rng.choice(layers).rsplit(".", 1)[-1]]
    if is_oft:
        size = dict(oft_block_size=rng.choice([2, 3, 4, 8, 16])) if rng.random() < 0.7 else dict(oft_block_size=0, r=rng.choice([1, 2, 4, 6]))
        return OFTConfig(
            **common, **size, use_cayley_neumann=rng.random() < 0.5, num_cayley_neumann_terms=rng.randint(2, 6),
            coft=rng.random() < 0.2, eps=rng.choice([1e-4, 0.05, 0.5]), block_share=rng.random() < 0.2,
        )
    size = dict(boft_block_size=rng.choice([2, 4, 8])) if rng.random() < 0.7 else dict(boft_block_size=0, boft_block_num=rng.choice([1, 2, 4]))
    return BOFTConfig(**common, **size, boft_n_butterfly_factor=rng.choice([1, 1, 2, 3]))


class Skipped(Exception):
    """PEFT itself makes nothing of the case."""


def draw(seed, place):
    """The base and the adapter of a case, on disk."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, base, others = draw_model(rng)
    dtype = torch.bfloat16 if rng.random() < 0.15 else torch.float32
    base = base.to(dtype).eval()
    # Norms and biases start from ones and zeros, which hide mistakes.
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    base.save_pretrained(place / "base", max_shard_size=rng.choice(["20KB", "1GB"]))
    config = draw_config(rng, base, others)
    try:
        adapted = randomized(get_peft_model(copy.deepcopy(base).float(), copy.deepcopy(config)))
        adapted.save_pretrained(place / "adapter")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Skipped(f"{name}: {error}") from error
    if config.fan_in_fan_out:
        # PEFT sets it to false where it adapts an nn.Linear.
        path = place / "adapter/adapter_config.json"
        path.write_text(path.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": true'))
    return name, base, dtype


def merged_by_peft(model, dtype):
    """The tensors of the merged model. PEFT's `merge_and_unload` fails where a saved module is made of others, and merges all the same."""
    try:
        return copy.deepcopy(model).merge_and_unload().to(dtype).state_dict()
    except AttributeError:
        model.merge_adapter()
    tensors = model.base_model.model.to(dtype).state_dict()
    own = re.compile(r"\.(original_module\.|boft_|oft_)")
    inside = re.compile(r"\.(modules_to_save\.default|base_layer)\b")
    return {inside.sub("", key): tensor for key, tensor in tensors.items() if not own.search(key)}


def is_tied_embedding_rotated(base, place):
    head = base.get_output_embeddings()
    if head is None or head.weight is not base.get_input_embeddings().weight:
        return False
    names = {name for name, module in base.named_modules() if module is base.get_input_embeddings()}
    with safe_open(place / "adapter/adapter_model.safetensors", "pt") as file:
        return any(f"base_model.model.{name}.oft_embedding_R.weight" in file.keys() for name in names)


def check_random(seed, place):
    """What became of a case: `equal` or `refused`, with a word about it."""
    name, base, dtype = draw(seed, place)
    run = subprocess.run(
        [TOOL, "merge", "--base", "base", "--adapter", "adapter", "--output", "ours"],
        cwd=place, capture_output=True, text=True,
    )
    if run.returncode == 2:
        line = run.stderr.strip().splitlines()[-1].removeprefix("error: ")
        return "refused", f"{name}: {line}"
    assert run.returncode == 0, run.stderr
    try:
        wide = type(base).from_pretrained(place / "base", dtype=torch.float32)
        theirs = merged_by_peft(PeftModel.from_pretrained(wide, place / "adapter"), dtype)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Skipped(f"{name}: {error}") from error
    ours, report = type(base).from_pretrained(place / "ours", dtype="auto", output_loading_info=True)
    assert not any(report[what] for what in ["missing_keys", "unexpected_keys", "mismatched_keys"]), report
    ours, before = ours.state_dict(), base.state_dict()
    if is_tied_embedding_rotated(base, place):
        # PEFT's forward pass leaves the head as it was, and its merge rotates the one tensor of both.
        head = next(path for path, module in base.named_modules() if module is base.get_output_embeddings())
        theirs[f"{head}.weight"] = before[f"{head}.weight"]
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    worst, change = 0.0, 0.0
    for key, tensor in theirs.items():
        size = max(tensor.float().abs().max().item(), 1e-30)
        difference = (ours[key].float() - tensor.float()).abs().max().item() / size
        assert difference <= TOLERANCE[dtype], f"`{key}` differs by {difference:.1e}"
        worst = max(worst, difference)
        if before[key].shape == tensor.shape:
            change = max(change, (before[key].float() - tensor.float()).abs().max().item() / size)
    return "equal", f"{name} {dtype}: weights agree to {worst:.1e}, changed by up to {change:.1e}"


def check_all_random(count, first):
    outcomes, reasons = collections.Counter(), collections.Counter()
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as place:
            try:
                outcome, text = check_random(seed, Path(place))
            except Skipped as error:
                outcome, text = "skipped", str(error).splitlines()[0]
            except (AssertionError, OSError) as error:
                outcome, text = "DIFFERS", str(error)
        outcomes[outcome] += 1
        if outcome == "refused":
            reasons[re.sub(r"`[^`]*`|[\d.]+", "…", text.split(": ", 1)[1])[:160]] += 1
        print(f"{outcome:8}{seed}: {text}", flush=True)
    print(f"\nseeds {first} to {first + count - 1}: {dict(outcomes)}")
    for reason, times in reasons.most_common():
        print(f"{times:5}  {reason}")
    return outcomes["DIFFERS"] > 0


def main():
    parser = argparse.ArgumentParser(description="Compares merged models with those of PEFT.")
    parser.add_argument("--random", type=int, metavar="COUNT", help="draw so many cases at random")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first of them")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.random:
        sys.exit(check_all_random(args.random, args.seed))
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
