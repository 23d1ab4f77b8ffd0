"""What a picture file shows is what training gets: transparency, numbers of every format, palettes; nothing hurts."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data
from training import images
from training.images import DataError, Reading, decode

BAR = np.zeros((8, 8), bool)
BAR[3:5] = True  # black ink in two of eight rows, the rest transparent


def png(color_type: int, bits: int, rows: list[bytes], transparent: bytes = b"") -> bytes:
    """A PNG of 8 columns, in kinds that Pillow does not write."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", 8, len(rows), bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b"", chunk(b"IDAT", pixels)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def write_transparent(kind: str, folder):
    """A file of the kind `kind` with BAR in black ink on a transparent ground; its path."""
    rgba = np.dstack([np.zeros((8, 8, 3), np.uint8), np.where(BAR, 255, 0).astype(np.uint8)])
    shade, path = np.where(BAR, 0, 200).astype(np.uint8), folder / "ink.png"
    palette = Image.frombytes("P", (8, 8), np.where(BAR, 1, 0).astype(np.uint8).tobytes())
    palette.putpalette([255, 0, 0, 0, 0, 0])
    rows = lambda ink, ground: [ink if y in (3, 4) else ground for y in range(8)]
    if kind in ("webp", "tif", "gif", "tga", "ico"):
        path = folder / f"ink.{kind}"
        Image.fromarray(rgba).save(path, **({"lossless": True} if kind == "webp" else {}))
    elif kind in ("RGBA", "LA"):
        Image.fromarray(rgba).convert(kind).save(path)
    elif kind == "palette, one colour":
        palette.save(path, transparency=0)
    elif kind == "palette, alpha of each colour":
        palette.save(path, transparency=bytes([0, 255]))
    elif kind == "one shade":
        Image.fromarray(shade).save(path, transparency=200)
    elif kind == "one shade of 16 bits":
        Image.fromarray(np.where(BAR, 0, 65535).astype(np.uint16)).save(path, transparency=65535)
    elif kind == "one colour":
        Image.fromarray(np.dstack([shade] * 3)).save(path, transparency=(200, 200, 200))
    else:
        whole, half = b"\0" * 8 + b"\xff" * 0, struct.pack(">HHH", 0xC8C8, 0xC8C9, 0xC8C8)
        path.write_bytes(
            {
                "one colour of 16 bits": lambda: png(2, 16, rows(whole * 6, half * 8), half),
                "RGBA of 16 bits": lambda: png(6, 16, rows(b"\0\0\0\0\0\0\xff\xff" * 8, whole * 8)),
                "LA of 16 bits": lambda: png(4, 16, rows(b"\0\0\xff\xff" * 8, b"\0\0\0\0" * 8)),
                "one shade of 1 bit": lambda: png(0, 1, rows(b"\0", b"\xff"), b"\0\1"),
                "one shade of 2 bits": lambda: png(0, 2, rows(b"\0\0", b"\xaa\xaa"), b"\0\2"),
                "one shade of 4 bits": lambda: png(0, 4, rows(b"\0" * 4, b"\x55" * 4), b"\0\5"),
            }[kind]()
        )
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "RGBA", "LA", "webp", "tif", "gif", "tga", "ico", "palette, one colour", "palette, alpha of each colour",
        "one shade", "one shade of 16 bits", "one colour", "one colour of 16 bits", "RGBA of 16 bits", "LA of 16 bits",
        "one shade of 1 bit", "one shade of 2 bits", "one shade of 4 bits",
    ],
)  # fmt: skip
def test_transparent_ink_is_seen_however_the_file_says_it(kind, tmp_path):
    path = write_transparent(kind, tmp_path)
    for channels in (1, 3):
        assert np.array_equal(data.read_image(path, channels)[..., 0], np.where(BAR, 0, 255)), channels
    assert not data.read_image(path, ground="black").any()
    assert np.array_equal(data.read_image(path, 4)[..., 3], np.where(BAR, 255, 0))
    assert decode(path, Reading()).brightness == 0


