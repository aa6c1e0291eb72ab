"""Interrupts the tool at random times, and gives it damaged files. Run by hand; docs/testing.md has the figures.

    python cli/tests/abuse.py signals <tool> --rounds 200 --seed 1
    python cli/tests/abuse.py inputs <tool> --rounds 100000 --seed 1

`<tool>` is the path of the program, such as target/release/burn-boft. Python 3.9 or later on Linux is all it needs.

A run under a signal has to leave the complete output, byte for byte that of a run in peace, or nothing; only SIGKILL may leave
temporary files, which `--clean` then removes. A damaged input has to be accepted or refused (exit codes 0 and 2) in one line,
within ten seconds and 200 MiB, and a refusal has to leave nothing.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
SECONDS, MEBIBYTES = 10, 200


def write_tensors(path, tensors):
    """A safetensors file of f32 tensors, given as shape and a function from an index to a number."""
    header, numbers = {}, bytearray()
    for name, (shape, number) in tensors.items():
        count = 1
        for axis in shape:
            count *= axis
        start = len(numbers)
        numbers += struct.pack(f"<{count}f", *(number(index) for index in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(numbers)]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + numbers)


def make_inputs(folder):
    """A model of 24 layers in three shards, one of a single file, and adapters of both methods."""
    noise = [random.Random(7).uniform(-0.2, 0.2) for _ in range(9973)]
    weight = ([192, 256], lambda index: noise[index % 9973])
    keys = [f"layers.{layer}.fc.weight" for layer in range(24)]
    model = folder / "model"
    model.mkdir()
    shards = [keys[start::3] for start in range(3)]
    places = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        write_tensors(model / name, {key: weight for key in shard})
        places |= {key: name for key in shard}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (model / "config.json").write_text("{}")
    write_tensors(folder / "model.safetensors", {key: weight for key in keys})
    small = lambda index: noise[index % 9973] / 4
    methods = {
        "boft": ({"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2},
                 {"boft_R": ([2, 64, 4, 4], small), "boft_s": ([192, 1], lambda index: 1 + small(index))}),
        "oft": ({"peft_type": "OFT", "oft_block_size": 8, "use_cayley_neumann": False},
                {"oft_R.weight": ([32, 28], small)}),
    }
    for method, (config, tensors) in methods.items():
        (folder / method).mkdir()
        (folder / method / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["fc"]}))
        names = [key.removesuffix(".weight") for key in keys]
        named = {f"base_model.model.{name}.{tensor}": value for name in names for tensor, value in tensors.items()}
        write_tensors(folder / method / "adapter_model.safetensors", named)


def content(path):
    """The bytes of a file, or of all files in a folder by their names."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return path.read_bytes()


def commands():
    """The commands that write, by the name of their output."""
    return {
        "merged": ["merge", "--base", "model", "--adapter", "boft"],
        "merged.safetensors": ["merge", "--base", "model.safetensors", "--adapter", "oft"],
        "both": ["merge", "--base", "model", "--adapter", "boft", "--adapter", "oft", "--strength", "0.5"],
        "checked": ["merge", "--base", "model", "--adapter", "boft", "--quantize-check"],
        "restored": ["unmerge", "--merged", "model", "--adapter", "boft"],
        "peft": ["convert", "boft", "--to", "peft"],
        "record.bpk": ["convert", "oft", "--to", "record"],
        "lora": ["convert", "oft", "--to-lora", "2", "--base", "model.safetensors"],
        "angles.svg": ["inspect", "boft", "--plot"],
    }


def with_output(command, output):
    return command + [output] if command[-1] == "--plot" else command + ["--output", output]


def signals(tool, rounds, seed):
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder)
        inputs = {path.name for path in folder.iterdir()}
        quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        expected, seconds = {}, {}
        for output, command in commands().items():
            start = time.monotonic()
            subprocess.run([tool] + with_output(command, output), check=True, **quiet)
            seconds[output] = time.monotonic() - start
            expected[output] = content(folder / output)
            remove(folder / output)
        counts = {"complete": 0, "nothing": 0, "left by SIGKILL": 0}
        for number in range(rounds):
            output = chance.choice(list(expected))
            sent = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
            run = subprocess.Popen([tool] + with_output(commands()[output], output), **quiet)
            time.sleep(chance.uniform(0, 1.2 * seconds[output]))
            run.send_signal(sent)
            code = run.wait(60)
            what = f"round {number}: {output}, {sent.name}, exit code {code}"
            if (folder / output).exists():
                assert content(folder / output) == expected[output], f"{what}: half of an output"
                counts["complete"] += 1
                remove(folder / output)
            else:
                assert code != 0, f"{what}: no output"
                counts["nothing"] += 1
            left = {path.name for path in folder.iterdir()} - inputs
            if left:
                assert sent == signal.SIGKILL, f"{what}: left {left}"
                assert all(name.startswith(".burn-boft-") for name in left), f"{what}: left {left}"
                counts["left by SIGKILL"] += 1
                clean = with_output(commands()["angles.svg"], "angles.svg") + ["--clean"]
                subprocess.run([tool] + clean, check=True, **quiet)
                remove(folder / "angles.svg")
                left = {path.name for path in folder.iterdir()} - inputs
                assert not left, f"{what}: --clean left {left}"
        print(f"{rounds} signals: {counts}")


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def damaged(data, chance):
    """Bytes with one to four of them changed, cut, doubled or moved, mostly in the header, where more depends on each."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not data:
            break
        end = len(data) if chance.random() < 0.2 else min(len(data), 4096)
        at, kind = chance.randrange(end), chance.randrange(6)
        piece = data[at:at + chance.randint(1, 32)]
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = piece
        elif kind == 4:
            del data[at:at + len(piece)]
        else:
            data[at:at + 1] = chance.choice([b"0", b"9", b"-", b"1e9", b"null", b"[]", b"{", b'"', b"\xff"])
    return bytes(data)


def pack(tensors):
    """A safetensors file of the entries of a header and their bytes, by name."""
    header, numbers = {}, b""
    for name, (entry, data) in tensors.items():
        header[name] = entry | {"data_offsets": [len(numbers), len(numbers) + len(data)]}
        numbers += data
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + numbers


@functools.cache
def sources():
    """The files of the fixtures' adapters and of their models, `base.safetensors`."""
    cases = []
    for folder in sorted((FIXTURES / "peft" / "cases").iterdir()):
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        reference = files.pop("reference.safetensors")
        start = 8 + struct.unpack("<Q", reference[:8])[0]
        header = json.loads(reference[8:start])
        tensors = {}
        for name, entry in header.items():
            if name.startswith("base."):
                first, end = entry["data_offsets"]
                tensors[name.removeprefix("base.")] = entry, reference[start + first:start + end]
        cases.append(("adapter", {f"adapter/{name}": data for name, data in files.items()} | {"base.safetensors": pack(tensors)}))
    for folder in sorted((FIXTURES / "lycoris" / "cases").iterdir()) + sorted((FIXTURES / "formulas" / "cases").iterdir()):
        names = ["adapter.safetensors", "base.safetensors"]
        cases.append((names[0], {name: (folder / name).read_bytes() for name in names}))
    return cases


