"""Read the files of `torch.save` and `torch.jit.save` as arrays, without torch; no code is run.

Both are zip archives: a pickle that describes the tensors (`torch_pickle`), and one uncompressed
member of raw numbers for each storage. Arrays are read-only views of the file wherever the tensor
is contiguous.
"""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.pretrained.mapped_file import BadFileError, map_file, reading, shown
from clip_jax.pretrained.shard_index import read_shards
from clip_jax.pretrained.torch_pickle import Object, Storage, Tensor, load_pickle
from clip_jax.pretrained.zip_file import Member, member_bytes, zip_members

# A ViT-bigG with its optimizer has 2 MB of pickle.
_MAX_PICKLE = 16 << 20
_MAX_RANK = 8
# Where a training wrapper keeps its weights; the first that is there.
_WRAPPED = ("state_dict_ema", "state_dict", "model_state_dict", "model_state", "model", "net")
# Bounds on what the walk through a TorchScript module yields: modules may be shared.
_MAX_NAMES, _MAX_NAME = 100_000, 512
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_SAVE_ALONE = "save the state dict alone: torch.save(model.state_dict(), path)"
_RESAVE = "load it with a recent torch and save it again: torch.save(torch.load(path), new_path)"


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint by name, as read-only arrays.

    A training wrapper (`{"epoch": ..., "state_dict": ..., "optimizer": ...}`) gives its
    `state_dict`, and where the mean of the weights over the steps was kept, that one
    (`state_dict_ema`). Of a TorchScript archive, names are the paths of attributes joined by dots;
    tensors that the module does not list in its `state_dict()` (a mask) are among them.
    Values that are no tensors are left out. Names are as stored, `module.` and all.

    Raises:
      UserError: the file is damaged, is no such file, or names anything but tensors and plain
        containers. Nothing in it is run in any case.
    """
    with reading(path):
        file_U = map_file(path)
        if file_U[: len(_LEGACY)].tobytes() == _LEGACY:
            raise BadFileError("is in PyTorch's format from before version 1.6", _RESAVE)
        if file_U[:2].tobytes() != b"PK":
            raise BadFileError(
                "is not a file of torch.save or torch.jit.save", "give a .pt or .bin"
            )
        members = zip_members(path, file_U)
        prefix, root = _read_pickle(file_U, members)
        tensors = _find_tensors(root)
        storages = _read_storages(file_U, members, prefix, tensors.values())
        return _arrays(tensors, storages, len(file_U))


def read_torch_shards(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of all files that a `.bin.index.json` names, as `read_torch` does.

    Raises:
      UserError: as `read_torch`, or the index names a file outside its folder.
    """
    return read_shards(path, ".bin", read_torch)


def _read_pickle(file_U: np.ndarray, members: dict[str, Member]) -> tuple[str, Any]:
    """Return the folder inside the archive, and what its pickle describes."""
    pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise BadFileError(
            f"holds {len(pickles)} members data.pkl in place of one",
            "give a file that torch.save or torch.jit.save wrote",
        )
    prefix = pickles[0].removesuffix("data.pkl")
    byteorder = members.get(prefix + "byteorder")
    if byteorder and member_bytes(file_U, byteorder).tobytes() != b"little":
        raise BadFileError("was not written on a little-endian machine", _RESAVE)
    member = members[pickles[0]]
    if member.size > _MAX_PICKLE:
        raise BadFileError(f"has a pickle of {member.size} bytes, more than any checkpoint needs")
    return prefix, load_pickle(member_bytes(file_U, member).tobytes())


def _find_tensors(root: Any) -> dict[str, Tensor]:
    """Return the tensors by name: of a module, a state dict, or the state dict in a wrapper."""
    if isinstance(root, dict):
        keys = [k for k in _WRAPPED if _holds_tensors(root.get(k))]
        if not keys and not any(isinstance(value, Tensor) for value in root.values()):
            # Under another name, if one dict alone holds tensors.
            held = [k for k, v in root.items() if isinstance(v, dict) and _holds_tensors(v)]
            keys = held if len(held) == 1 else []
        root = root[keys[0]] if keys else root
    if isinstance(root, Object):
        tensors = _module_tensors(root)
    elif isinstance(root, dict):
        tensors = {name: value for name, value in root.items() if isinstance(value, Tensor)}
    else:
        raise BadFileError(
            f"holds a {type(root).__name__}", "give a state dict, saved by torch.save"
        )
    if not tensors:
        items = root.items() if isinstance(root, dict) else ()
        inner = [shown(name) for name, value in items if isinstance(value, dict | Object)]
        names = ", ".join(inner[:8]) or "none"
        raise BadFileError(f"holds no tensors at its top (dicts in it: {names})", _SAVE_ALONE)
    for name in tensors:
        if not isinstance(name, str):
            raise BadFileError(f"has a tensor whose name is the number {name}", _SAVE_ALONE)
    return tensors


