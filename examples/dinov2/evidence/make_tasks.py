"""Makes the image folders of the published comparison: textiles and Fashion-MNIST as tasks of 1000 training images.

    pip install numpy==2.4.6 pillow==13.0.0
    pip download --no-deps conformal-clip-data==0.1.4     (a wheel from PyPI, MIT)
    apt-get download dataset-fashion-mnist                (a package of Debian, MIT)
    dpkg -x dataset-fashion-mnist_*.deb fashion
    python make_tasks.py --wheel conformal_clip_data-0.1.4-*.whl --fashion fashion --output tasks

writes tasks/{textiles,fashion}/{train,val,test}/<class>/, each part with the same share of every class:

- textiles: 800, 200 and 1000 simulated textiles (nominal, local defect, global defect), the JPEG files as they are;
- fashion: 800 and 200 of the training images and 2000 of the test images of Fashion-MNIST, grey PNG of 28 by 28 pixels.

Which images are taken depends on the seed 0 and on nothing else. Either source may be left out. For each task it prints the
images of each part and a hash of all of them: f5d672bcda390d5c for textiles and efe23741390c64d3 for
fashion.
"""

import argparse
import gzip
import hashlib
import pathlib
import random
import re
import sys
import zipfile

import numpy as np
from PIL import Image

SEED = 0
TEXTILES = ("nominal", "local", "global")
TEXTILE_SHARES = {"train": 0.4, "val": 0.1, "test": 0.5}
GARMENTS = (
    "t-shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
# Of each class: how many images go to which part, from which file of the package.
GARMENT_COUNTS = {"train": {"train": 80, "val": 20}, "test": {"test": 200}}
GARMENT_FILES = {"train": "train", "test": "t10k"}


def write_textiles(wheel, root):
    archive = zipfile.ZipFile(wheel)
    for label in TEXTILES:
        names = [name for name in archive.namelist() if f"/{label}/" in name and name.endswith(".jpg")]
        names.sort(key=lambda name: int(re.findall(r"\d+", name)[-1]))
        random.Random(f"textiles {label} {SEED}").shuffle(names)
        start = 0
        for part, share in TEXTILE_SHARES.items():
            folder = root / part / label
            folder.mkdir(parents=True)
            stop = start + round(share * len(names))
            for name in names[start:stop]:
                (folder / name.rsplit("/", 1)[1]).write_bytes(archive.read(name))
            start = stop
        assert start == len(names) > 0, f"{wheel} has other images of {label}"


def read_garments(source, prefix):
    def values(name, offset):
        (path,) = source.rglob(name)
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)

    return values(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28), values(f"{prefix}-labels-idx1-ubyte.gz", 8)


def write_garments(source, root):
    for origin, counts in GARMENT_COUNTS.items():
        images, labels = read_garments(source, GARMENT_FILES[origin])
        for label, name in enumerate(GARMENTS):
            members = np.flatnonzero(labels == label).tolist()
            random.Random(f"fashion {origin} {label} {SEED}").shuffle(members)
            for part, count in counts.items():
                folder = root / part / name
                folder.mkdir(parents=True)
                for index in sorted(members[:count]):
                    Image.fromarray(images[index]).save(folder / f"{index:05}.png")
                members = members[count:]


def describe(root):
    """Counts the images of a task and hashes them. PNG files are hashed by pixels, since their compression may change."""
    digest = hashlib.sha256()
    counts = dict.fromkeys(TEXTILE_SHARES, 0)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        counts[path.relative_to(root).parts[0]] += 1
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes() if path.suffix == ".jpg" else Image.open(path).tobytes())
    print(f"{root.name}: {counts}, {digest.hexdigest()[:16]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=pathlib.Path, help="wheel of conformal-clip-data")
    parser.add_argument("--fashion", type=pathlib.Path, help="folder into which dataset-fashion-mnist was unpacked")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the tasks")
    options = parser.parse_args()
    if options.wheel is None and options.fashion is None:
        parser.error("give --wheel, --fashion or both")
    for source, name, write in (
        (options.wheel, "textiles", write_textiles),
        (options.fashion, "fashion", write_garments),
    ):
        root = options.output / name
        if source is None:
            continue
        if root.exists():
            sys.exit(f"{root} exists already; remove it or choose another --output")
        write(source, root)
        describe(root)


if __name__ == "__main__":
    main()
