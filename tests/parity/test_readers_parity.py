"""Files that torch, TorchScript, safetensors, open_clip and NumPy write, read to the bit."""

import argparse
import io
import random
from collections import defaultdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reader_cases

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
safetensors_torch = pytest.importorskip("safetensors.torch")

from open_clip.model import CLIP, convert_weights_to_lp  # noqa: E402

from clip_jax.errors import UserError  # noqa: E402
from clip_jax.pretrained.npz_file import read_npz  # noqa: E402
from clip_jax.pretrained.resize import (  # noqa: E402
    resize_image_positions,
    resize_text_positions,
)
from clip_jax.pretrained.safetensors_file import DTYPES, read_safetensors  # noqa: E402
from clip_jax.pretrained.torch_file import read_torch  # noqa: E402

TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
TOWERS = {"vit": VIT, "resnet": RESNET}


def clip(tower):
    torch.manual_seed(0)
    model = CLIP(16, TOWERS[tower], TEXT, quick_gelu=True).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.isfinite().all():
            buffer.uniform_(0.5, 1.5)  # running statistics of a model that was trained
    return model


def as_numpy(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same(arrays, tensors):
    return reader_cases.same(arrays, {name: as_numpy(value) for name, value in tensors.items()})


DTYPES_OF_TORCH = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool),
]


