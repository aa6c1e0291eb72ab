"""Writes a synthetic Llama of about 2 GiB in shards, and a BOFT adapter of it, as transformers and PEFT write them.

    pip install -r requirements.txt
    python make_model.py <folder>

The folder gets `model/` (bf16, shards of at most 500 MB) and `adapter/` (block size 4, every projection). The numbers
are random; nothing is left at zero or one.
"""

import sys
from pathlib import Path

import torch
from peft import BOFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=18,
        num_attention_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder / "model", max_shard_size="500MB")

    # PEFT's permutations are dense, 127 MB for a layer of 5632 inputs: the meta device knows their shapes alone.
    with torch.device("meta"):
        shapes = get_peft_model(LlamaForCausalLM(config), BOFTConfig(boft_block_size=4, target_modules=PROJECTIONS))
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {}
    for key, tensor in get_peft_model_state_dict(shapes).items():
        noise = torch.randn(tensor.shape)
        tensors[key] = 1 + 0.1 * noise if key.endswith("boft_s") else 0.1 * noise
    (folder / "adapter").mkdir()
    shapes.peft_config["default"].inference_mode = True
    shapes.peft_config["default"].save_pretrained(folder / "adapter")
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    print(f"{parameters:,} parameters, {2 * parameters / 2**30:.2f} GiB; {len(tensors) // 2} layers adapted")


main(Path(sys.argv[1]))
