"""Files: what is read, what is refused, and that nothing is ever half-written."""

import argparse
import builtins
import codecs
import io
import os
import pickle
import random
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from weights import CheckpointError, load_state_dict, pickles, reading
from weights.reading import load_metadata
from weights.runs import list_checkpoints
from weights.writing import save_safetensors, write_atomically, write_folder


class PytorchLightningCallback:
    """Pickled under pytorch_lightning's name, as the published SD 1.5 file has it."""

    def __init__(self):
        self.best = 1.0


PytorchLightningCallback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
PytorchLightningCallback.__qualname__ = PytorchLightningCallback.__name__ = "ModelCheckpoint"


def lightning_file(path, legacy: bool, monkeypatch) -> dict:
    """A checkpoint as Lightning writes it: a nested state dict, a callback class as a key, numpy scalars."""
    import sys
    import types

    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[PytorchLightningCallback.__module__].ModelCheckpoint = PytorchLightningCallback
    big = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        {
            "a.weight": big,
            "a.view": big[1:3, ::2],
            "b": torch.nn.Parameter(torch.ones(3, dtype=torch.float16)),
            "c": torch.tensor(7),
            "d": torch.randn(2, 3).bfloat16(),
            "e": torch.empty(0),
        }
    )
    content = {
        "epoch": np.float64(3.0),
        "state_dict": state,
        "callbacks": {PytorchLightningCallback: {"score": np.float32(1), "made": PytorchLightningCallback()}},
        "seen": {1, 2},
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return {k: v.detach() for k, v in state.items()}


@pytest.mark.parametrize("legacy", [False, True])
def test_published_kind_of_file(tmp_path, legacy, monkeypatch):
    path = tmp_path / "sd.ckpt"
    want = lightning_file(path, legacy, monkeypatch)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    got = load_state_dict(path)
    assert got.keys() == want.keys()
    for k, v in want.items():
        assert got[k].dtype == v.dtype and torch.equal(got[k], v), k


def test_zip_files_are_mapped_and_the_file_stays(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1000)}, path)
    before = path.read_bytes()
    load_state_dict(path)["w"].zero_()
    assert path.read_bytes() == before


def test_unaligned_storages_are_copied(tmp_path):
    """As in a file that a zip program has packed anew."""
    big = torch.arange(24.0).reshape(4, 6)
    state = {"a": big, "view": big[1:3, ::2], "b": torch.arange(9)}
    torch.save(state, tmp_path / "a.pt")
    for shift in range(1, 8):
        with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
            for info in old.infolist():
                new.writestr(info.filename.replace("a/", "a" * shift + "/", 1), old.read(info))
        got = load_state_dict(tmp_path / "b.pt")
        assert all(torch.equal(v, got[k]) and got[k].data_ptr() % v.itemsize == 0 for k, v in state.items())


class Evil:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def marker(tmp_path) -> str:
    return f"touch {tmp_path / 'ran'}"


