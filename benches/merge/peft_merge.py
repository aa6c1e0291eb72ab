"""Merges an adapter into a model with PEFT, and prints the time and the peak memory.

    pip install -r requirements.txt
    python peft_merge.py <model> <adapter> <output>
"""

import resource
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model, adapter, output = sys.argv[1:]
start = time.perf_counter()
base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
merged.save_pretrained(output, max_shard_size="500MB")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{seconds:.1f} s, peak {peak:.0f} MiB, {torch.get_num_threads()} threads")
