"""The step benchmark of `benches/step`, in PyTorch, Hugging Face PEFT and LyCORIS.

    pip install -r requirements.txt
    python peft_step.py                                     # every case and method, a table
    python peft_step.py --case dinov2-s --method frozen --method boft-m2-b4 --rounds 11 --json

A training step is a forward pass, the backward pass of the mean of the squared output, and AdamW's update of what the
method trains, with the device synchronised; an inference step is a forward pass in inference mode. Weights and inputs
are random. Methods take turns, so that a machine that slows down slows all of them; the first call is reported apart.

Cases (linear layers are adapted unless stated):

    dinov2-s           DINOv2-S backbone, 4 images of 224 x 224 (1028 tokens), all 6 linear layers of its 12 layers
    dinov2-l-block     2 layers of DINOv2-L (1024 wide, 16 heads), 8 images of 224 x 224 (2056 tokens)
    llm-linear-512     one 4096 x 4096 linear layer without bias, 512 tokens
    llm-linear-8192    the same with 8192 tokens
    decode             the same with 1 token, inference only
    conv               [4, 64, 56, 56] through Conv2d 3 x 3 with padding 1 and bias: 64 -> 64, 64 -> 128 with stride 2,
                       128 -> 128, 128 -> 128, each followed by ReLU; every convolution is adapted

Methods: `frozen` (no adapter; forward, and backward to the input alone), `lora-r8`, `oft-b32`, `boft-m<m>-b<b>`, `full`
(every number is trained), and for inference `plain` (no adapter) and `merged` (BOFT m = 2, b = 4, folded in); `decode`
runs the adapters without gradients. Except with `full`, a gradient flows back to the input of the first adapted layer,
as it does in the middle of a model: for DINOv2 that is the output of the embeddings.

PEFT is measured as it ships where its CUDA extension does not compile, with one exception: it then trains BOFT with one
factor whatever the config says, so for m > 1 the extension's entry points are replaced by a block diagonal in tensor
operations (faster than the `torch.block_diag` that PEFT falls back to for m = 1). What PEFT's OFT convolution computes
is not what merging it computes; it is timed all the same. With PEFT's rewrite of BOFT (its pull request 3540, commit
d850d8b1, put before the installed one by PYTHONPATH) there is no extension, and all factors run.

`lycoris-oft-b32` and `lycoris-boft-b8` are `diag-oft` and `boft` of LyCORIS, on linear layers, if it is installed. It
chooses its own sizes: blocks of no more than 32 numbers, or as many factors of blocks of 8 as fit. It rotates
outputs where PEFT rotates inputs. A layer whose width it cannot factor ends the method.

`frozen-q8`, `qoft-b32` and `qlora-r8` have the adapted layers in eight bits, by bitsandbytes if it is installed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import peft
import peft.tuners.boft.layer as boft_layer
import torch
from peft import BOFTConfig, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.utils import logging

DINOV2_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
ADAPTERS = ["lora-r8", "oft-b32", "boft-m1-b4", "boft-m2-b4", "boft-m4-b4", "boft-m2-b8"]
LYCORIS = ["lycoris-oft-b32", "lycoris-boft-b8"]
QUANTIZED = ["frozen-q8", "qoft-b32", "qlora-r8"]
TRAINING = ["frozen", *ADAPTERS, "full", "plain", "merged"]
INFERENCE = ["plain", *ADAPTERS, "merged"]


class BlockDiag:
    """What PEFT's CUDA extension computes: `[m, n, b, b]` blocks to `[m, n b, n b]` matrices."""

    @staticmethod
    def apply(blocks):
        m, n, b, _ = blocks.shape
        out, k = blocks.new_zeros(m, n, b, n, b), torch.arange(n, device=blocks.device)
        out[:, k, :, k] = blocks.transpose(0, 1)
        return out.view(m, n * b, n * b)


boft_layer.FastBlockDiag = BlockDiag


class Dinov2(nn.Module):
    targets = DINOV2_LAYERS

    def __init__(self, **sizes):
        super().__init__()
        self.model = Dinov2Model(Dinov2Config(image_size=224, patch_size=14, **sizes))
        self.adapted = len(DINOV2_LAYERS) * sizes["num_hidden_layers"]

    def forward(self, pixels, track):
        hidden = track(self.model.embeddings(pixels))
        return self.model.layernorm(self.model.encoder(hidden).last_hidden_state)