HOSTILE = {
    "os.system": lambda p: Evil(os.system, marker(p)),
    "builtins.eval": lambda p: Evil(builtins.eval, f"__import__('os').system({marker(p)!r})"),
    "builtins.exec": lambda p: Evil(builtins.exec, f"open({str(p / 'ran')!r}, 'w')"),
    "builtins.getattr": lambda p: Evil(getattr, "x", "upper"),
    "torch.load": lambda p: Evil(torch.load, "x"),
    "subprocess.Popen": lambda p: Evil(__import__("subprocess").Popen, ["touch", str(p / "ran")]),
    "builtins.open": lambda p: Evil(builtins.open, str(p / "ran"), "w"),
    "builtins.__import__": lambda p: Evil(builtins.__import__, "os"),
    "functools.partial": lambda p: Evil(__import__("functools").partial, print),
    "torch.storage._load_from_bytes": lambda p: Evil(torch.storage._load_from_bytes, b"x"),
    "runpy._run_code": lambda p: Evil(__import__("runpy")._run_code, "1"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["zip", "legacy", "nested"])
def test_hostile_pickles_do_not_run(tmp_path, name, kind):
    path = tmp_path / "evil.ckpt"
    evil = HOSTILE[name](tmp_path)
    content = {"state_dict": {"w": torch.ones(2), "deep": [evil]}} if kind == "nested" else {"w": evil}
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(CheckpointError) as e:
        load_state_dict(path)
    assert "refused" in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()


def with_program(path, program: bytes) -> None:
    """A file as torch.save writes it, with a tensor storage "0" of two floats, whose pickle is `program`."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, program if info.filename.endswith("data.pkl") else old.read(info))


def refused(path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as e:
        load_state_dict(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_functions_cannot_be_altered(tmp_path):
    """A pickle may set attributes of what it holds; not of functions, classes or dtypes."""
    for module, name in (
        ("_codecs", "encode"),
        ("torch", "float32"),
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
    ):
        # NAME.__setstate__((None, {"x": 1}))
        with_program(tmp_path / "evil.ckpt", f"\x80\x02c{module}\n{name}\nN}}X\1\0\0\0xK\x01s\x86b.".encode("latin1"))
        refused(tmp_path / "evil.ckpt")
    assert not any(hasattr(thing, "x") for thing in (codecs.encode, torch.float32, OrderedDict, np.dtype))


class Built:
    """Pickles as a call of `function(*args)` whose result is given `state`."""

    def __init__(self, function, args, state):
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_states_do_not_corrupt_memory(tmp_path, legacy):
    """numpy's dtypes trust the state that a pickle gives them, and a tensor takes any view of its storage."""
    path, generator = tmp_path / "evil.ckpt", random.Random(0)
    save = lambda content: torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    values = [
        None,
        -1,
        0,
        1,
        8,
        2**31,
        -(2**31),
        "<",
        "|",
        "x",
        ("a", "b"),
        {"a": (np.dtype("f8"), 2**31)},
        np.dtype("O"),
    ]
    for _ in range(100):
        state = (3, *(generator.choice(values) for _ in range(generator.randrange(2, 9))))
        dtype = Built(np.dtype, ("V8", False, True), state)
        save({"w": torch.ones(2), "d": dtype, "s": Evil(np._core.multiarray.scalar, dtype, b"x" * 8)})
        assert torch.equal(load_state_dict(path)["w"], torch.ones(2))
    w = torch.ones(2)
    arguments = (w._typed_storage(), 0, (2,), (1,), False, OrderedDict())
    for size, stride in (
        ((2,), (1,)),
        ((2**31,), (1,)),
        ((10**13,), (0,)),
        ((2, 2), (2**40, -(2**40))),
        ((2**62, 8), (8, 1)),
    ):
        save({"w": Built(torch._utils._rebuild_tensor_v2, arguments, (w._typed_storage(), 0, size, stride))})
        refused(path, "refused, its pickle sets the state of a tensor")
        if size != (2,):
            save(
                {"w": Evil(torch._utils._rebuild_tensor_v2, w._typed_storage(), 0, size, stride, False, OrderedDict())}
            )
            refused(path)


def test_stand_ins_do_nothing(tmp_path, monkeypatch):
    """Neither what a stand-in is called with nor what it is given has an effect, and none stays behind."""
    lightning_file(tmp_path / "a.ckpt", False, monkeypatch)  # puts the class under pytorch_lightning's name
    odd = Built(PytorchLightningCallback, (), {"__class__": 1, "__setstate__": 2, "__init__": 3})
    space = argparse.Namespace(steps=1, me=odd)
    content = {"w": torch.ones(2), "odd": odd, odd: space, "array": np.ones(3), "where": torch.device("cuda:0")}
    torch.save(content | {"shape": torch.Size((1, 2)), "x": np.float32(1)}, tmp_path / "b.ckpt")
    before = set(torch.serialization.get_safe_globals())
    assert load_state_dict(tmp_path / "b.ckpt").keys() == {"w"}
    assert set(torch.serialization.get_safe_globals()) == before
    inert = vars(pickles.Inert)
    assert inert.keys() <= {"__module__", "__doc__", "__init__", "__setstate__", "__dict__", "__weakref__"}
    assert pickles.Inert().__dict__ == {}


def test_an_ordered_dictionary_cannot_bring_its_own_methods(tmp_path):
    state = Built(OrderedDict, (), dict.fromkeys(("get", "items", "keys", "__getitem__"), OrderedDict))
    state.call += (None, iter([("w", torch.ones(2))]))
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    assert torch.equal(load_state_dict(tmp_path / "a.pt")["w"], torch.ones(2))


def test_a_dictionary_that_contains_itself(tmp_path):
    for legacy in (False, True):
        content = {"w": torch.ones(2)}
        content["state_dict"] = content
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        assert load_state_dict(tmp_path / "a.pt").keys() == {"w"}


@pytest.mark.parametrize("legacy", [False, True])
def test_names_that_weights_do_not_need(tmp_path, legacy):
    """torch.load knows these; some build tensors of any size or outside of memory, some set any attribute."""
    names = {name for name in torch._weights_only_unpickler._get_allowed_globals() if name not in pickles.NEEDED_NAMES}
    names &= {f"{f.__module__}.{f.__qualname__}" for f in torch._weights_only_unpickler._tensor_rebuild_functions()} | {
        "torch._tensor._rebuild_from_type_v2", "torch.FloatTensor", "torch.Tensor", "torch.storage.UntypedStorage",
    }  # fmt: skip
    assert len(names) > 8
    for name in names:
        module, name = name.rsplit(".", 1)
        thing = getattr(__import__(module, fromlist=[name]), name)
        torch.save({"w": Evil(thing, 1)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / "a.pt", f"asks for {module}.{name},")


def test_pickles_that_would_take_for_ever(tmp_path, monkeypatch):
    twice = b"K\x01" + b"q\x00h\x00\x86" * 60  # t = (t, t), sixty times over: hashing takes 2**60 steps
    deep = b"K\x01" + b"\x85" * 10**6  # t = (t,), a million times over: hashing overflows the stack
    for key in (twice, deep):
        with_program(tmp_path / "a.pt", b"\x80\x02}" + key + b"K\x01s.")
        refused(tmp_path / "a.pt", "refused, its pickle holds a tuple of more than")
    with_program(tmp_path / "a.pt", b"\x80\x02])R.")
    refused(tmp_path / "a.pt", "calls something that has no name")
    for module in (pickles, reading):
        monkeypatch.setattr(module, "MAX_PICKLE", 1 << 16)
    with_program(tmp_path / "a.pt", b"\x80\x02" + b"N" * (1 << 17) + b".")
    refused(tmp_path / "a.pt", "its data.pkl claims")
    (tmp_path / "a.pt").write_bytes(reading.LEGACY_MAGIC + b"\x80\x02" + b"N" * (1 << 17) + b".")
    refused(tmp_path / "a.pt", "a pickle of more than")
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", b"\x80\x02" + b"N" * (1 << 15) + b".")
    refused(tmp_path / "a.pt", "compressed contents")


def test_what_torch_cannot_read_safely_is_named(tmp_path):
    with_program(tmp_path / "a.pt", b"\x80\x02N\x30.")  # an opcode that torch does not execute
    refused(tmp_path / "a.pt", "Unsupported operand 48")
    empty = Evil(
        torch._utils._rebuild_tensor_v2, torch.ones(2)._typed_storage(), 0, (0, -1), (1, 1), False, OrderedDict()
    )
    torch.save({"w": empty}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "negative size")


def test_older_formats_than_the_older_one(tmp_path):
    """A tar file, which torch.load would unpack, also one whose first bytes are those of a legacy file."""
    for head in (b"pickle", reading.LEGACY_MAGIC):
        with tarfile.open(tmp_path / "a.pt", "w", format=tarfile.GNU_FORMAT, encoding="latin1") as tar:
            tar.addfile(tarfile.TarInfo(head.decode("latin1")))
            link = tarfile.TarInfo("storages")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        assert tarfile.is_tarfile(tmp_path / "a.pt") and (tmp_path / "a.pt").read_bytes().startswith(head)
        refused(tmp_path / "a.pt", "damaged, or not a weight file")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux")
def test_memory_is_the_mapped_file(tmp_path):
    path = tmp_path / "mapped.pt"
    torch.save({"w": torch.ones(10000)}, path)
    w = load_state_dict(path)["w"]
    with open("/proc/self/maps") as maps:
        places = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(start, 16) <= w.data_ptr() < int(end, 16) for start, end in places)


def test_damaged_files(tmp_path):
    good = tmp_path / "good.pt"
    torch.save({"w": torch.ones(5000)}, good)
    content = good.read_bytes()
    cases = {
        "cut.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "text.ckpt": b"hello, I am not a checkpoint",
        "cut.safetensors": b"\x10\x00\x00\x00",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError) as e:
            load_state_dict(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    # a storage that claims more than there is
    buffer = io.BytesIO()
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"\0" * 8 if info.filename.endswith("data/0") else old.read(info))
    (tmp_path / "short.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="cut short"):
        load_state_dict(tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        torch.save({"a": 1}, tmp_path / "none.pt")
        load_state_dict(tmp_path / "none.pt")


def test_sizes_that_lie(tmp_path):
    """A tensor that repeats its storage to any size, a pickle that claims to unpack to gigabytes, a zip in a zip."""
    for legacy in (False, True):
        for tensor in (torch.ones(1).expand(10**13), torch.ones(5).as_strided((3, 3), (1, 1))):
            torch.save({"w": tensor}, tmp_path / "repeat.pt", _use_new_zipfile_serialization=not legacy)
            with pytest.raises(CheckpointError, match="larger than its storage"):
                load_state_dict(tmp_path / "repeat.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", b"\x80\x02" + b"0" * 100)
    content = bytearray((tmp_path / "bomb.pt").read_bytes())
    at = content.index(b"PK\x01\x02") + 24  # the unpacked size in the directory
    content[at : at + 4] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims 3221225472 bytes"):
        load_state_dict(tmp_path / "bomb.pt")
    inner = io.BytesIO()
    torch.save({"w": torch.ones(2)}, inner)
    with zipfile.ZipFile(tmp_path / "nested.pt", "w") as z:
        z.writestr("a/data.pkl", inner.getvalue())
    with pytest.raises(CheckpointError, match="nested.pt: damaged, or not a weight file"):
        load_state_dict(tmp_path / "nested.pt")


def test_writes_are_whole_or_absent(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"w": torch.ones(2)}, {"k": "v"})

    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, fail)
    assert torch.equal(load_state_dict(path)["w"], torch.ones(2)) and load_metadata(path) == {"k": "v"}
    with pytest.raises(OSError):
        write_folder(tmp_path / "checkpoints" / "step-000001", {"x": lambda p: p.write_text("x"), "y": fail})
    assert list_checkpoints(tmp_path) == []
    assert not list(tmp_path.rglob("*.partial"))


def test_channels_last_weights_are_saved(tmp_path):
    w = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    save_safetensors(tmp_path / "w.safetensors", {"w": w})
    assert torch.equal(load_state_dict(tmp_path / "w.safetensors")["w"], w)
