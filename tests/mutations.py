"""Seeded damage to files: what a broken disk, an odd program or a spiteful person makes of them.

`mutate(rng, name, content)` returns other bytes for the file `name`, a function of the state of `rng` alone. Most
mutations know the format (fields of JSON, headers of safetensors, members of zip files, opcodes of pickles, sizes in
pictures, heads of `.npy`), so that they get past the first check of a reader; the others are blind. `odd_file` puts
something into the place of a file that is not a file of bytes: a folder, a pipe, a device, a link.
"""

import io
import json
import os
import pickletools
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

# Values in JSON's own spelling, since Python's writer refuses some of them.
ODD_VALUES = (
    "null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity", "1e-320",
    "2147483648",
    "9223372036854775808", "-9223372036854775809", "1000000000", "9" * 5000, '""', '"x"', '" "', '"\\ud800"',
    '"\\u0000"', '"\\u2028\\n\\r"', '"\U0001f98a\u0301\u202e"', '"' + "a" * 5000 + '"', '"' + "x/" * 3000 + '"', '"."',
    '".."', '"/"', '"/dev/zero"', '"../../x"', '"C:\\\\x"', '"a\\\\b.png"', '"source"', "[]", "{}", "[[]]", "[null]",
    '[1, "a"]', '{"a": {"a": 1}}', "[" * 60 + "]" * 60, "[" * 20000 + "]" * 20000, '{"a":' * 20000 + "1" + "}" * 20000,
    "[" + "0," * 50000 + "0]", '"v_prediction"', '"1"', "[-1]", "[0]", "[1000000000]", "[1,1,1,1,1,1,1,1,1,1,1,1]",
)  # fmt: skip
ODD_NAMES = ("", "a" * 5000, "\ud800", "\0", "__class__", "__metadata__", "step", "config", "\U0001f98a", "0", "a.b.c")
OPCODES = (
    b"N", b"0", b"1", b"2", b"(", b"}", b"]", b")", b".", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 9,
    b"R", b"b", b"\x81", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a", b"e", b"d", b"l", b"Q", b"h\x00",
    b"j\0\0\0\x7f",
    b"q\xff", b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"cos\nsystem\n", b"cbuiltins\neval\n",
    b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n",
    b"ctorch\nFloatStorage\n", b"ctorch.nn.modules.linear\nLinear\n", b"cpytorch_lightning.x\ny\n",
    b"\x95" + b"\xff" * 8,
    b"\x93", b"\x94", b"\x8c\x02os", b"\x96" + b"\xff" * 7 + b"\x7f", b"I999999999999\n", b"Fnan\n", b"S'x'\n", b"Vx\n",
    b"\x80\x05", b"\x82\x01", b"P0\n", b"i__main__\nx\n", b"o", b"\x90", b"\x8f", b"\x91", b"\x97", b"\x98",
)  # fmt: skip
SIZES = (0, 1, 2, 7, 255, 256, 32767, 65535, 65536, 10**5, 10**6, 2**31 - 1, 2**31, 2**32 - 1)


def mutate(rng: random.Random, name: str, content: bytes) -> bytes:
    """Other content for the file `name`."""
    ending = Path(name).suffix.lower()
    by_format: dict[str, Callable[[random.Random, bytes], bytes]] = {
        ".json": _json_lines if Path(name).name == "prompt.json" else _json_file, ".jsonl": _json_lines,
        ".safetensors": _safetensors, ".ckpt": _zip_or_pickle, ".pth": _zip_or_pickle, ".png": _png, ".jpg": _jpeg,
        ".npy": _npy, ".tar": _tar, ".csv": _csv,
    }  # fmt: skip
    known = by_format.get(ending, _blind)
    return (known if rng.random() < 0.7 else _blind)(rng, content)


def _tar(rng: random.Random, content: bytes) -> bytes:
    """Change fields of the headers of a tar archive and make their checksums right; or repeat, drop or swap blocks."""
    data = bytearray(content)
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(heads, min(len(heads), rng.choice((1, 1, 2, 5)))):
        if rng.random() < 0.15:
            other = 512 * rng.randrange(len(data) // 512)
            data[at : at + 512], data[other : other + 512] = data[other : other + 512], data[at : at + 512]
            continue
        name = rng.choice((b"../x.png", b"/etc/passwd", b"a" * 100, b"0.png", b"\xff.png", b"", b".", b"0.", b"..txt"))
        size = rng.choice((b"77777777777\0", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"0" * 12, b"1", b"1000"))
        start, value = rng.choice((
            (0, name), (124, size), (156, rng.choice("0123456789xgLKSVMDNA\0").encode()), (156, b"x"),
            (157, b"/dev/zero"), (257, b"ustar  \0"), (345, b"../" * 20), (482, b"\1"),
        ))  # fmt: skip
        data[at + start : at + start + len(value)] = value
        data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512]))
    return bytes(data)