def _holds_tensors(value: Any) -> bool:
    """Return whether a value is a module, or a dict with tensors in it."""
    if isinstance(value, dict):
        return any(isinstance(item, Tensor) for item in value.values())
    return isinstance(value, Object)


def _module_tensors(module: Object) -> dict[str, Tensor]:
    """Return the tensors among a TorchScript module's attributes and those of its submodules."""
    tensors: dict[str, Tensor] = {}
    pending, visited = [("", module)], 0
    while pending:
        prefix, module = pending.pop()
        for name, value in module.attributes.items():
            full, visited = f"{prefix}{name}", visited + 1
            if visited > _MAX_NAMES or len(full) > _MAX_NAME:
                raise BadFileError("its module is larger or deeper than any model is")
            if isinstance(value, Tensor):
                tensors[full] = value
            elif isinstance(value, Object):
                pending.append((f"{full}.", value))
    return tensors


def _read_storages(
    file_U: np.ndarray, members: dict[str, Member], prefix: str, tensors: Iterable[Tensor]
) -> dict[tuple[str, str], np.ndarray]:
    """Return the numbers of every storage in use, flat and with their checksums compared.

    They are keyed by the storage's key and dtype.
    """
    used: dict[tuple[str, str], Storage] = {}
    for tensor in tensors:
        storage = used.setdefault((tensor.storage.key, tensor.storage.dtype), tensor.storage)
        if storage.count != tensor.storage.count:
            raise BadFileError(f"gives the storage {shown(storage.key)} two sizes")

    def read(storage: Storage) -> np.ndarray:
        member = members.get(f"{prefix}data/{storage.key}")
        if member is None:
            raise BadFileError(f"lacks the storage {shown(storage.key)} that its pickle describes")
        dtype = _dtype(storage.dtype)
        if member.size != storage.count * dtype.itemsize:
            raise BadFileError(
                f"declares {storage.count} numbers of {storage.dtype} in the storage"
                f" {shown(storage.key)} and holds {member.size} bytes of them"
            )
        return member_bytes(file_U, member).view(dtype)

    # zlib releases the interpreter: checksums, most of the time here, run side by side.
    with ThreadPoolExecutor() as pool:
        return dict(zip(used, pool.map(read, used.values()), strict=True))


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _arrays(
    tensors: dict[str, Tensor], storages: dict[tuple[str, str], np.ndarray], file_size: int
) -> dict[str, np.ndarray]:
    """Return each tensor as a view of its storage; a transposed one as a contiguous copy."""
    copied = 0
    arrays = {}
    for name, tensor in tensors.items():
        array = _view(name, tensor, storages[tensor.storage.key, tensor.storage.dtype])
        if not array.flags.c_contiguous:
            copied += array.nbytes
            if copied > file_size:
                raise BadFileError("describes more numbers by its tensors than the file holds")
            array = np.ascontiguousarray(array)
            array.flags.writeable = False
        arrays[name] = array
    return arrays


def _view(name: str, tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """Return the tensor's numbers inside its storage, which must hold all of them."""
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    outside = BadFileError(
        f"the tensor {shown(name)} of shape {shown(shape)} does not lie inside its storage"
        f" of {len(storage)} numbers"
    )
    # The rank comes first: a product of many large numbers takes hours.
    if not len(shape) == len(strides) <= _MAX_RANK or min((offset, *shape, *strides)) < 0:
        raise outside
    count = math.prod(shape)
    # A dimension of one has no step, and PyTorch keeps any number there.
    steps = [0 if n == 1 else step for n, step in zip(shape, strides, strict=True)]
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    fits = last < len(storage) if count else math.prod(max(n, 1) for n in shape) < 1 << 48
    if count > len(storage) or not fits:
        raise outside
    if not count:
        return storage[:0].reshape(shape)
    item = storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [step * item for step in steps], writeable=False
    )
