"""Files as they are found: by content and not by name, wrapped, nested, half downloaded; and written whole or not."""

import builtins
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import merge
from tests.conftest import golden  # noqa: F401 (puts the repository on the path)
from weights import CheckpointError, ModelSource, load_model, load_state_dict, writing
from weights.reading import load_metadata
from weights.writing import checksum, save_json, save_pickle, save_safetensors, write_folder, write_safetensors

OWN = {
    "control_model.input_hint_block.0.weight": torch.rand(16, 3, 3, 3),
    "control_model.zero_convs.0.0.weight": torch.ones(1),
}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def refused(path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as e:
        load_state_dict(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400


# ------------------------------------------------------------------------------------------------- what a file is
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_protocols(protocol, legacy, tmp_path):
    big = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        {"a.weight": big, "a.view": big[1:3, ::2], "p": torch.nn.Parameter(torch.ones(3).half()), "n": torch.tensor(7),
         "b": torch.randn(2, 3).bfloat16(), "empty": torch.empty(0), "long." * 60: torch.ones(2)}
    )  # fmt: skip
    state._metadata = OrderedDict({"": {"version": 1}})
    beside = {
        "epoch": np.float64(3), "seen": {1, "two"}, "frozen": frozenset({1}), "bytes": b"ab" * 200, "big": 10**30,
        "array": np.ones(3), "size": torch.Size((1, 2)), "device": torch.device("cuda:0"), "a.weight": [None, True],
    }  # fmt: skip
    path, want = tmp_path / "a.ckpt", {k: v.detach() for k, v in state.items()}
    for content in (state, {"state_dict": state} | beside):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
        assert equal(load_state_dict(path), want)
    if not legacy and Path("/proc/self/maps").exists():  # memory stays mapped
        tensor = load_state_dict(path)["a.weight"]
        places = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(path) in line]  # noqa: SIM115
        assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in places)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_later_protocols_are_inspected_too(protocol, legacy, tmp_path):
    class Evil:
        def __init__(self, function, *args):
            self.call = (function, args)

        def __reduce__(self):
            return self.call

    huge = torch.ones(1).expand(10**9)  # walked over, it becomes a billion objects
    for function, *args in (
        (os.system, f"touch {tmp_path / 'ran'}"), (builtins.eval, "1"), (set, huge), (OrderedDict, huge),
        (OrderedDict, [huge]), (torch.Size, huge), (bytearray, 10**12), (getattr, "x", "y"),
    ):  # fmt: skip
        content = {"w": torch.ones(2), "x": Evil(function, *args)}
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / "a.ckpt", "refused, its pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"\x80\x02}c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0zip\x86RK\1s.", "calls _codecs.encode with something"),
        (b"\x80\x02}ccollections\nOrderedDict\n)R(lbK\1s.", "sets the state of something"),
        (b"\x80\x04}\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85RK\1s.", "asks for os.system"),
        (b"\x80\x04}\x8c\x02osK\1\x93)RK\1s.", "computes the name"),
        (b"\x80\x05}\x97K\1s.", "opcode NEXT_BUFFER; .*torch.save.torch.load"),
        (b"cos\nsystem\n(S'id'\ntR.", "protocol 0 or 1"),
        (b"\x80\x04(" + b"N" * 1_100_000 + b"\x90.", "a pickle of more than"),
        (b"\x80\x04(\x8d\0\0\x40\0\0\0\0\0" + b"a" * (1 << 22) + b"\x94" + b"h\0" * 99 + b"t.", "more than"),
    ],
)  # fmt: skip
def test_programs_that_are_refused(program, says, tmp_path):
    from tests.test_weights import with_program

    with_program(tmp_path / "a.pt", program)
    refused(tmp_path / "a.pt", says)


def test_files_are_known_by_their_content(tmp_path):
    metadata = {"config": "x"}
    for name in ("a.ckpt", "a.sft", "a.pth", "a", "a.safetensors", "a.bin"):
        save_safetensors(tmp_path / name, OWN, metadata)
        assert equal(load_state_dict(tmp_path / name), OWN) and load_metadata(tmp_path / name) == metadata
        for legacy in (False, True):
            torch.save(OWN, tmp_path / name, _use_new_zipfile_serialization=not legacy)
            assert equal(load_state_dict(tmp_path / name), OWN) and load_metadata(tmp_path / name) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page and not the file"),
        (b"\xef\xbb\xbf\n  <html>\n<head>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page"),
        (b"Entry not found", "a text, which begins: Entry not found"),
        (b'{"error":"Invalid credentials"}', "a text, which begins: .*Invalid credentials"),
        (b"", "is empty"),
        (b"\0" * 5000, "begins with zeros"),
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (bytes(range(1, 255)), "neither safetensors nor written by torch.save"),
        (b"\x40\0\0\0\0\0\0\0{" + b'"a":', "damaged"),
    ],
)
def test_what_was_downloaded_instead_is_named(content, says, tmp_path):
    for name in ("a.safetensors", "a.ckpt"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name}: .*{says}")


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "a.ckpt", "no such file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.ckpt")
        refused(tmp_path / "pipe.ckpt", "not a regular file")