def _csv(rng: random.Random, content: bytes) -> bytes:
    """Odd cells, columns and quotes."""
    lines = [line.split(b",") for line in content.split(b"\n")]
    for _ in range(rng.choice((1, 1, 3))):
        line = rng.choice(lines)
        value = rng.choice((
            b"", b'"', b'""', b'"a', b'a"b"', b"\0", b"\xff", b"/etc/passwd", b"../x", b"C:\\x", b"image",
            b"x" * 200_000, b"\r", b'"\r\n"', b"1e999", b"9" * 5000, b"\xef\xbb\xbf",
        ))  # fmt: skip
        line[rng.randrange(len(line))] = value
        if rng.random() < 0.3:
            line.insert(0, value)
    return b"\n".join(b",".join(line) for line in lines)


def odd_file(rng: random.Random, path: Path) -> str:
    """Put something else into the place of the file `path`; says what."""
    content = path.read_bytes()
    path.unlink()
    what = rng.choice(("nothing", "empty", "folder", "pipe", "zeros", "loop", "dangling", "link", "outside"))
    if what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif what == "zeros":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("not-there")
    elif what in ("link", "outside"):  # as users link data from another disk
        other = (path.parent if what == "link" else path.parent.parent.parent) / "elsewhere"
        other.write_bytes(content)
        path.symlink_to(other)
    return what


# ---------------------------------------------------------------------------------------------------------------- blind
def _blind(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat, splice or overwrite bytes without knowing what they mean."""
    data = bytearray(content)
    size = len(data) or 1
    kind = rng.randrange(8)
    if kind == 0 or not data:
        return b"" if rng.random() < 0.5 else rng.randbytes(rng.choice((1, 8, 100)))
    if kind == 1:
        return bytes(data[: rng.randrange(size)])
    if kind == 2:  # near the front, where formats keep their lengths
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(min(size, 200))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 3:
        for _ in range(rng.choice((1, 5, 100))):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 4:
        a, b = sorted((rng.randrange(size), rng.randrange(size)))
        data[a:a] = data[a:b][:100_000]
    elif kind == 5:
        a = rng.randrange(size)
        del data[a : a + rng.choice((1, 8, 1000))]
    elif kind == 6:
        data += rng.choice((b"\0", b"\n", b"x" * 1000, bytes(data[:1000])))
    else:
        return rng.choice((_FOREIGN["html"], _FOREIGN["lfs"], _FOREIGN["utf16"], _FOREIGN["zip"], _FOREIGN["eps"]))
    return bytes(data)


def _empty_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    return buffer.getvalue()


_FOREIGN = {
    "html": b"<!doctype html><html>404</html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n",
    "utf16": '{"source": "a.png", "target": "b.png", "prompt": "x"}'.encode("utf-16"),
    "zip": _empty_zip(),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(ran) print\nshowpage\n",
}


# ----------------------------------------------------------------------------------------------------------------- JSON
def _json_file(rng: random.Random, content: bytes) -> bytes:
    return _json_text(rng, content.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")


def _json_lines(rng: random.Random, content: bytes) -> bytes:
    """Change some lines of a file that has one JSON object a line."""
    lines = content.decode("utf-8", "replace").splitlines() or ["{}"]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(("\r", "\r\n", "\n\n", ",\n", "\0")).join(lines).encode()
    if kind == 1:
        return ("[" + ",".join(lines) + "]").encode(rng.choice(("utf-8", "utf-16", "utf-32", "utf-8-sig")))
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(lines))
        lines[at] = _json_text(rng, lines[at])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _json_text(rng: random.Random, text: str) -> str:
    """A JSON text in which one value or one name is another, or the whole of which is another."""
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(ODD_VALUES)
    if kind == 1:
        return rng.choice(
            ("", "{", text[:-2], text + text, text + ",", text.replace('"', "'"), "\ufeff" + text, text.upper())
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # it was changed before
        return text[: len(text) // 2]
    places = list(_places(value))
    if not places:
        return rng.choice(ODD_VALUES)
    container, key = rng.choice(places)
    if kind == 2:
        del container[key]
    elif kind == 3 and isinstance(container, dict):
        container[rng.choice(ODD_NAMES)] = container.pop(key)
    elif kind == 4 and isinstance(container, dict):
        container[rng.choice(ODD_NAMES)] = container[key]
    elif kind == 5 and isinstance(container[key], str):  # JSON inside of JSON, as in the metadata of safetensors
        container[key] = _json_text(rng, container[key])
    elif kind == 6 and isinstance(container[key], (int, float)):
        container[key] = rng.choice((-container[key], container[key] + 1, container[key] * 10**6, str(container[key])))
    else:
        container[key] = "@odd@"
    return json.dumps(value).replace('"@odd@"', rng.choice(ODD_VALUES))


def _places(value: Any) -> Any:
    """All (container, key) inside of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


# --------------------------------------------------------------------------------------------------------- weight files
def _safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the header: its length, an offset, a shape, a dtype, a key, the metadata; or put NaN into the weights."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        size = rng.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
        return size.to_bytes(8, "little") + content[8:]
    if kind == 1:
        return content[: 8 + length] + b"\xff" * len(rest)
    fields = json.loads(header)
    names = [k for k in fields if k != "__metadata__"]
    name = rng.choice(names)
    entry = fields[name]
    if kind == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 2**62], [-1, 4], [8, 0], [0, 0], [2**64, 2**64], fields[names[0]]["data_offsets"])
        )
    elif kind == 3:
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**40, 2**40], [2**63], entry["shape"][::-1], [1, *entry["shape"]])
        )
    elif kind == 4:
        entry["dtype"] = rng.choice(("F64", "BOOL", "U8", "F8_E4M3", "F4", "x", "", "C64", "I64"))
    elif kind == 5:
        fields[_odd_key(rng, name)] = fields.pop(name)
    elif kind == 6:
        text = (
            _json_text(rng, json.dumps(fields["__metadata__"])) if "__metadata__" in fields else rng.choice(ODD_VALUES)
        )
        fields["__metadata__"] = "@odd@"
        return _with_header(json.dumps(fields).replace('"@odd@"', text), rest)
    else:
        return _with_header(_json_text(rng, header.decode()), rest)
    return _with_header(json.dumps(fields), rest)


