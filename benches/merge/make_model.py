"""Writes a synthetic Llama of about 2 GiB in shards, and three adapters of it, in the layouts of transformers and PEFT.

    pip install -r requirements.txt
    python make_model.py <folder>

The folder gets `model/` (bf16, shards of at most 500 MB), `boft-b4-m1/` (block size 4, one factor: PEFT without its CUDA
extension merges no more), `boft-b8-m2/` (block size 8, two factors) and `oft/` (block size 32, PEFT's defaults), each on every
projection. The numbers are random;
nothing is left at zero or one.
"""

import sys
from pathlib import Path

import torch
from peft import BOFTConfig, OFTConfig
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def boft(b, m):
    def tensors(path, layer):
        yield f"{path}.boft_R", 0.1 * torch.randn(m, layer.in_features // b, b, b)
        yield f"{path}.boft_s", 1 + 0.1 * torch.randn(layer.out_features, 1)

    return tensors


def oft(path, layer):
    yield f"{path}.oft_R.weight", 0.02 * torch.randn(layer.in_features // 32, 32 * 31 // 2)


def save_adapter(folder, model, config, tensors):
    folder.mkdir()
    config.inference_mode = True
    config.save_pretrained(folder)
    layers = [(name, module) for name, module in model.named_modules() if name.split(".")[-1] in PROJECTIONS]
    tensors = dict(entry for name, module in layers for entry in tensors(f"base_model.model.{name}", module))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    print(f"{folder.name}: {len(layers)} layers, {sum(tensor.numel() for tensor in tensors.values()):,} numbers")


def main(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=19,
        num_attention_heads=16,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, module.in_features**-0.5)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder / "model", max_shard_size="500MB")
    print(f"model: {parameters:,} parameters, {2 * parameters / 2**30:.2f} GiB")
    names = {"base_model_name_or_path": "synthetic", "target_modules": PROJECTIONS}
    for b, m in [(4, 1), (8, 2)]:
        config = BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, **names)
        save_adapter(folder / f"boft-b{b}-m{m}", model, config, boft(b, m))
    save_adapter(folder / "oft", model, OFTConfig(oft_block_size=32, **names), oft)


main(Path(sys.argv[1]))