class Projection(nn.Module):
    targets, adapted = ["projection"], 1

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(4096, 4096, bias=False)

    def forward(self, tokens, track):
        return self.projection(track(tokens))


class Convolutions(nn.Module):
    targets, adapted = ["conv.0", "conv.1", "conv.2", "conv.3"], 4

    def __init__(self):
        super().__init__()
        sizes = [(64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1)]
        self.conv = nn.ModuleList(nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in sizes)

    def forward(self, images, track):
        hidden = track(images)
        for conv in self.conv:
            hidden = conv(hidden).relu()
        return hidden


def dinov2_s():
    return Dinov2(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)


def dinov2_l_block():
    return Dinov2(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16)


# The model, the shape of its input, the methods; the others are compared with the first method.
CASES = {
    "dinov2-s": (dinov2_s, (4, 3, 224, 224), TRAINING),
    "dinov2-l-block": (dinov2_l_block, (8, 3, 224, 224), TRAINING),
    "llm-linear-512": (Projection, (1, 512, 4096), TRAINING),
    "llm-linear-8192": (Projection, (1, 8192, 4096), TRAINING),
    "decode": (Projection, (1, 1, 4096), INFERENCE),
    "conv": (Convolutions, (4, 64, 56, 56), TRAINING),
}


def adapt_by_lycoris(model, method):
    """The model with LyCORIS's modules in front of its layers, whose parameters are part of it."""
    import toml

    # LyCORIS logs to the standard output, which is for the times.
    with contextlib.redirect_stdout(sys.stderr):
        from lycoris import create_lycoris
        from lycoris.wrapper import LycorisNetwork

    _, kind, size = method.split("-")
    names = [f".*{name.replace('.', '[.]')}" for name in model.targets]
    preset = {"enable_conv": False, "target_module": [], "target_name": names, "name_algo_map": {}}
    model.requires_grad_(False)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        toml.dump(preset, file)
        file.flush()
        LycorisNetwork.apply_preset(preset)
        algo = {"oft": "diag-oft", "boft": "boft"}[kind]
        dim = int(size[1:])
        network = create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=0, algo=algo, preset=file.name)
    network.apply_to()
    if len(network.loras) != model.adapted:
        sys.exit(f"error: {method} adapted {len(network.loras)} layers, expected {model.adapted}")
    # Blocks of zeros cost the same, but let nobody see a wrong product.
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.lycoris = network
    return model


def quantize(model):
    """The model with the layers that are adapted in eight bits, packed when it goes to a device."""
    from bitsandbytes.nn import Linear8bitLt

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(tuple(model.targets)):
            sizes = (layer.in_features, layer.out_features, layer.bias is not None)
            packed = Linear8bitLt(*sizes, has_fp16_weights=False)
            packed.load_state_dict(layer.state_dict())
            model.set_submodule(name, packed)
    return model


def adapt(model, method):
    """The model wrapped by PEFT."""
    if method in LYCORIS:
        return adapt_by_lycoris(model, method)
    if method == "merged":
        method = "boft-m2-b4"
    method = method.removeprefix("q")
    kind, *numbers = method.split("-")
    if kind == "lora":
        config = LoraConfig(r=8, lora_alpha=8, target_modules=model.targets)
    elif kind == "oft":
        config = OFTConfig(oft_block_size=32, target_modules=model.targets, init_weights=False)
    else:
        m, b = (int(number[1:]) for number in numbers)
        boft_layer.get_fbd_cuda = lambda: m > 1
        sizes = dict(boft_block_size=b, boft_n_butterfly_factor=m)
        config = BOFTConfig(**sizes, target_modules=model.targets, init_weights=False)
    wrapped = get_peft_model(model, config)
    layers = [layer for layer in wrapped.modules() if isinstance(layer, BaseTunerLayer)]
    if len(layers) != model.adapted:
        sys.exit(f"error: {method} adapted {len(layers)} layers, expected {model.adapted}")
    if kind == "boft" and any(layer.boft_R["default"].shape[0] != m for layer in layers):
        sys.exit(f"error: {method} does not run {m} factors")
    return wrapped


