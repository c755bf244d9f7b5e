"""Interpret the pickle inside a PyTorch checkpoint without running anything.

A pickle is a program for a stack machine, and Python's own machine calls whatever the program
names. The one here knows the opcodes that PyTorch writes and a closed list of names. Nothing is
ever imported: a name becomes a `Global`, a tensor a `Tensor` that says where its numbers lie, a
TorchScript module an `Object` with its attributes. Any other name is refused by name, wherever
in the file it stands.

Time and memory are bounded by `MAX_STEPS`. The memo is a dict (a list would let eight bytes ask
for gigabytes), keys of dicts are strings and small integers (a deep tuple would overflow C's stack
when hashed), and no string or number is longer than the pickle.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clip_jax.pretrained.mapped_file import BadFileError, shown

# A ViT-bigG with its optimizer takes about 120,000.
MAX_STEPS = 1_000_000

STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Double": "float64",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
    }.items()
}
"""PyTorch's storage classes, and NumPy's names of their types."""

_NUMPY_BUILDERS = ("scalar", "_reconstruct")
# Names that training scripts keep beside their weights. Such objects stay empty: no reader uses
# them.
_INERT = {
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY_BUILDERS),
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32")),
    "builtins.dict",
    "__builtin__.dict",
}
_TORCHSCRIPT = re.compile(r"__torch__(\.\w+)+", re.ASCII)
_REMEDY = (
    "nothing in it was run: where you trust the file, load it with torch and save the tensors"
    " alone, torch.save(model.state_dict(), path)"
)


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """`count` numbers in the archive's member `data/<key>`."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage, counted in items; not yet checked against the storage's size."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Object:
    """An object whose class is named and never called; a TorchScript module has attributes."""

    name: str
    attributes: dict = field(default_factory=dict)


def load_pickle(data: bytes) -> Any:
    """Return the value that a pickle describes, of plain containers and the classes above.

    Raises:
      BadFileError: the pickle is damaged, or names something that is not on the list.
    """
    machine = _Machine(data)
    for _ in range(MAX_STEPS):
        at = machine.at
        opcode = machine.take(1)[0]
        if opcode == _STOP:
            return machine.pop()
        step = _STEPS.get(opcode)
        if step is None:
            raise BadFileError(
                f"the pickle's opcode {opcode:#04x} at byte {at} is not one torch writes"
            )
        step(machine)
    raise BadFileError(f"the pickle takes more than {MAX_STEPS} steps", _REMEDY)


