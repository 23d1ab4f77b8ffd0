"""A pickle is a program that names functions and calls them. Here it is read without executing it.

`inspect_pickle` refuses every program that could do more than hold weights, before `torch.load(weights_only=True)`
executes it:

    names     every name must be one that weights need or that we replace by an inert object
    calls     a function gets only what pickles of weights give it (`set` of a tensor would make an object a value)
    sizes     tuples, and the program itself, are bounded (to hash nested tuples can take exponential time)

torch executes the opcodes of protocol 2 alone. `to_protocol_2` rewrites later protocols; what it returns is inspected
like any other program, so nothing depends on the rewriting being right.
"""

import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from weights.configs import CheckpointError


class Inert:
    """Takes the place of a class or function that we do not load: accepts all arguments, does and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any):
        pass


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NEEDED_NAMES = {  # what weights consist of; torch.load knows all of these, and more that we refuse
    "collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode", "torch.Size", "torch.device",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in DTYPES), *(f"torch.{name}Storage" for name in STORAGES),
}  # fmt: skip
INERT_NAMES = {  # what trainers leave beside the weights
    "argparse.Namespace", "builtins.frozenset", "__builtin__.frozenset", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
}  # fmt: skip
INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.")
MAX_PICKLE = 8 << 20  # bytes; the pickle in Stable Diffusion's largest file has 400 thousand
MAX_OPCODES = 1 << 20  # Stable Diffusion's largest file has some 100 thousand; a million take seconds to inspect
MAX_TUPLE = 1000  # values in a tuple with all tuples inside it: hashing shared tuples would take exponential time


# --------------------------------------------------------------------------------------------------------- inspecting
class Value(NamedTuple):
    """What is known of a value on the stack of a pickle."""

    kind: str  # the opcode that made it, "name" for a function or class, "call" for what a call returned
    name: str = ""  # of the function or class, or of what was called
    text: str = ""
    size: int = 1  # of a tuple with all tuples inside it
    items: "tuple[Value, ...]" = ()  # of a tuple


def inspect_pickle(path: Path, program: bytes) -> list[tuple[type, str]]:
    """Stand-ins for those names in a pickle that torch.load does not know, found without executing the pickle.

    Raises CheckpointError, which names the file `path`, for a name that weights do not need, for a call that pickles of
    weights do not make, and for what would take memory or time out of proportion.
    """
    refuse = lambda reason: CheckpointError(f"{path}: refused, {reason}")
    names: set[str] = set()
    stack: list[Value] = []
    memo: dict[int, Value] = {}
    marks: list[int] = []
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "MARK":
            marks.append(len(stack))
            continue
        if "PUT" in opcode.name:
            memo[argument] = stack[-1]
            continue
        to_mark = pickletools.markobject in opcode.stack_before  # takes all values since the last MARK as well
        first = (marks.pop() + 2 if to_mark else len(stack)) - len(opcode.stack_before)
        values, stack[first:] = stack[first:], []
        result = Value(opcode.name, text=argument if isinstance(argument, str) else "")
        if "GET" in opcode.name:
            result = memo[argument]
        elif opcode.name == "GLOBAL":
            result = Value("name", argument.replace(" ", "."))
            names.add(result.name)
        elif opcode.name in ("REDUCE", "NEWOBJ"):
            function, arguments = values
            if function.kind != "name":
                raise refuse("its pickle calls something that has no name")
            if not _call_is_harmless(function.name, arguments):
                raise refuse(f"its pickle calls {function.name[:100]} with something that weights never give it")
            result = Value("call", function.name)
        elif opcode.name == "BUILD":
            target, state = values
            if target.name.startswith("torch"):
                raise refuse("its pickle sets the state of a tensor")
            if not _is_inert(target.name) and state.kind != "EMPTY_DICT":
                raise refuse("its pickle sets the state of something that has none")
            result = target
        elif opcode.name.startswith(("APPEND", "SETITEM")):
            result = values[0]
        elif "TUPLE" in opcode.name:
            size = 1 + sum(v.size for v in values)
            if size > MAX_TUPLE:
                raise refuse(f"its pickle holds a tuple of more than {MAX_TUPLE} values")
            result = Value("tuple", size=size, items=tuple(values))
        stack += [result] * len(opcode.stack_after)
    if unknown := sorted(name for name in names - NEEDED_NAMES if not _is_inert(name)):
        raise refuse(f"its pickle asks for {unknown[0][:100]}, which no weights need and which could run code")
    return [(Inert, name.replace("__builtin__.", "builtins.")) for name in names if _is_inert(name)]


def _is_inert(name: str) -> bool:
    return name in INERT_NAMES or name.startswith(INERT_PACKAGES)


def _call_is_harmless(name: str, arguments: Value) -> bool:
    """Whether a call keeps to what pickles of weights do; a function that walks over a huge tensor does not."""
    items = arguments.items
    made_here = all(v.kind in ("tuple", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET") for v in items)
    rules: dict[str, Callable[[], bool]] = {
        "collections.OrderedDict": lambda: not items,
        "builtins.set": lambda: made_here,
        "__builtin__.set": lambda: made_here,
        "torch.Size": lambda: made_here,
        "torch.device": lambda: all(v.kind in ("BINUNICODE", "BININT", "BININT1", "BININT2") for v in items),
        "_codecs.encode": lambda: len(items) == 2 and items[0].kind == "BINUNICODE" and items[1].text == "latin1",
    }
    return arguments.kind == "tuple" and (name not in rules or rules[name]())


# ---------------------------------------------------------------------------------------------------------- rewriting
# Values that weights do not consist of become simpler ones: bytes None, sets lists, frozen sets tuples. NEWOBJ_EX
# (class, arguments, keywords) becomes NEWOBJ of (arguments, keywords), which only an inert class accepts.
RESAVE = "torch.save's default, protocol 2, can be read: torch.save(torch.load(FILE), NEW_FILE)"
REWRITTEN = {
    "PROTO": b"", "FRAME": b"", "SHORT_BINBYTES": b"N", "BINBYTES": b"N", "BINBYTES8": b"N", "BYTEARRAY8": b"N",
    "EMPTY_SET": b"]", "ADDITEMS": b"e", "FROZENSET": b"t", "NEWOBJ_EX": b"\x86\x81",
}  # fmt: skip


def to_protocol_2(path: Path, program: bytes) -> bytes:
    """A pickle of a later protocol in opcodes of protocol 2, with equal tensors under equal keys.

    Later protocols number the memo silently (MEMOIZE) and take names from the stack (STACK_GLOBAL). Texts are not kept
    in the memo of the new program but written out wherever they are used, so that those of names can be left out.
    """
    out: list[bytes] = []  # of each opcode its new form
    texts: list[str | None] = []  # of each entry of `out` the text, if it pushes one
    memo: dict[int, str | None] = {}
    written, ops = 0, list(pickletools.genops(program))
    ends = [position for _, _, position in ops[1:]] + [len(program)]
    for (opcode, argument, position), end in zip(ops, ends, strict=True):
        piece, text = program[position:end], None
        if "UNICODE" in opcode.name:
            text = argument
        elif "GET" in opcode.name:
            text = memo.get(int(argument))
        if text is not None:
            encoded = text.encode("utf-8", "surrogatepass")
            piece = b"X" + struct.pack("<I", len(encoded)) + encoded
        elif opcode.name == "MEMOIZE" or "PUT" in opcode.name:
            key = len(memo) if opcode.name == "MEMOIZE" else int(argument)
            memo[key] = texts[-1]
            piece = b"r" + struct.pack("<I", key)
            if texts[-1] is not None:
                continue
        elif opcode.name == "STACK_GLOBAL":
            module, name = texts[-2:]
            if module is None or name is None or "\n" in module + name:
                raise CheckpointError(f"{path}: refused, its pickle computes the name of a function")
            del out[-2:], texts[-2:]
            piece = f"c{module}\n{name}\n".encode()
        elif opcode.name in REWRITTEN:
            piece = REWRITTEN[opcode.name]
        elif opcode.proto > 3:
            raise CheckpointError(f"{path}: refused, a pickle with the opcode {opcode.name}; {RESAVE}")
        written += len(piece)
        if written > MAX_PICKLE:
            raise CheckpointError(f"{path}: refused, a pickle of more than {MAX_PICKLE} bytes")
        if piece:
            out.append(piece)
            texts.append(text)
    return b"\x80\x02" + b"".join(out)


def read_program(path: Path, file: BinaryIO) -> tuple[bytes, list[tuple[type, str]], bool]:
    """The next pickle of `file` in opcodes of protocol 2, stand-ins (see `inspect_pickle`), and whether it was
    rewritten."""
    start, highest = file.tell(), 0
    for count, (opcode, _, position) in enumerate(pickletools.genops(file)):
        if position - start > MAX_PICKLE or count > MAX_OPCODES:
            raise CheckpointError(f"{path}: refused, a pickle of more than {MAX_PICKLE} bytes or {MAX_OPCODES} opcodes")
        if opcode.name != "PROTO":
            highest = max(highest, opcode.proto)
    end = file.tell()
    file.seek(start)
    program = file.read(end - start)
    if not program.startswith(b"\x80"):
        raise CheckpointError(f"{path}: refused, a pickle of protocol 0 or 1; {RESAVE}")
    if highest > 2:
        program = to_protocol_2(path, program)
    return program, inspect_pickle(path, program), highest > 2
