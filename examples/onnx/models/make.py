"""Trains three small PyTorch models on the handwritten digits of the UCI repository and exports them to ONNX.

    pip install -r requirements.txt
    python make.py

It writes the files beside it:

- `vit.onnx`, the model of the example: a Vision Transformer of Hugging Face's transformers
- `block.onnx`, for the tests: a transformer block whose attention is wider than its tokens, so that no weight is square
- `conv.onnx`, for the tests: convolutions and linear layers, and a weight that the importer cannot make a layer of
- `reference.safetensors`: what PyTorch computes for a few of the test images
"""

import json
import pathlib
import tempfile

import numpy as np
import onnx
import onnxscript
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

SEED = 7
HERE = pathlib.Path(__file__).resolve().parent
DIGITS = HERE.parent.parent / "dinov2" / "data" / "digits.bin"
VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "onnx": onnx.__version__,
    "onnxscript": onnxscript.__version__,
    "seed": str(SEED),
}


def digits():
    """The images, `[count, 1, 8, 8]` from -1 to 1, and their digits. Every fifth image is kept for testing."""
    records = np.fromfile(DIGITS, dtype=np.uint8).reshape(-1, 65)
    images = torch.from_numpy(records[:, :64].astype(np.float32) / 8 - 1).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(records[:, 64].astype(np.int64))
    is_test = torch.arange(len(records)) % 5 == 4
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


class Vit(nn.Module):
    """`transformers.ViTForImageClassification`, which returns only the logits here."""

    def __init__(self):
        super().__init__()
        self.inner = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=96,
                num_labels=10,
                attn_implementation="eager",
            )
        )

    def forward(self, images):
        return self.inner(pixel_values=images).logits


class Block(nn.Module):
    """One block of a transformer over the eight rows of a digit: tokens of 24 numbers, four heads of 10."""

    HEADS, HEAD = 4, 10

    def __init__(self):
        super().__init__()
        width, inner = 24, self.HEADS * self.HEAD
        self.embed = nn.Linear(8, width)
        self.rows = nn.Parameter(torch.randn(1, 8, width) * 0.1)
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 60)
        self.down = nn.Linear(60, width)
        self.head = nn.Linear(8 * width, 10)

    def heads(self, tokens):
        return tokens.reshape(-1, 8, self.HEADS, self.HEAD).transpose(1, 2)

    def forward(self, images):
        tokens = self.embed(images.reshape(-1, 8, 8)) + self.rows
        inner = self.norm1(tokens)
        query, key, value = (self.heads(layer(inner)) for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(-1, 8, self.HEADS * self.HEAD)
        tokens = tokens + self.output(mixed)
        tokens = tokens + self.down(nn.functional.gelu(self.up(self.norm2(tokens))))
        return self.head(tokens.flatten(1))


class Conv(nn.Module):
    """Convolutions with rectangular kernels. `mix` multiplies from the left, which is no linear layer of Burn."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 12, (3, 2), stride=(1, 2), padding=(1, 0))
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 20, (2, 3), stride=(2, 1), padding=(0, 1), bias=False)
        self.mix = nn.Parameter(torch.randn(6, 20) * 0.2)
        self.hidden = nn.Linear(6 * 16, 40)
        self.head = nn.Linear(40, 10)

    def forward(self, images):
        x = torch.relu(self.norm(self.first(images)))
        x = torch.relu(self.second(x)).flatten(2)
        x = torch.matmul(self.mix, x).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


def train(model, images, labels, epochs):
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model, name, images):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        torch.onnx.export(
            model,
            (images,),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=20,
            external_data=False,
            dynamo=True,
        )
        file = onnx.load(path)
    # The stack traces of the exporter, which are a third of the file.
    for node in file.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*file.graph.value_info, *file.graph.input, *file.graph.output, *file.graph.initializer]:
        del value.metadata_props[:]
    del file.graph.metadata_props[:]
    del file.metadata_props[:]
    onnx.helper.set_model_props(file, VERSIONS)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, HERE / name)
    print(name, (HERE / name).stat().st_size, "bytes:", " ".join(node.op_type for node in file.graph.node))


def main():
    (images, labels), (test_images, test_labels) = digits()
    reference = {"images": test_images[:5].contiguous()}
    for name, kind, epochs in [("vit", Vit, 60), ("block", Block, 20), ("conv", Conv, 20)]:
        torch.manual_seed(SEED)
        model = train(kind(), images, labels, epochs)
        with torch.no_grad():
            logits = model(test_images)
            turned = model(test_images.rot90(1, (2, 3)))
        reference[name] = logits[:5].contiguous()
        upright, turned = ((out.argmax(1) == test_labels).float().mean().item() for out in (logits, turned))
        print(f"{name}: reads {upright:.1%} of the test digits, {turned:.1%} of them turned")
        export(model, f"{name}.onnx", images[:3])
    # One entry, since the order of several is random.
    save_file(reference, HERE / "reference.safetensors", metadata={"made_with": json.dumps(VERSIONS)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