class _Machine:
    """The stack, the marks on it (positions), the memo, and the position in the program."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        """Return the next bytes of the program."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise BadFileError("the pickle ends in the middle")
        return self.data[start : self.at]

    def number(self, form: str) -> Any:
        """Return the next number of the program, in a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Return the next line of the program, without its end."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise BadFileError("the pickle ends inside a name")
        return _text(self.take(end + 1 - self.at)[:-1])

    def pop(self) -> Any:
        """Remove and return the value on top of the stack, down to the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise BadFileError("the pickle takes more from its stack than it put there")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Remove and return everything above the last mark."""
        if not self.marks:
            raise BadFileError("the pickle has no mark where it needs one")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def top(self, kind: type) -> Any:
        """Return the value on top of the stack, which must be of this type."""
        value = self.pop()
        self.stack.append(value)
        if type(value) is not kind:
            raise BadFileError(
                f"the pickle has a {type(value).__name__} in place of a {kind.__name__}"
            )
        return value


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadFileError("a string in the pickle is not UTF-8") from None


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(value(machine))

    return step


def _counted(form: str, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """Return the step of an opcode followed by a length and that many bytes."""
    return _push(lambda m: convert(m.take(m.number(form))))


def _long(data: bytes) -> int:
    if len(data) > 16:
        raise BadFileError("the pickle holds a number of more than 128 bits")
    return int.from_bytes(data, "little", signed=True)


def _tuple(size: int) -> Callable[[_Machine], None]:
    return _push(lambda m: tuple([m.pop() for _ in range(size)][::-1]))


def _checked(name: str) -> Global:
    if name in STORAGES or name in _CALLS or name in _INERT or _TORCHSCRIPT.fullmatch(name):
        return Global(name)
    raise BadFileError(f"names {shown(name)}, which no file of plain tensors needs", _REMEDY)


def _global(machine: _Machine) -> Global:
    module, name = machine.line(), machine.line()
    return _checked(f"{module}.{name}")


def _stack_global(machine: _Machine) -> Global:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise BadFileError("the pickle names something by what is no string")
    return _checked(f"{module}.{name}")


def _put(form: str) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        value = machine.pop()
        machine.stack.append(value)
        machine.memo[machine.number(form) if form else len(machine.memo)] = value

    return step


def _get(machine: _Machine, form: str) -> Any:
    key = machine.number(form)
    if key not in machine.memo:
        raise BadFileError(f"the pickle reads entry {key} of its memo, which was never written")
    return machine.memo[key]


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.top(dict)
    if len(items) % 2:
        raise BadFileError("the pickle gives a dict a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int) or (isinstance(key, int) and abs(key) >> 64):
            raise BadFileError(f"the pickle has a dict with a {type(key).__name__} as a key")
        target[key] = value


def _append(machine: _Machine, items: list[Any]) -> None:
    machine.top(list).extend(items)


def _call_of(machine: _Machine) -> tuple[str, tuple]:
    """Return the name and the arguments of a call on top of the stack."""
    args, function = machine.pop(), machine.pop()
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise BadFileError("the pickle calls what is no name")
    return function.name, args


def _reduce(machine: _Machine) -> Any:
    name, args = _call_of(machine)
    if name in _INERT:
        return Object(name)
    if name not in _CALLS:
        raise BadFileError(f"calls {shown(name)}, which no file of plain tensors needs", _REMEDY)
    return _CALLS[name](args)


def _new_object(machine: _Machine) -> Object:
    name, args = _call_of(machine)
    if name not in _INERT and (args or not _TORCHSCRIPT.fullmatch(name)):
        raise BadFileError(f"makes a {shown(name)}, which no file of plain tensors needs", _REMEDY)
    return Object(name)


def _build(machine: _Machine) -> None:
    """Give an object its attributes. Those of a dict (`state_dict()._metadata`) are not needed."""
    state = machine.pop()
    target = machine.pop()
    machine.stack.append(target)
    if type(target) is Object and isinstance(state, dict):
        target.attributes = state
    elif type(target) not in (Object, dict):
        raise BadFileError(f"the pickle gives attributes to a {type(target).__name__}")


def _persistent(machine: _Machine) -> Storage:
    match machine.pop():
        case ("storage", Global(name), str(key), str(), int(count)) if name in STORAGES:
            return Storage(STORAGES[name], key, count)
    raise BadFileError("the pickle refers to something that is no tensor storage")


def _tensor(args: tuple) -> Tensor:
    match args[:4]:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides)):
            if all(type(number) is int for number in (*shape, *strides)):
                return Tensor(storage, offset, shape, strides)
    raise BadFileError("the pickle describes a tensor by the wrong fields")


def _tensor_v2(args: tuple) -> Tensor:
    # The seventh field marks tensors whose stored numbers are negated or conjugated.
    if len(args) not in (6, 7) or (len(args) == 7 and args[6]):
        raise BadFileError("the pickle holds a tensor of a form that is not read here", _REMEDY)
    return _tensor(args)


def _parameter(args: tuple) -> Tensor:
    match args:
        case (Tensor() as tensor, _, _):
            return tensor
    raise BadFileError("the pickle describes a parameter by the wrong fields")


def _empty_dict(args: tuple) -> dict:
    if any(not isinstance(arg, Global) for arg in args):
        raise BadFileError("the pickle fills a dict in a way that torch does not")
    return {}


def _first(kind: type) -> Callable[[tuple], Any]:
    """Return the function that takes TorchScript's type tag off a value, which stands first."""

    def untag(args: tuple) -> Any:
        if not args or not isinstance(args[0], kind):
            raise BadFileError("the pickle tags a value by the wrong fields")
        return args[0]

    return untag


_CALLS: dict[str, Callable[[tuple], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "torch.jit._pickle.build_intlist": _first(list),
    "torch.jit._pickle.build_tensorlist": _first(list),
    "torch.jit._pickle.build_doublelist": _first(list),
    "torch.jit._pickle.build_boollist": _first(list),
    "torch.jit._pickle.restore_type_tag": _first(object),
}

_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: _protocol(m.number("<B")),  # PROTO
    0x95: lambda m: m.number("<Q"),  # FRAME: only a hint for buffering
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): lambda m: m.pop(),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("K"): _push(lambda m: m.number("<B")),
    ord("M"): _push(lambda m: m.number("<H")),
    ord("J"): _push(lambda m: m.number("<i")),
    0x8A: _counted("<B", _long),  # LONG1
    ord("G"): _push(lambda m: m.number(">d")),
    ord("X"): _counted("<I", _text),
    0x8C: _counted("<B", _text),  # SHORT_BINUNICODE
    0x8D: _counted("<Q", _text),  # BINUNICODE8
    ord("U"): _counted("<B", bytes),
    ord("T"): _counted("<I", bytes),
    ord("C"): _counted("<B", bytes),
    ord("B"): _counted("<I", bytes),
    ord(")"): _tuple(0),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): _push(lambda m: tuple(m.pop_mark())),
    ord("]"): _push(lambda m: []),
    ord("a"): lambda m: _append(m, [m.pop()]),
    ord("e"): lambda m: _append(m, m.pop_mark()),
    ord("}"): _push(lambda m: {}),
    ord("s"): lambda m: _set_items(m, [m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: _set_items(m, m.pop_mark()),
    ord("q"): _put("<B"),
    ord("r"): _put("<I"),
    0x94: _put(""),  # MEMOIZE
    ord("h"): _push(lambda m: _get(m, "<B")),
    ord("j"): _push(lambda m: _get(m, "<I")),
    ord("c"): _push(_global),
    0x93: _push(_stack_global),
    ord("Q"): _push(_persistent),
    ord("R"): _push(_reduce),
    0x81: _push(_new_object),
    ord("b"): _build,
}


def _protocol(version: int) -> None:
    if not 2 <= version <= 5:
        raise BadFileError(f"the pickle is of protocol {version}; torch writes 2 to 5")