def _with_header(text: str, rest: bytes) -> bytes:
    header = text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + rest


def _odd_key(rng: random.Random, name: str) -> str:
    """Another name for a weight, near to its own."""
    numbers = list(re.finditer(r"\d+", name))
    if numbers and rng.random() < 0.6:
        found = rng.choice(numbers)
        return name[: found.start()] + rng.choice(("2000000000", "9" * 400, "-1", "", "x", "99")) + name[found.end() :]
    parts = name.split(".")
    at = rng.randrange(len(parts))
    parts[at] = rng.choice((*ODD_NAMES[:3], "module", "_orig_mod", "lora_down", "weight_orig", parts[0], "down_blocks"))
    return ".".join(parts)


def _zip_or_pickle(rng: random.Random, content: bytes) -> bytes:
    if content.startswith(b"PK"):
        return _zip(rng, content)
    ends = [i + 1 for i, byte in enumerate(content[:20000]) if byte == ord(".")]
    end = rng.choice(ends) if ends else len(content)
    return _pickle(rng, content[:end]) + content[end:]


def _zip(rng: random.Random, content: bytes) -> bytes:
    """Pack the members anew: one missing, twice, compressed, renamed, cut or changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    victim = rng.choice(list(members) if rng.random() < 0.5 else [n for n in members if n.endswith("data.pkl")])
    kind, out = rng.randrange(8), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            if name != victim:
                archive.writestr(name, data)
            elif kind == 1:
                archive.writestr(name, data, zipfile.ZIP_DEFLATED)
            elif kind == 2:
                archive.writestr(rng.choice(("../x", "/x", "x" * 3000, name.upper(), "a/b/" + name, "\ud7ff")), data)
            elif kind == 3:
                archive.writestr(name, data[: len(data) // 2])
            elif kind == 4:
                archive.writestr(name, b"big" if name.endswith("byteorder") else _blind(rng, data))
            elif kind >= 5:
                archive.writestr(name, _pickle(rng, data) if name.endswith("data.pkl") else data + b"x")
    packed = out.getvalue()
    if kind == 3 and rng.random() < 0.5:  # a size in the directory that lies
        at = packed.rindex(b"PK\x01\x02") + 24
        packed = packed[:at] + rng.choice(SIZES).to_bytes(4, "little") + packed[at + 4 :]
    return packed


def _pickle(rng: random.Random, program: bytes) -> bytes:
    """Insert, remove or change opcodes of a pickle."""
    places = []
    try:
        places.extend(position for _, _, position in pickletools.genops(program))
    except Exception:
        places = places or [0]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.choice(places)
        after = min((p for p in places if p > at), default=len(program))
        kind = rng.randrange(4)
        if kind == 0:
            program = program[:at] + program[after:]
        elif kind == 1:
            program = program[:at] + rng.choice(OPCODES) + program[after:]
        elif kind == 2:
            piece = rng.choice(OPCODES) * rng.choice((1, 1, 2, 1000))
            program = program[:at] + piece + program[at:]
        else:
            program = program[:at] + program[at:after] * rng.choice((2, 50)) + program[after:]
    return program


# ------------------------------------------------------------------------------------------------------------- pictures
def _png(rng: random.Random, content: bytes) -> bytes:
    """Change the size or the kind that the head claims, add a chunk that unpacks to much, or save as another kind."""
    kind = rng.randrange(5)
    if kind == 0 or not content.startswith(b"\x89PNG"):
        return _other_picture(rng, content)
    head = bytearray(content[16:29])
    if kind in (1, 2):
        struct.pack_into(">I", head, rng.choice((0, 4)), rng.choice(SIZES))
        if rng.random() < 0.5:
            struct.pack_into(">II", head, 0, *[rng.choice(SIZES)] * 2)
    elif kind == 3:
        head[8 + rng.randrange(5)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    extra = b""
    if kind == 4:
        bomb = zlib.compress(bytes(30 << 20))
        extra = rng.choice((
            _chunk(b"zTXt", b"a\0\0" + bomb), _chunk(b"iCCP", b"a\0\0" + bomb), _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
            _chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
            _chunk(b"tRNS", b"\0\0"),
            _chunk(b"acTL", struct.pack(">II", 10**9, 0)), _chunk(b"eXIf", rng.randbytes(50)), _chunk(b"PLTE", b"\0"),
        ))  # fmt: skip
    return content[:8] + _chunk(b"IHDR", bytes(head)) + extra + content[33:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _jpeg(rng: random.Random, content: bytes) -> bytes:
    """Change the size in the frame's head, or cut the picture after its head."""
    at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    kind = rng.randrange(3)
    if at < 0 or kind == 0:
        return _other_picture(rng, content)
    if kind == 1:
        return content[: rng.randrange(at, len(content))]
    sides = struct.pack(">HH", *(rng.choice((0, 1, 7, 32, 33, 30000, 65535)) for _ in range(2)))
    return content[: at + 5] + sides + content[at + 9 :]