def tensors():
    """Return every type, as torch may hold it: whole, turned, cut, with a step, empty."""
    torch.manual_seed(1)
    views = {
        "whole": lambda x: x,
        "turned": lambda x: x.permute(2, 0, 1),
        "cut": lambda x: x[1:3, :, 2],
        "step": lambda x: x[::2, ::3],
        "one": lambda x: x[2, 3, 1],
        "thin": lambda x: x[:, 1:2].transpose(0, 1),
        "none": lambda x: x[2:2],
    }
    return {
        f"{name}.{dtype}": view((torch.randn(4, 5, 6) * 50).to(dtype))
        for name, view in views.items()
        for dtype in DTYPES_OF_TORCH
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("checksums", [True, False])
def test_torch_save(tmp_path, protocol, checksums):
    path, state = tmp_path / "x.pt", tensors()
    state["tied"] = state["turned.torch.float32"]
    torch.serialization.set_crc32_options(checksums)
    torch.save(state, path, pickle_protocol=protocol)
    torch.serialization.set_crc32_options(True)
    assert same(read_torch(path), state)
    torch.save({name: torch.nn.Parameter(state[name]) for name in ("turned.torch.float32",)}, path)
    assert same(read_torch(path), {"turned.torch.float32": state["turned.torch.float32"]})


@pytest.mark.parametrize("tower", TOWERS)
def test_open_clips_training_checkpoint(tmp_path, tower):
    """A file of open_clip's training loop, distributed and compiled, optimizer and scaler too."""
    model = clip(tower)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    size = TOWERS[tower]["image_size"]
    image, text = model(torch.randn(2, 3, size, size), torch.ones(2, 8).long())[:2]
    (image * text).sum().backward()
    optimizer.step()
    state = {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}
    checkpoint = {
        "epoch": 2,
        "name": "2026_01_01-model_ViT-B-32-lr_0.001",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    torch.save(checkpoint, tmp_path / "epoch_2.pt")
    assert same(read_torch(tmp_path / "epoch_2.pt"), state)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert same(read_torch(tmp_path / "open_clip_pytorch_model.bin"), model.state_dict())


def test_what_trainers_keep_beside_their_weights(tmp_path):
    state = {"w": torch.randn(2)}
    checkpoint = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "best": np.float64(0.5),
        "step": np.int64(3),
        "rng": (np.random.RandomState(0).get_state(), random.Random(0).getstate()),
        "torch_rng": torch.get_rng_state(),
        "path": Path("runs"),
        "state": defaultdict(dict, {0: {"momentum": torch.ones(2)}}),
        "shape": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "state_dict": state,
    }
    for protocol in (2, 4):
        torch.save(checkpoint, tmp_path / "x.pt", pickle_protocol=protocol)
        assert same(read_torch(tmp_path / "x.pt"), state)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tower, method", [(t, m) for t in TOWERS for m in ("trace", "script")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_of_a_clip(tmp_path, tower, method, half):
    """As OpenAI publishes: weights of products in float16, norms and positions in float32."""
    model = clip(tower)
    if half:
        convert_weights_to_lp(model)
    path, size = tmp_path / "x.pt", TOWERS[tower]["image_size"]
    if method == "script":
        module = torch.jit.script(model)
    elif half:  # a trace runs with float32 images, which a float16 tower refuses
        module = torch.jit.trace(Holder(model), torch.zeros(1))
    else:
        # As open_clip's trace_model does, without its check: two traces differ in attention.
        image, text = torch.zeros(1, 3, size, size), torch.zeros(1, 8).long()
        inputs = {"forward": (image, text), "encode_image": (image,), "encode_text": (text,)}
        module = torch.jit.trace_module(model, inputs, check_trace=False)
    module.save(path)
    arrays = read_torch(path)
    expected = torch.jit.load(path).state_dict()
    masks = {name for name in arrays.keys() - expected.keys() if name.endswith("attn_mask")}
    assert same({name: arrays[name] for name in arrays.keys() - masks}, expected)
    assert model.state_dict().keys() <= {name.removeprefix("model.") for name in arrays}


class Holder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return x + self.input_resolution


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(clip("vit"), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"open_clip\.model\.CLIP"):
        read_torch(tmp_path / "x.pt")


def test_complex_sparse_and_negated_tensors_are_refused(tmp_path):
    complex_x = torch.randn(3, dtype=torch.complex64)
    for value in (
        torch.eye(3).to_sparse(),
        complex_x,
        complex_x.conj().imag,  # stored with a bit that says "negate"
    ):
        torch.save({"w": value}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="nothing in it was run"):
            read_torch(tmp_path / "x.pt")


def test_the_format_before_zip_is_refused(tmp_path):
    torch.save(tensors(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before version 1\.6"):
        read_torch(tmp_path / "x.pt")


def test_safetensors_of_every_type(tmp_path):
    path = tmp_path / "x.safetensors"
    state = {name: value.contiguous() for name, value in tensors().items()}
    safetensors_torch.save_file(state, path, metadata={"format": "pt"})
    assert same(read_safetensors(path), state)
    for name, dtype in [("U16", torch.uint16), ("U32", torch.uint32), ("U64", torch.uint64)]:
        safetensors_torch.save_file({"w": torch.arange(6).to(dtype)}, path)
        array = read_safetensors(path)["w"]
        assert array.dtype == DTYPES[name] and array.tolist() == [*range(6)]


def test_a_sharded_folder(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    state = clip("vit").state_dict()
    hub.save_torch_state_dict(state, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same(read_safetensors(tmp_path / "model.safetensors.index.json"), state)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    arrays = {
        f"params/img/{name}": as_numpy(value)
        for name, value in tensors().items()
    }  # fmt: skip
    path = tmp_path / "x.npz"
    save(path, **arrays)
    assert reader_cases.same(read_npz(path), arrays)
    with np.load(path, allow_pickle=False) as numpys:
        for name, array in read_npz(path).items():
            expected = numpys[name]
            assert array.tobytes() == expected.tobytes() and array.shape == expected.shape


def test_an_npz_as_jax_writes_it(tmp_path):
    import jax.numpy as jnp

    out = io.BytesIO()
    np.savez(out, **{"params/t": jnp.ones((3,), jnp.bfloat16)})
    (tmp_path / "x.npz").write_bytes(out.getvalue())
    array = read_npz(tmp_path / "x.npz")["params/t"]
    assert array.dtype == ml_dtypes.bfloat16 and array.tolist() == [1, 1, 1]


class ResizeTarget:
    """The attributes of a model that open_clip's resizing reads."""

    def __init__(self, grid, length):
        self.visual = self
        self.grid_size = grid
        self.positional_embedding = torch.zeros(length, 32)


def check_resized(resized, resize, key, positions, target):
    """Equal to open_clip's in float64; from its float32, no further than it is from that itself.

    torch keeps the place between two points in float32, and is off by up to 2e-5 for that.
    """
    results = {}
    for dtype in (torch.float32, torch.float64):
        state = {key: positions.to(dtype)}
        resize(state, target)
        results[dtype] = state[key].numpy()
    rounding = 2.5e-7  # half a unit in the last place of float32, of numbers below 4
    exact, single = results[torch.float64], results[torch.float32]
    assert resized.shape == exact.shape
    assert np.abs(resized - exact).max() <= rounding
    assert np.all(np.abs(resized - single) <= np.abs(single - exact) + rounding)


@pytest.mark.parametrize("old, new", [(7, (14, 14)), (14, (7, 7)), (16, (24, 24)), (7, (5, 12))])
def test_image_positions_as_open_clip_resizes_them(old, new):
    positions = torch.randn(1 + old * old, 32, generator=torch.Generator().manual_seed(old))
    resized = resize_image_positions(positions.numpy(), (old, old), new)
    key, resize = "visual.positional_embedding", open_clip.model.resize_pos_embed
    check_resized(resized, resize, key, positions, ResizeTarget(new, 8))


@pytest.mark.parametrize("old, new", [(77, 32), (77, 64), (77, 248), (16, 17), (2, 9), (9, 1)])
def test_text_positions_as_open_clip_resizes_them(old, new):
    positions = torch.randn(old, 32, generator=torch.Generator().manual_seed(old))
    resized = resize_text_positions(positions.numpy(), new)
    key, resize = "positional_embedding", open_clip.model.resize_text_pos_embed
    check_resized(resized, resize, key, positions, ResizeTarget((1, 1), new))
