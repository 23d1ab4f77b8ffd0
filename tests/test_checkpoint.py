"""Files: what is read, what is refused, and that nothing is ever half-written."""

import builtins
import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, load_state_dict


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


def test_functions_cannot_be_altered(tmp_path):
    """A pickle may set attributes of what it holds; not of the reader's own functions."""
    path = tmp_path / "evil.ckpt"
    program = b"\x80\x02c_codecs\nencode\nN}X\x01\x00\x00\x00xK\x01s\x86b."  # encode.__setstate__((None, {"x": 1}))
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", program)
    with pytest.raises(CheckpointError):
        load_state_dict(path)
    assert not hasattr(checkpoint._encode, "x")


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
    torch.save({"w": torch.ones(1).expand(10**13)}, tmp_path / "repeat.pt")
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
    checkpoint.save_safetensors(path, {"w": torch.ones(2)}, {"k": "v"})

    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        checkpoint.write_atomically(path, fail)
    assert torch.equal(load_state_dict(path)["w"], torch.ones(2)) and checkpoint.load_metadata(path) == {"k": "v"}
    with pytest.raises(OSError):
        checkpoint.write_folder(tmp_path / "checkpoints" / "step-000001", {"x": lambda p: p.write_text("x"), "y": fail})
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert not list(tmp_path.rglob("*.partial"))


def test_channels_last_weights_are_saved(tmp_path):
    w = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoint.save_safetensors(tmp_path / "w.safetensors", {"w": w})
    assert torch.equal(load_state_dict(tmp_path / "w.safetensors")["w"], w)
