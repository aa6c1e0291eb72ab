"""Makes the seeds of the fuzz targets from the files that PEFT and LyCORIS wrote. Needs nothing but Python 3.

    python3 fuzz/seeds.py
"""

import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "tests" / "fixtures"
SEEDS = HERE / "seeds"
# One of each layout, rotation and selection.
CASES = [
    "peft/cases/boft-linear-m3-b2",
    "peft/cases/boft-linear-m1-num3",
    "peft/cases/boft-linear-bf16",
    "peft/cases/boft-conv-m2-b2-head",
    "peft/cases/boft-mlp-bias-all-saved",
    "peft/cases/boft-mlp-regex-lookahead",
    "peft/cases/boft-mlp-saved-batch-norm",
    "peft/cases/boft-stack-layers",
    "peft/cases/oft-linear-neumann-5",
    "peft/cases/oft-linear-coft-on",
    "peft/cases/oft-linear-share-r4",
    "peft/cases/oft-linear-adjusted-empty",
    "peft/cases/oft-linear-f16",
    "peft/cases/oft-conv-exact-b4",
    "peft/cases/oft-mlp-exclude-regex",
    "dinov2/transformers-4",
    "dinov2/transformers-5",
]
LARGEST = 6000
ARGUMENTS = {
    "merge": ["merge", "--base", "model", "--adapter", "adapter", "--output", "merged",
              "--map", r"^h\.(\d+)=encoder.layer.$1", "--map", "query=q"],
    "dry-run": ["merge", "--base=model", "--adapter=adapter", "--dry-run", "--map", "dinov2"],
    "unmerge": ["unmerge", "--merged", "m", "--adapter", "a", "--output", "o", "--keep-saved",
                "--map", "(?<=attention\\.)(?P<name>query|key)$=${name}_proj"],
    "inspect": ["inspect", "adapter", "--json", "--plot", "angles.svg"],
    "convert": ["convert", "adapter", "--to", "record", "--output", "adapter.bpk", "--map", "a=b"],
    "convert-lora": ["convert", "adapter", "--to-lora", "8", "--base", "b", "--output", "o"],
    "convert-sd-scripts": ["convert", "lyco.safetensors", "--to=sd-scripts", "--part", "lora_unet_",
                           "--output", "o.safetensors"],
    "formats": ["formats", "--json", "--clean"],
    "merge-several": ["merge", "--base", "b", "--adapter", "a", "--adapter", "c", "--strength", "0.5", "--output", "o"],
    "convert-boft": ["convert", "a", "--to=boft", "--factors", "3", "--output", "o"],
    "diff": ["diff", "one", "other", "--json"],
    "quantize-check": ["merge", "--base", "b", "--adapter", "a", "--quantize-check", "--output", "o"],
    "completions": ["completions", "zsh"],
    "manual": ["man", "merge"],
    "help": ["convert", "--help"],
}


def write(target: str, name: str, content: bytes) -> None:
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def main() -> None:
    shutil.rmtree(SEEDS, ignore_errors=True)
    cases = [FIXTURES / case for case in CASES]
    old = FIXTURES / "peft" / "old"
    cases += sorted(path.parent for path in old.rglob("adapter_config.json"))
    for case in cases:
        name = "-".join(case.relative_to(FIXTURES).parts).removeprefix("peft-").removeprefix("cases-")
        settings = json.loads((case / "adapter_config.json").read_text())
        settings = json.dumps(settings, separators=(",", ":")).encode()
        write("settings", name, settings)
        tensors = case / "adapter_model.safetensors"
        if not tensors.is_file() or tensors.stat().st_size > LARGEST:
            continue
        tensors = tensors.read_bytes()
        start = 8 + int.from_bytes(tensors[:8], "little")
        header, numbers = tensors[8:start].rstrip(), tensors[start:]
        write("adapter", name, b"\0".join([settings, header, numbers]))
        write("header", name, b"\0".join([header, numbers]))
        if name.startswith("boft"):
            write("tensors", name, tensors)
    for path in sorted((FIXTURES / "lycoris").rglob("adapter.safetensors")):
        if path.stat().st_size > LARGEST:
            continue
        tensors = path.read_bytes()
        start = 8 + int.from_bytes(tensors[:8], "little")
        name = "-".join(path.parent.relative_to(FIXTURES / "lycoris").parts)
        write("dialect", name, b"\0".join([tensors[8:start].rstrip(), tensors[start:]]))
    for name, arguments in ARGUMENTS.items():
        write("arguments", name, "\n".join(arguments).encode())


main()