def one_input(task):
    """Runs the tool once on a damaged copy of a case. Returns the exit code and the peak memory, or what is wrong."""
    tool, seed = task
    chance = random.Random(seed)
    adapter, files = chance.choice(sources())
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        folder, whole = Path(scratch) / "damaged", Path(scratch) / "whole"
        chosen = chance.sample(sorted(files), min(len(files), chance.choice([1, 1, 2])))
        for name, data in files.items():
            for copy in folder, whole:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(damaged(data, chance) if copy == folder and name in chosen else data)
        base, output = folder / "base.safetensors", Path(scratch) / "output"
        command = chance.choice([
            ["inspect", folder / adapter],
            ["merge", "--base", base, "--adapter", folder / adapter, "--output", output],
            ["merge", "--base", base, "--adapter", folder / adapter, "--dry-run"],
            ["merge", "--base", base, "--adapter", folder / adapter, "--dry-run", "--quantize-check"],
            ["merge", "--base", base, "--adapter", folder / adapter, "--adapter", whole / adapter, "--output", output],
            ["unmerge", "--merged", base, "--adapter", folder / adapter, "--output", output],
            ["convert", folder / adapter, "--to", "peft", "--base", base, "--output", output],
            ["convert", folder / adapter, "--to", "record", "--base", base, "--output", output],
            ["convert", folder / adapter, "--to", "sd-scripts", "--base", base, "--output", output],
            ["convert", folder / adapter, "--to-lora", "2", "--base", base, "--output", output],
            ["diff", folder / adapter, whole / adapter],
            ["diff", base, whole / "base.safetensors"],
        ])
        before = set(Path(scratch).rglob("*"))
        with open(Path(scratch) / "errors", "w+b") as errors:
            before.add(Path(scratch) / "errors")
            run = subprocess.Popen([tool, *map(str, command)], stdout=subprocess.DEVNULL, stderr=errors)
            deadline = time.monotonic() + SECONDS
            status = usage = None
            while status is None:
                done, status_now, usage_now = os.wait4(run.pid, os.WNOHANG)
                if done:
                    status, usage = status_now, usage_now
                elif time.monotonic() > deadline:
                    run.kill()
                    os.wait4(run.pid, 0)
                    return f"seed {seed}: {command} takes more than {SECONDS} s"
                else:
                    time.sleep(0.001)
            run.returncode = code = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            text = errors.read().decode(errors="replace")
        mebibytes = usage.ru_maxrss / 1024
        left = set(Path(scratch).rglob("*")) - before
        if code not in (0, 2) or "itself is at fault" in text:
            return f"seed {seed}: {command} ends with {code}: {text}"
        if mebibytes > MEBIBYTES:
            return f"seed {seed}: {command} takes {mebibytes:.0f} MiB"
        if code == 2 and (left or not text.strip()):
            return f"seed {seed}: {command} is refused, leaves {left} and says {text!r}"
        return code, mebibytes


def inputs(tool, rounds, seed):
    counts, peak, wrong = {0: 0, 2: 0}, 0.0, []
    tasks = ((tool, seed * 1_000_000 + number) for number in range(rounds))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for result in pool.map(one_input, tasks, chunksize=64):
            if isinstance(result, str):
                wrong.append(result)
                print(result, file=sys.stderr)
                continue
            code, mebibytes = result
            counts[code] += 1
            peak = max(peak, mebibytes)
    print(f"{rounds} damaged inputs: {counts[0]} accepted, {counts[2]} refused, {len(wrong)} wrong; peak {peak:.0f} MiB")
    sys.exit(bool(wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["signals", "inputs"])
    parser.add_argument("tool")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run = {"signals": signals, "inputs": inputs}[arguments.kind]
    run(os.path.abspath(arguments.tool), arguments.rounds, arguments.seed)


if __name__ == "__main__":
    main()
