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


# ----------------------------------------------------------------------------------- exact pixels of every kind of file
def words16(*rows: list[tuple[int, ...]]) -> list[bytes]:
    return [b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in row) for row in rows]


def test_16_bits_a_channel(tmp_path):
    """Gray is divided by 257 and rounded. Of colours Pillow takes the high byte, at most 1 of 255 less."""
    values = [0, 128, 129, 32767, 32768, 33023, 65534, 65535]
    Image.fromarray(np.array([values], np.uint16)).save(tmp_path / "gray.png")
    assert data.read_image(tmp_path / "gray.png", 1)[0, :, 0].tolist() == [0, 0, 1, 127, 128, 128, 255, 255]
    assert data.read_image(tmp_path / "gray.png")[0, 3].tolist() == [127] * 3
    pixels = [(0x1234, 0xFFFF, 0x00FF), (0x8000, 0, 0x7F80)] * 4
    (tmp_path / "rgb.png").write_bytes(png(2, 16, words16(pixels)))
    assert data.read_image(tmp_path / "rgb.png")[0, :2].tolist() == [[0x12, 255, 0], [128, 0, 0x7F]]
    (tmp_path / "rgba.png").write_bytes(png(6, 16, words16([(0x1234, 0xFFFF, 0, 0xFFFF), (0x1234, 0, 0, 0x8000)] * 4)))
    assert data.read_image(tmp_path / "rgba.png", ground="white")[0, :2].tolist() == [[18, 255, 0], [136, 127, 127]]
    (tmp_path / "la.png").write_bytes(png(4, 16, words16([(0x4000, 0xFFFF), (0x4000, 0)] * 4)))
    assert data.read_image(tmp_path / "la.png", ground="white")[0, :2].tolist() == [[64] * 3, [255] * 3]
    kinds = {"gray": ("gray",), "rgb": (), "rgba": ("alpha",), "la": ("gray", "alpha")}
    assert all(decode(tmp_path / f"{name}.png", Reading()).kinds == (*kind, "16 bits") for name, kind in kinds.items())


def test_palettes_and_gray_with_alpha(tmp_path):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 200, 100, 50, 255, 0, 1])
    image.save(tmp_path / "p.png")
    assert data.read_image(tmp_path / "p.png").tolist() == [[[10, 20, 30], [200, 100, 50], [255, 0, 1]]]
    image.save(tmp_path / "p.gif")
    assert data.read_image(tmp_path / "p.gif").tolist() == [[[10, 20, 30], [200, 100, 50], [255, 0, 1]]]
    image.save(tmp_path / "p.png", transparency=bytes([255, 128, 0]))
    assert data.read_image(tmp_path / "p.png", ground="white").tolist() == [[[10, 20, 30], [227, 177, 152], [255] * 3]]
    assert data.read_image(tmp_path / "p.png", ground="black").tolist() == [[[10, 20, 30], [100, 50, 25], [0] * 3]]
    Image.fromarray(np.array([[[100, 255], [100, 128], [100, 1], [7, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert data.read_image(tmp_path / "la.png", 1, ground="white")[0, :, 0].tolist() == [100, 177, 254, 255]
    assert data.read_image(tmp_path / "la.png", 4)[0].tolist() == [[100, 100, 100, a] for a in (255, 128, 1)] + [
        [7, 7, 7, 0]
    ]
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "1.png")
    assert data.read_image(tmp_path / "1.png").tolist() == [[[0] * 3, [255] * 3]]
    assert decode(tmp_path / "p.png", Reading()).kinds == ("palette",)
    assert decode(tmp_path / "la.png", Reading()).kinds == ("gray", "alpha")


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_cmyk(ending, tmp_path):
    """JPEG files hold the inverse of the inks, as Adobe's programs write them and say in a marker; TIFF the inks."""
    inks = {(0, 255, 255, 0): [255, 0, 0], (255, 0, 0, 0): [0, 255, 255], (0, 0, 0, 255): [0, 0, 0],
            (0, 0, 0, 0): [255, 255, 255], (128, 0, 0, 127): [64, 128, 128]}  # fmt: skip
    for ink, color in inks.items():
        path = tmp_path / f"x.{ending}"
        Image.new("CMYK", (8, 8), ink).save(path, **({"quality": 100} if ending == "jpg" else {}))
        assert (b"Adobe" in path.read_bytes()) == (ending == "jpg")
        read = data.read_image(path)
        assert read.shape == (8, 8, 3) and abs(read.astype(int) - color).max() <= (ending == "jpg"), ink
    assert decode(path, Reading()).kinds == ("CMYK",)


TURNED = {  # what a camera's tag says of stored pixels -> the picture
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_orientation_tags(ending, tmp_path):
    """Pictures come out upright, and the size that is read without decoding is theirs; unknown tags say nothing."""
    stored = np.random.default_rng(0).integers(0, 2, (2, 3, 3), np.uint8).repeat(16, 0).repeat(16, 1) * 255
    for tag in (*TURNED, 0, 9, 77):
        image, path = Image.fromarray(stored), tmp_path / f"x.{ending}"
        exif = image.getexif()
        exif[0x0112] = tag
        settings = {"webp": dict(lossless=True), "jpg": dict(quality=100, subsampling=0)}.get(ending, {})
        image.save(path, exif=exif, **settings)
        wanted = TURNED.get(tag, TURNED[1])(stored)
        read = data.read_image(path)
        assert read.shape == wanted.shape and abs(read.astype(int) - wanted).max() <= 8 * (ending == "jpg"), tag
        assert images.size_on_disk(path) == wanted.shape[1::-1], tag
        assert ("turned" in decode(path, Reading()).kinds) == (2 <= tag <= 8)


def test_a_turned_hint_fits_a_target_that_is_not(tmp_path):
    hint = Image.new("RGB", (6, 4))
    exif = hint.getexif()
    exif[0x0112] = 6
    hint.save(tmp_path / "h.tif", exif=exif)
    Image.new("RGB", (4, 6)).save(tmp_path / "t.png")
    (tmp_path / "prompt.json").write_text('{"source": "h.tif", "target": "t.png", "prompt": "p"}')
    dataset = data.FolderDataset(tmp_path)
    assert dataset.sizes(0) == ((4, 6), (4, 6)) and dataset[0]["hint"].shape == (6, 4, 3)


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