def _other_picture(rng: random.Random, content: bytes) -> bytes:
    """The picture in another mode and format, or another picture of an odd shape."""
    mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV", "PA", "La"))
    size = rng.choice(((32, 32), (1, 1), (1, 5000), (5000, 1), (33, 31)))
    try:
        image = Image.new("L", size, 128).convert(mode)
    except ValueError:
        image = Image.new("L", size, 128)
    for kind in rng.sample(
        ("PNG", "GIF", "TIFF", "BMP", "WEBP", "ICO", "PPM", "TGA", "JPEG2000", "DDS", "PCX", "SGI"), 12
    ):
        out = io.BytesIO()
        try:
            image.save(out, kind)
        except Exception:
            continue
        return out.getvalue()
    return content


def _npy(rng: random.Random, content: bytes) -> bytes:
    """Change the head of a `.npy` file (shape, dtype, order), or its values."""
    shape = rng.choice((
        "()", "(0,)", "(0, 0, 3)", "(32, 32)", "(32, 32, 0)", "(-1, 32, 3)", "(32, 32, 3, 1)", "(1000000000, 1000, 3)",
        "(9223372036854775807,)", "(" + "9" * 5000 + ",)", "(32, 32, 3)", "(32.0, 32, 3)", "None", "(True, 2)",
        "(1, 3072)",
    ))  # fmt: skip
    dtype = rng.choice((
        "'|u1'", "'<f4'", "'<f2'", "'>f8'", "'|O'", "'|S1'", "'<U1'", "'|b1'", "'<i8'", "'<c8'", "'<M8[s]'", "'x'",
        "None",
        "[('a', '<f4')]", "'|V1'", "'<f16'", "[('a', '|O')]", "('|u1', (1000000,))",
    ))  # fmt: skip
    if rng.random() < 0.3:
        fields = "{" * rng.choice((1, 5000)) + "'descr'"
    else:
        fields = f"{{'descr': {dtype}, 'fortran_order': {rng.choice(('False', 'True', '1', 'x'))}, 'shape': {shape}, }}"
    text = fields.encode() + b" " * (-(len(fields) + 11) % 64) + b"\n"
    body = rng.choice((content[128:], b"\xff" * 12288, b"", rng.randbytes(12288), bytes(12288)))
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x09\x09"))
    length = struct.pack("<H", len(text) & 0xFFFF) if version[0] == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + version + length + text + body
