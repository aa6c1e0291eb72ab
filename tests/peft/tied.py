"""Merges adapters into models whose head shares the embedding, and compares the logits with those of PEFT.

    cargo build --release --bin burn-boft
    python tests/peft/tied.py

One line per case; the exit code is 1 if any failed. A model that the tool refuses must be one that is marked so here.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import BOFTConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/burn-boft"

CAUSAL, MASKED, SEQUENCES = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
LLAMA = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, max_position_embeddings=64
)
# Padding moves the positions of RoBERTa; there is none here.
ROBERTA = RobertaConfig(**LLAMA, pad_token_id=0)
T5 = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0)

# The model, what is adapted, what is saved, and whether the tool refuses it.
CASES = {
    "llama-tied-embedding": (CAUSAL, LlamaConfig(**LLAMA, tie_word_embeddings=True), ["q_proj"], ["embed_tokens"], False),
    "llama-tied-head": (CAUSAL, LlamaConfig(**LLAMA, tie_word_embeddings=True), ["q_proj"], ["lm_head"], False),
    "llama-untied-embedding": (CAUSAL, LlamaConfig(**LLAMA, tie_word_embeddings=False), ["q_proj"], ["embed_tokens"], False),
    "opt-embedding": (
        CAUSAL,
        OPTConfig(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, word_embed_proj_dim=64
        ),
        ["q_proj"],
        ["embed_tokens"],
        False,
    ),
    "gpt-neo-embedding": (
        CAUSAL,
        GPTNeoConfig(
            hidden_size=64, num_layers=2, num_heads=4, vocab_size=96, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
        ["q_proj"],
        ["wte"],
        False,
    ),
    "bert-embedding": (MASKED, BertConfig(**LLAMA), ["query"], ["word_embeddings"], False),
    "roberta-embedding": (MASKED, ROBERTA, ["query"], ["word_embeddings"], False),
    "t5-embedding": (SEQUENCES, T5, ["q"], ["shared"], True),
    "mixtral-router": (CAUSAL, MixtralConfig(**LLAMA, num_key_value_heads=4, num_local_experts=4), ["q_proj"], ["gate"], True),
}


def logits(model, tokens):
    arguments = {"decoder_input_ids": tokens} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **arguments).logits


def randomized(model):
    """Moves everything that is trained away from where it starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def check(kind, config, targets, saved, is_refused, place):
    torch.manual_seed(1)
    base = kind.from_config(config)
    base.save_pretrained(place / "base")
    tokens = torch.randint(4, 96, (2, 7))
    before = logits(base, tokens)
    adapter = BOFTConfig(target_modules=targets, modules_to_save=saved, boft_block_size=4, boft_n_butterfly_factor=1)
    randomized(get_peft_model(base, adapter)).save_pretrained(place / "adapter")

    arguments = ["merge", "--base", "base", "--adapter", "adapter", "--output", "ours"]
    run = subprocess.run([TOOL, *arguments], cwd=place, capture_output=True, text=True)
    if run.returncode != 0:
        assert run.returncode == 2 and is_refused, run.stderr
        return f"refused: {run.stderr.strip()}"
    assert not is_refused, "it was not refused"
    expected = logits(PeftModel.from_pretrained(kind.from_pretrained(place / "base"), place / "adapter"), tokens)
    ours, report = kind.from_pretrained(place / "ours", output_loading_info=True)
    assert not any(report[what] for what in ["missing_keys", "unexpected_keys", "mismatched_keys"]), report
    size = expected.abs().max()
    error, change = ((other - expected).abs().max().item() / size for other in (logits(ours, tokens), before))
    assert change > 0.05, "the adapter changes nothing"
    assert error <= 1e-5, f"logits differ by {error:.1e}"
    return f"logits agree to {error:.1e}, changed by {change:.1e}"


def main():
    warnings.simplefilter("ignore")
    failed = False
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            try:
                print(f"ok    {name}: {check(*case, Path(place))}", flush=True)
            except AssertionError as error:
                failed = True
                print(f"FAIL  {name}: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