# ----------------------------------------------------------------------------------------------- names and nesting
@pytest.mark.parametrize(
    "wrap",
    [
        lambda k: f"module.{k}", lambda k: f"_orig_mod.{k}", lambda k: f"module._orig_mod.{k}",
        lambda k: f"_orig_mod.module.module.{k}", lambda k: k.replace("control_model.", "control_model.module."),
        lambda k: k.replace("control_model.", "control_model._orig_mod."), lambda k: f"_forward_module.{k}",
        lambda k: k.replace("zero_convs.0.", "zero_convs.0._checkpoint_wrapped_module."),
        lambda k: "module." + k.removeprefix("control_model."),
    ],
)  # fmt: skip
def test_prefixes_of_wrappers(wrap, tmp_path):
    wrapped = {wrap(k): v for k, v in OWN.items()}
    torch.save(wrapped, tmp_path / "a.pth")
    save_safetensors(tmp_path / "a.safetensors", wrapped)
    assert equal(load_state_dict(tmp_path / "a.pth"), OWN) and equal(load_state_dict(tmp_path / "a.safetensors"), OWN)


def test_prefixes_that_tell_tensors_apart_stay(tmp_path):
    state = {"module.x": torch.ones(1), "x": torch.zeros(1)}
    save_safetensors(tmp_path / "a.safetensors", state)
    assert equal(load_state_dict(tmp_path / "a.safetensors"), state)
    state = {"adapter.module.x": torch.ones(1), "my_orig_mod.y": torch.zeros(1)}  # not of a wrapper
    save_safetensors(tmp_path / "a.safetensors", state)
    assert equal(load_state_dict(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize(
    "content",
    [
        {"model": OWN, "epoch": 1}, {"module": OWN, "step": torch.tensor(3)}, {"params": OWN}, {"ema": OWN},
        {"params_ema": OWN}, {"model": {"state_dict": OWN}, "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
        {"net": OWN}, {"my_controlnet": OWN, "args": {"lr": 1}}, {"ema": {"x": torch.ones(1)}, "model": OWN},
        {"state_dict": OWN, "model": "SD 1.5"}, {"model_state_dict": {f"module.{k}": v for k, v in OWN.items()}},
    ],
)  # fmt: skip
def test_state_dicts_in_what_trainers_save(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert equal(load_state_dict(tmp_path / "a.pth"), OWN)


def test_several_state_dicts(tmp_path):
    torch.save({"one": OWN, "two": OWN}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "holds several state dicts .one, two.")
    inner = {"n": 1}
    content = {str(i): inner for i in range(100_000)} | {"a": {"b": {"c": {"d": OWN}}}}
    for value in list(content.values()):
        inner |= {"x": value}
    torch.save({"model": {"model": content}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "holds no tensors")


def test_tensors_that_repeat_the_file(tmp_path):
    big = torch.ones(1000)
    torch.save({str(i): big for i in range(10)}, tmp_path / "a.pth")
    assert len(load_state_dict(tmp_path / "a.pth")) == 10
    torch.save({str(i): big for i in range(1000)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "repeat the bytes of the file")


# ------------------------------------------------------------------------------------------------- who is to blame
def test_the_file_that_lacks_weights_is_blamed(base, tmp_path):
    state, metadata = load_state_dict(base), load_metadata(base)
    whole, control = tmp_path / "whole.safetensors", tmp_path / "control.safetensors"
    merge.main([str(base), str(whole)])
    merge.main(["extract", str(whole), str(control)])

    def broken(name: str, source: Path, lacks: str) -> Path:
        tensors = {k: v for k, v in load_state_dict(source).items() if not k.startswith(lacks)}
        save_safetensors(tmp_path / name, tensors, metadata)
        return tmp_path / name

    no_convs = broken("no_convs.safetensors", control, "control_model.zero_convs.")
    no_hint = broken("no_hint.safetensors", control, "control_model.input_hint_block.8.")
    half_vae = broken("half_vae.safetensors", base, "first_stage_model.decoder.")
    for source, says in (
        (ModelSource(base, control=no_convs), "no_convs.safetensors: .* weights under control_model. missing"),
        (ModelSource(base, control=no_hint), "no_hint.safetensors: lacks input_hint_block.8.weight"),
        (ModelSource(broken("no_vae.safetensors", base, "first_stage_model."), vae=half_vae), "half_vae.* missing"),
        (ModelSource(tmp_path / "no_vae.safetensors"), "no_vae.safetensors: has no VAE; --vae FILE gives one"),
        (ModelSource(broken("no_text.safetensors", base, "cond_stage_model.")), "has no text encoder"),
        (ModelSource(broken("half.safetensors", base, "model.diffusion_model.out"), control=control), "half.* missing"),
    ):
        with pytest.raises(CheckpointError, match=says) as e:
            load_model(source)
        assert "\n" not in str(e.value)
    assert load_model(ModelSource(tmp_path / "no_vae.safetensors", vae=base)).vae is not None
    with pytest.raises(CheckpointError, match="no_vae.safetensors: not a whole model: .*--vae FILE gives one"):
        merge.main(["export", str(tmp_path / "no_vae.safetensors"), str(tmp_path / "out")])
    merge.main(["export", str(whole), str(tmp_path / "folder")])
    file = tmp_path / "folder" / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items() if "final" not in k}, file)
    with pytest.raises(CheckpointError, match="folder/text_encoder: 2 of .* missing"):
        load_model(tmp_path / "folder")
    save_json(tmp_path / "run" / "config.json", {"base": str(tmp_path / "no_vae.safetensors")})
    write_folder(
        tmp_path / "run" / "checkpoints" / "step-000001",
        {f"{name}.safetensors": lambda path: write_safetensors(path, OWN, {}) for name in ("trained", "optimizer")}
        | {"state.json": lambda path: path.write_text('{"step": 1, "samples": 1, "config": {}}')},
    )
    with pytest.raises(CheckpointError, match="no_vae.safetensors: has no VAE|run: lacks input_hint_block"):
        load_model(tmp_path / "run")
    assert equal(load_state_dict(base), state)


# --------------------------------------------------------------------------------------------------------- writing
def test_checksums_are_made_while_writing(tmp_path, monkeypatch):
    tensors = {"a.w": torch.randn(3, 5), "b": torch.tensor(3), "c.e": torch.empty(0)}
    calls = []
    monkeypatch.setattr(writing, "checksum", lambda path: calls.append(path.name) or checksum(path))
    files = {"w.safetensors": lambda path: write_safetensors(path, tensors, {"k": "v"})}
    write_folder(tmp_path / "f", files | {"t.json": lambda path: path.write_text("{}")})
    sums = json.loads((tmp_path / "f" / "checksums.json").read_text())
    assert sums == {name: checksum(tmp_path / "f" / name) for name in ("w.safetensors", "t.json")}
    assert calls == ["t.json"]  # only what no writer has summed is read again
    import zlib

    assert sums["t.json"] == {"bytes": 2, "crc32": f"{zlib.crc32(b'{}'):08x}"}


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    write = lambda text: write_folder(tmp_path / "f", {"x": lambda path: path.write_text(text)})
    write("1")
    write("2")
    assert (tmp_path / "f" / "x").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["f"]
    rename = Path.rename

    def killed(self, to):
        if self.name == "f.partial":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write("3")
    assert (tmp_path / "f" / "x").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["f"]
    monkeypatch.undo()
    (tmp_path / "f").rename(tmp_path / "f.replaced")  # as a kill between the two renames leaves it
    fail = lambda path: (_ for _ in ()).throw(OSError("full"))
    with pytest.raises(OSError, match="full"):
        write_folder(tmp_path / "f", {"x": fail})
    assert (tmp_path / "f" / "x").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("missing", ["open", "fsync"])
def test_folders_that_cannot_be_flushed(missing, tmp_path, monkeypatch):
    """Windows opens no folders and flushes no file that is open for reading; some network disks flush no folders."""
    real_open, real_fsync, flushed, writable = os.open, os.fsync, [], set()

    def windows_open(path, flags, *rest):
        if missing == "open" and Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        fd = real_open(path, flags, *rest)
        writable.discard(fd)
        writable.update({fd} if flags & (os.O_RDWR | os.O_WRONLY) else ())
        return fd

    def windows_fsync(fd):
        if fd not in writable:
            raise OSError(9, "Bad file descriptor")
        flushed.append(fd)
        real_fsync(fd)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    write_folder(tmp_path / "f", {"x": lambda path: path.write_text("1")})
    save_safetensors(tmp_path / "a.safetensors", OWN)
    assert len(flushed) == 3 and (tmp_path / "f" / "x").read_text() == "1"
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):  # of a file, that is an error
        save_json(tmp_path / "b.json", {})


@pytest.mark.parametrize("write", [save_safetensors, save_pickle])
def test_outputs_on_a_full_disk(write, tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / ("a.ckpt" if write is save_pickle else "a.safetensors")
    write(path, OWN)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError):
            write(path, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