def test_ground_follows_the_ink_and_targets_are_laid_on_white(tmp_path):
    light = np.full((8, 8, 4), 250, np.uint8)
    light[..., 3] = np.where(BAR, 255, 0)
    light[0, 0] = (250, 250, 250, 128)  # half transparent
    for name in ("h.png", "t.png"):
        Image.fromarray(light).save(tmp_path / name)
    read = data.read_image(tmp_path / "h.png")
    assert read[3, 0, 0] == 250 and read[7, 7, 0] == 0 and read[0, 0, 0] == 125  # on black
    (tmp_path / "prompt.json").write_text('{"source": "h.png", "target": "t.png", "prompt": "p"}')
    item = data.FolderDataset(tmp_path)[0]
    assert item["hint"][7, 7, 0] == 0 and item["jpg"][7, 7, 0] == 1
    assert data.FolderDataset(tmp_path, hint_ground="white")[0]["hint"][7, 7, 0] == 1
    assert data.FolderDataset(tmp_path, hint_channels=4)[0]["hint"][7, 7].tolist()[3] == 0


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 65535, 64).astype(np.uint16),
        np.linspace(0, 1, 64).astype(np.float32),
        np.linspace(0, 2**31 - 1, 64).astype(np.int32),
    ],
    ids=lambda values: values.dtype.name,
)
def test_numbers_of_more_than_8_bits_keep_their_shades(values, tmp_path):
    tall = values[None].repeat(8, 0)
    mode = {"f": "F", "i": "I"}.get(values.dtype.kind)
    image = Image.frombytes(mode, (64, 8), tall.tobytes()) if mode else Image.fromarray(tall)
    image.save(tmp_path / "x.tif")
    assert abs(data.read_image(tmp_path / "x.tif", 1)[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1


def test_a_part_of_the_range_can_be_stretched(tmp_path):
    """Depth in mm and class numbers in 16 bits, class numbers in 8 bits, metres in floats."""
    ramp = np.linspace(0, 1, 64)[None].repeat(8, 0)
    for top, dtype in ((8000, np.uint16), (20, np.uint16), (20, np.uint8), (7.5, np.float32)):
        values = (ramp * top).astype(dtype) if dtype == np.float32 else (ramp * top).round().astype(dtype)
        image = Image.frombytes("F", (64, 8), values.tobytes()) if dtype == np.float32 else Image.fromarray(values)
        image.save(tmp_path / "x.tif")
        read = decode(tmp_path / "x.tif", Reading(1, scale=top)).array
        assert len(np.unique(read)) == min(64, len(np.unique(values))) and read.max() == 255, (top, dtype)
        with pytest.raises(DataError, match=f"above --hint-scale {top / 2:g}"):
            data.read_image(tmp_path / "x.tif", 1, scale=top / 2)
    with pytest.raises(DataError, match="x.tif: holds float32 from 0.0 to 7.5; give.*--hint-scale"):
        data.read_image(tmp_path / "x.tif", 1)


def test_palettes_are_class_numbers_where_asked_for(tmp_path):
    image = Image.frombytes("P", (4, 1), bytes([0, 3, 7, 20]))
    image.putpalette([v for i in range(256) for v in (255 - i, i, 9)])
    for name in ("h.png", "t.png"):
        image.save(tmp_path / name)
    (tmp_path / "prompt.json").write_text('{"source": "h.png", "target": "t.png", "prompt": "p"}')
    classes = lambda **settings: (data.FolderDataset(tmp_path, **settings)[0]["hint"][0, :, 0] * 255).round().tolist()
    assert classes(hint_channels=1, hint_resample="nearest") == [0, 3, 7, 20]
    assert classes(hint_channels=1, hint_resample="nearest", hint_scale=20.0) == [0, 38, 89, 255]
    assert classes(hint_channels=1)[0] == 77 and classes(hint_channels=3, hint_resample="nearest")[0] == 255


def test_the_memory_that_a_picture_takes_is_bounded(tmp_path, recwarn):
    row = b"\0" * 1000
    (tmp_path / "large.png").write_bytes(png(0, 8, [row[:8]] * 3000))
    assert data.read_image(tmp_path / "large.png", max_pixels=24_000).shape == (3000, 8, 3)
    with pytest.raises(DataError, match=r"24000 pixels, which takes more .*--max-megapixels 1 raises"):
        data.read_image(tmp_path / "large.png", max_pixels=20_000)
    huge = png(0, 8, [b""])[:16] + struct.pack(">II", 200_000, 200_000) + b"\x08\0\0\0\0"
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + png(0, 8, [b""])[33:]
    (tmp_path / "bomb.png").write_bytes(huge)
    with pytest.raises(DataError, match="bomb.png.*more.*memory.*--max-megapixels 40000 "):
        data.read_image(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS and not recwarn.list


def npy(path, array=None, shape=None, descr="|u1", **settings):
    """A .npy file of `array`, or one of 48 bytes whose header claims `shape` and `descr`."""
    if array is not None:
        return np.save(path, array, **settings)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})
        file.write(bytes(48))


def test_bad_arrays_are_one_line(tmp_path):
    path = tmp_path / "h.npy"
    cases = [
        (dict(array=np.full((4, 4, 3), np.nan, np.float32)), "NaN or infinity"),
        (dict(array=np.full((4, 4, 3), np.inf, np.float32)), "NaN or infinity"),
        (dict(array=np.zeros((0, 4, 3), np.float32)), "nothing in it"),
        (dict(array=np.zeros((4, 4, 0), np.float32)), "nothing in it"),
        (dict(array=np.array([[{}]], object), allow_pickle=True), "not a readable .npy"),
        (dict(array=np.zeros((4, 4), [("a", "f4")])), "should be"),
        (dict(array=np.zeros((4, 4, 3), complex)), "should be"),
        (dict(array=np.zeros(4, np.uint8)), "should be"),
        (dict(array=np.zeros((2, 2, 2, 2), np.uint8)), "should be"),
        (dict(shape=(4, 4_000_000_000, 3)), "readable"),
        (dict(shape=(4, 4, 99)), "readable"),
        (dict(shape=(2**62, 2**62, 3)), "readable"),
        (dict(shape=(4, -4, 3)), "readable|nothing"),
        (dict(shape=(4, 4, 3), descr="<f8"), "readable"),
    ]
    for settings, words in cases:
        npy(path, **settings)
        with pytest.raises(DataError, match=f"h.npy: .*({words})") as told:
            data.read_image(path)
        assert "\n" not in str(told.value)
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118):
        path.write_bytes(content)
        with pytest.raises(DataError, match="h.npy: "):
            data.read_image(path)


def test_what_is_no_regular_file_is_never_waited_for(tmp_path):
    for name in ("pipe.png", "pipe.npy"):
        os.mkfifo(tmp_path / name)
        for read in (data.read_image, images.size_on_disk):
            with pytest.raises(DataError, match=f"{name}: is no regular file"):
                read(tmp_path / name)
    with pytest.raises(DataError, match="is no regular file"):
        data.read_image("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="is no regular file"):
        data.read_image(tmp_path / "folder.png")


def test_no_other_program_reads_a_picture(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not a readable image"):
        data.read_image(tmp_path / "x.png")


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture, path = np.zeros((4, 4, 3), np.uint8), tmp_path / "new" / "x.png"
    images.save_picture(path, picture)
    before = path.read_bytes()

    def fail(image, file, *_, **settings):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    for save in (lambda: images.save_picture(path, picture), lambda: images.save_hint(path.with_suffix(""), picture)):
        with pytest.raises(OSError):
            save()
        assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["x.png"]
    with pytest.raises(DataError, match="ending"):
        images.save_picture(tmp_path / "x.nothing", picture)