class Step:
    """One step of a method on a case, ready to run again and again."""

    def __init__(self, case, method, device, dtype):
        build, shape, _ = CASES[case]
        torch.manual_seed(7)
        self.device, self.method = device, method
        self.input = torch.randn(shape).to(device, dtype)
        model = build().to(dtype).train()
        if method in QUANTIZED:
            model = quantize(model).to(device)
        if method in ("frozen", "frozen-q8", "plain"):
            model.requires_grad_(False)
        elif method != "full":
            model = adapt(model, method)
        if method == "merged":
            model = model.merge_and_unload()
        self.inference = method in ("plain", "merged") or case == "decode"
        # After the adapters: PEFT leaves BOFT's permutations behind on the CPU.
        self.model = model.to(device).train(not self.inference)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def track(self, hidden):
        return hidden if self.inference or self.method == "full" else hidden.detach().requires_grad_()

    def work(self):
        if self.inference:
            with torch.inference_mode():
                self.model(self.input, self.track)
            return
        self.model(self.input, self.track).square().mean().backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def run(self):
        """Milliseconds of one step, the device included."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        self.work()
        synchronize()
        return (time.perf_counter() - start) * 1e3


def resident(field):
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def peak(case, method, device, dtype, threads):
    """MiB that a second step adds to what the model, the optimizer and the first step left behind.

    On a CPU, from the resident memory of a process of its own, whose allocator gives memory back at once.
    """
    set_threads(threads)
    step = Step(case, method, device, dtype)
    step.run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    step.run()
    return (resident("VmHWM") - before) / 2**20


def peak_apart(*arguments):
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, arguments)


def set_threads(threads):
    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)


def measure(case, args):
    """Lets every method of a case take its turn, round after round."""
    device, dtype = args.device, getattr(torch, args.dtype)
    floor, *others = CASES[case][2]
    methods = [floor, *(method for method in others if not args.method or method in args.method)]
    methods += [method for method in LYCORIS + QUANTIZED if method in (args.method or [])]
    steps = {method: Step(case, method, device, dtype) for method in methods}
    cold = {method: step.run() for method, step in steps.items()}
    for step in steps.values():
        step.run()
    times = {method: [] for method in methods}
    for _ in range(args.rounds):
        for method, step in steps.items():
            times[method].append(step.run())
    trainable = {method: step.trainable for method, step in steps.items()}
    del step, steps
    medians = {method: statistics.median(times[method]) for method in methods}
    for method in methods:
        yield {
            "case": case,
            "backend": "pytorch",
            "peft": peft.__version__,
            "device": str(device),
            "method": method,
            "median_ms": medians[method],
            "min_ms": min(times[method]),
            "max_ms": max(times[method]),
            "cold_ms": cold[method],
            "ratio_to_frozen": medians[method] / medians[floor],
            "peak_mib": peak_apart(case, method, device, dtype, args.threads) if args.peak else None,
            "trainable": trainable[method],
        }


def print_row(row):
    peak_mib = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    times = "".join(f"{row[key]:10.2f}" for key in ("median_ms", "min_ms", "max_ms", "cold_ms"))
    print(f"{row['method']:<16}{times}{row['ratio_to_frozen']:9.3f}{peak_mib:>10}{row['trainable']:>12}", flush=True)


def serve(args):
    """Runs one step for every line `<case> <method>` of standard input and prints its milliseconds."""
    steps = {}
    for line in sys.stdin:
        case, method = line.split()
        if (case, method) not in steps:
            steps[case, method] = Step(case, method, args.device, getattr(torch, args.dtype))
            steps[case, method].run()
        print(steps[case, method].run(), flush=True)


def main():
    parser = argparse.ArgumentParser(description="The step benchmark, in PyTorch and PEFT.")
    parser.add_argument("--case", action="append", choices=CASES, help="cases to run; all if none is given")
    parser.add_argument("--method", action="append", choices=TRAINING + LYCORIS + QUANTIZED, help="methods beside the floor; default PEFT's")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the base")
    parser.add_argument("--rounds", type=int, default=11, help="times that every method takes its turn")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; its own choice by default")
    parser.add_argument("--peak", action="store_true", help="measure memory too, a process for every method")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    parser.add_argument("--serve", action="store_true", help="one step for every line `<case> <method>` of the input")
    args = parser.parse_args()
    set_threads(args.threads)
    if args.serve:
        return serve(args)
    for case in args.case or CASES:
        if not args.json:
            print(f"\n{case} (ratio to {CASES[case][2][0]})")
            print(f"{'method':<16}{'median ms':>10}{'min':>10}{'max':>10}{'cold':>10}", end="")
            print(f"{'ratio':>9}{'peak MiB':>10}{'trainable':>12}")
        for row in measure(case, args):
            print(json.dumps(row), flush=True) if args.json else print_row(row)


if __name__ == "__main__":
    main()
