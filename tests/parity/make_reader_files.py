"""Write the checkpoint files of tests/golden/ with the genuine library.

python tests/parity/make_reader_files.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import reader_cases
from reader_cases import BFLOAT16, GOLDEN, SCRIPT, STATE, WRAPPED, numbers


def tensor(array):
    if array.dtype == BFLOAT16:
        return torch.tensor(array.astype("float32")).bfloat16()
    return torch.tensor(array)


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2, bias=False).half()
        self.bn = torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x).float())


class Scripted(torch.nn.Module):
    """Attributes of the kinds that a published archive has beside its tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("input_resolution", torch.tensor(0))
        self.visual = Visual()
        self.fc = torch.nn.Linear(4, 5).half()
        self.layers, self.names, self.scale = [1, 2], {"a": 1.5}, 2.0

    def forward(self, x):
        pooled = self.visual(x).mean((2, 3)).half()
        return self.fc(pooled) * self.scale + self.layers[0] + self.names["a"]


def scripted():
    module = Scripted().eval()
    module.load_state_dict({name: tensor(array) for name, array in SCRIPT.items()})
    return torch.jit.script(module)


def state():
    """Return STATE with the strides, offsets and sharing that its names speak of."""
    tensors = {name: tensor(array) for name, array in STATE.items()}
    tensors["turned"] = tensor(numbers((5, 3))).T
    tensors["middle"] = tensor(numbers((3, 4, 5)))[1]
    tensors["every_second"] = tensor(numbers((4, 6)))[:, ::2]
    tensors["tied"] = tensors["visual.conv1.weight"]
    return tensors


def wrapper():
    weights = {name: torch.nn.Parameter(tensor(array)) for name, array in WRAPPED.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3)
    sum((weight.float() ** 2).sum() for weight in weights.values()).backward()
    optimizer.step()
    for name, array in WRAPPED.items():
        weights[name].data = tensor(array)
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": weights,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
    }


def main():
    torch.save(state(), GOLDEN / "state_dict.pt")
    torch.save(wrapper(), GOLDEN / "wrapper.pt")
    torch.jit.save(scripted(), GOLDEN / "torchscript.pt")
    small = {"weight": tensor(reader_cases.numbers((2, 3)))}
    torch.save(small, GOLDEN / "legacy.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
