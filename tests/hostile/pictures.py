"""Files that call themselves pictures."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image, features

from tests.hostile.case import SAMPLE, Case

SIZE = (320, 256)  # large enough for the default rules


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def photo(width: int = SIZE[0], height: int = SIZE[1], seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some noise, no symmetry: every turn of it is another picture.

    Another seed gives another picture, as exact duplicates are dropped.
    """
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y + seed), np.cos(5 * y - x), np.sign(np.sin(20 * x * y + x))]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    return Image.fromarray(
        (127.5 + 100 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
    )


def jpeg(seed: int = 0, **options) -> bytes:
    return encoded(photo(seed=seed), "JPEG", quality=90, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, kind: tuple[int, int], body: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its parts: `kind` is (bits, colour type), `body` the content of IDAT."""
    header = struct.pack(">IIBBBBB", width, height, *kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int) -> bytes:
    """That many zero bytes as a zlib stream, about a thousandth; made at once, whatever its size:
    one flushed block is repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    whole, rest = divmod(count, 1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    last = packer.compress(bytes(rest)) + packer.flush()
    return b"\x78\xda" + block * whole + last + struct.pack(">HH", count % 65521, 1)


def rows_of_zeros(width: int, height: int, bits: int) -> bytes:
    """IDAT content of a black picture."""
    return zeros(height * (1 + (width * bits + 7) // 8))


def pixels_png(pixels: np.ndarray, kind: tuple[int, int], extra: bytes = b"") -> bytes:
    """A PNG of (H, W, ...) big-endian values, which Pillow may not be able to write."""
    body = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], kind, zlib.compress(body), extra)


def sized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def patched_frame(offset: int, value: int) -> bytes:
    """A JPEG with one byte of its frame header changed, counted from the marker."""
    data = bytearray(jpeg())
    data[data.index(b"\xff\xc0") + offset] = value
    return bytes(data)


def sixteen_bits(seed: int) -> np.ndarray:
    return np.asarray(photo(seed=seed).convert("L")).astype(np.uint16) * 256 + 200


def rgba(seed: int) -> Image.Image:
    mask = Image.fromarray(np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1)))
    return Image.merge("RGBA", [*photo(seed=seed).split(), mask])


def palette(seed: int) -> Image.Image:
    return photo(seed=seed).quantize(16, method=Image.Quantize.FASTOCTREE)


def ycck() -> bytes:
    """Adobe's other four-colour JPEG: Pillow writes CMYK, its Adobe marker is made to say YCCK."""
    data = bytearray(encoded(photo(seed=2).convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(photo(seed=100 + orientation), "JPEG", exif=exif)


def frames(kind: str, seed: int, count: int = 3, **options) -> bytes:
    some = [photo(seed=seed + n) for n in range(count)]
    if kind == "GIF":
        some = [palette(seed + n) for n in range(count)]
    return encoded(some[0], kind, save_all=True, append_images=some[1:], **options)


def bomb_png() -> bytes:
    return png(20_000, 20_000, (1, 0), rows_of_zeros(20_000, 20_000, 1))


def allowed_but_large_png() -> bytes:
    """As many pixels as are allowed, of 400 KB."""
    return png(11_000, 10_000, (8, 0), rows_of_zeros(11_000, 10_000, 8))


def overfull_png() -> bytes:
    """The header says 320x256; what lies behind it inflates to 1 GB."""
    return png(*SIZE, (8, 2), zeros(1 << 30))


def zip_behind(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("../../evil.sh"), "echo no")  # without the time
    return data + buffer.getvalue()


def icc_bomb() -> bytes:
    """A colour profile that inflates to 256 MB."""
    profile = chunk(b"iCCP", b"icc\0\0" + zeros(256 << 20))
    pixels = np.asarray(photo(seed=3))
    return pixels_png(pixels, (8, 2), profile)


def text_bomb() -> bytes:
    note = chunk(b"zTXt", b"Comment\0\0" + zeros(256 << 20))
    return pixels_png(np.asarray(photo(seed=4)), (8, 2), note)


def many_scans(picture: Image.Image, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each costs a pass over all coefficients."""
    data = encoded(picture, "JPEG", progressive=True, quality=30)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def scan_bomb() -> bytes:
    """Of 100 million grey pixels, whose last scan is 140 bytes and takes 0.4 s; 2,000 times."""
    return many_scans(Image.new("L", (10_000, 10_000), 128), 2_000)


def film(size: int = 20_000_000) -> bytes:
    """What phones write behind a picture; by chance it has hundreds of a scan's two first bytes."""
    return np.random.default_rng(0).bytes(size)


def svg() -> bytes:
    return b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY e SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg" width="512" height="512"><text>&e;</text></svg>"""


def eps() -> bytes:
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 512 512\n%%EndComments\n"
        b"(%pipe%touch /tmp/microdit-hostile) (w) file\nshowpage\n"
    )


def heic() -> bytes:
    return struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + bytes(600)


def psd() -> bytes:
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, SIZE[1], SIZE[0], 8, 3)
    return header + bytes(14 + 3 * SIZE[0] * SIZE[1])


NO = "undecodable"
BIG = "too-large"
HTML = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>\n" * 40

CASES: list[Case] = [
    # Broken.
    Case("truncated.jpg", NO, "half of a JPEG", lambda: jpeg()[: len(jpeg()) // 2]),
    Case(
        "end-early.jpg",
        NO,
        "half of a JPEG, closed with an end marker",
        lambda: jpeg()[: len(jpeg()) // 2] + b"\xff\xd9",
    ),
    Case("truncated.png", NO, "half of a PNG", lambda: encoded(photo(), "PNG")[:60_000]),
    Case("truncated.webp", NO, "half of a WebP", lambda: encoded(photo(), "WEBP")[:3_000]),
    Case(
        "bad-crc.png",
        NO,
        "a byte of the pixel data changed",
        lambda: _flipped(encoded(photo(), "PNG"), 30_000),
    ),
    Case(
        "short-body.png",
        SAMPLE,
        "fewer rows than the header says, yet whole: the rest is black",
        lambda: png(*SIZE, (8, 2), rows_of_zeros(SIZE[0], 50, 24)),
    ),
    Case("empty.jpg", NO, "no bytes", lambda: b""),
    Case("zeros.jpg", NO, "100 KB of zeros, as a failed write leaves", lambda: bytes(100_000)),
    Case("html.jpg", NO, "an error page", lambda: HTML),
    Case("text.png", NO, "a text named .png", lambda: b"no picture at all\n" * 100),
    Case("zero-width.png", NO, "0x256 pixels", lambda: png(0, 256, (8, 2), zlib.compress(b""))),
    Case("zero-size.jpg", NO, "0x0 pixels", lambda: sized_jpeg(0, 0)),
    Case("12-bit.jpg", NO, "12 bits a colour", lambda: patched_frame(4, 12)),
    Case("lossless.jpg", NO, "a lossless JPEG's marker", lambda: patched_frame(1, 0xC3)),
    # Not for us: programs and documents.
    Case("vector.svg", NO, "SVG with an external entity", svg),
    Case("document.pdf", NO, "PDF", lambda: encoded(photo(), "PDF")),
    Case("script.eps", NO, "PostScript that writes a file", eps),
    Case("postscript.jpg", NO, "PostScript named .jpg", eps),
    Case("phone.heic", NO, "HEIC of zeros", heic),
    Case("layers.psd", NO, "Photoshop's own", psd),
    # Bombs.
    Case("bomb.png", BIG, "20,000x20,000 in 50 KB", bomb_png),
    Case(
        "number.png",
        BIG,
        "2,147,483,647 pixels a side",
        lambda: png(2**31 - 1, 2**31 - 1, (8, 2), b""),
    ),
    Case("declared.jpg", BIG, "a header of 65,500x65,500", lambda: sized_jpeg(65_500, 65_500)),
    Case(
        "declared.gif",
        BIG,
        "a header of 65,535x65,535",
        lambda: b"GIF89a" + b"\xff" * 4 + encoded(palette(0), "GIF")[10:],
    ),
    Case(
        "declared.bmp",
        BIG,
        "a header of 40,000x40,000",
        lambda: _put(encoded(photo(), "BMP"), 18, struct.pack("<ii", 40_000, 40_000)),
    ),
    Case(
        "declared.ppm",
        BIG,
        "a header of 99,999x99,999",
        lambda: b"P6 99999 99999 255\n" + bytes(99),
    ),
    Case("declared.tiff", BIG, "tags of 60,000x60,000", lambda: _huge_tiff()),
    Case("allowed.png", SAMPLE, "11,000x10,000, just allowed: it is shrunk", allowed_but_large_png),
    Case("overfull.png", SAMPLE, "320x256, inflates to 1 GB that is not read", overfull_png),
    Case("profile-bomb.png", SAMPLE, "a colour profile that inflates to 256 MB", icc_bomb),
    Case("text-bomb.png", SAMPLE, "a comment that inflates to 256 MB", text_bomb),
    Case("scan-bomb.jpg", BIG, "10,000x10,000 in 2,000 scans: a quarter of an hour", scan_bomb),
    Case("many-scans.jpg", SAMPLE, "90 scans", lambda: many_scans(photo(seed=90), 90)),
    Case("film.jpg", SAMPLE, "a phone's film of 20 MB behind the end", lambda: jpeg(91) + film()),
    # Sizes.
    Case("one-pixel.png", "too-small", "1x1", lambda: encoded(photo(1, 1), "PNG")),
    Case(
        "tracking.gif",
        "too-small",
        "1x1, transparent",
        lambda: encoded(photo(1, 1).quantize(2), "GIF", transparency=0),
    ),
    Case("ribbon.png", "too-small", "20,000x1", lambda: encoded(photo(20_000, 1), "PNG")),
    # Odd, and good.
    Case("cmyk.jpg", SAMPLE, "CMYK", lambda: encoded(photo(seed=1).convert("CMYK"), "JPEG")),
    Case("ycck.jpg", SAMPLE, "YCCK", ycck),
    Case("grey.jpg", SAMPLE, "grey", lambda: encoded(photo(seed=5).convert("L"), "JPEG")),
    Case("progressive.jpg", SAMPLE, "progressive", lambda: jpeg(6, progressive=True)),
    Case(
        "16-bit.png",
        SAMPLE,
        "16-bit grey",
        lambda: encoded(Image.fromarray(sixteen_bits(7)), "PNG"),
    ),
    Case(
        "16-bit-rgb.png",
        SAMPLE,
        "16-bit RGB",
        lambda: pixels_png(
            (np.asarray(photo(seed=8)).astype(np.uint16) * 256 + 77).astype(">u2"), (16, 2)
        ),
    ),
    Case(
        "16-bit.tiff",
        SAMPLE,
        "16-bit grey",
        lambda: encoded(Image.fromarray(sixteen_bits(9)), "TIFF"),
    ),
    Case(
        "1-bit.png", SAMPLE, "black and white", lambda: encoded(photo(seed=10).convert("1"), "PNG")
    ),
    Case(
        "palette.png",
        SAMPLE,
        "palette, one colour transparent",
        lambda: encoded(palette(11), "PNG", transparency=3),
    ),
    Case("rgba.png", SAMPLE, "transparency", lambda: encoded(rgba(12), "PNG")),
    Case("rgba.webp", SAMPLE, "transparency", lambda: encoded(rgba(13), "WEBP")),
    Case("animated.gif", SAMPLE, "the first frame", lambda: frames("GIF", 20)),
    Case("animated.webp", SAMPLE, "the first frame", lambda: frames("WEBP", 30)),
    Case("animated.png", SAMPLE, "APNG: the first frame", lambda: frames("PNG", 40)),
    Case(
        "two-eyes.mpo",
        SAMPLE,
        "a camera's two pictures in one file: the first",
        lambda: frames("MPO", 50, 2),
    ),
    *(
        Case(f"exif-{n}.jpg", SAMPLE, f"EXIF orientation {n}", functools.partial(turned, n))
        for n in range(1, 9)
    ),
    Case(
        "exif-nonsense.jpg",
        SAMPLE,
        "EXIF that cannot be read turns nothing",
        lambda: jpeg(60, exif=b"Exif\0\0nonsense"),
    ),
    Case(
        "exif-loop.jpg",
        SAMPLE,
        "an EXIF directory that names itself as the next",
        lambda: jpeg(61, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08"),
    ),
    Case(
        "profile-nonsense.jpg",
        SAMPLE,
        "a colour profile of noise",
        lambda: jpeg(62, icc_profile=bytes(range(256)) * 9),
    ),
    Case(
        "profile-nonsense.png",
        SAMPLE,
        "a colour profile that does not inflate",
        lambda: pixels_png(np.asarray(photo(seed=63)), (8, 2), chunk(b"iCCP", b"icc\0\0no zlib")),
    ),
    Case(
        "trailing.jpg",
        SAMPLE,
        "100 KB of garbage behind the end",
        lambda: jpeg(64) + b"\xa5" * 100_000,
    ),
    Case("polyglot-zip.jpg", SAMPLE, "JPEG and ZIP at once", lambda: zip_behind(jpeg(65))),
    Case(
        "polyglot-script.gif",
        SAMPLE,
        "GIF and a script at once",
        lambda: encoded(palette(66), "GIF") + b"<script>alert(1)</script><?php system('id'); ?>",
    ),
    Case(
        "comment.jpg",
        SAMPLE,
        "a comment of HTML",
        lambda: jpeg(67, comment="<script>1</script>" * 900),
    ),
    Case("png-as.jpg", SAMPLE, "a PNG named .jpg", lambda: encoded(photo(seed=68), "PNG")),
    Case("jpeg-as.png", SAMPLE, "a JPEG named .png", lambda: jpeg(69)),
    Case(
        "top-down.bmp",
        SAMPLE,
        "a BMP with negative height",
        lambda: _put(encoded(photo(seed=70), "BMP"), 22, struct.pack("<i", -SIZE[1])),
    ),
    Case("SHOUTED.JPG", SAMPLE, "upper case", lambda: jpeg(71)),
]
if features.check("avif"):
    CASES += [
        Case("photo.avif", SAMPLE, "AVIF", lambda: encoded(photo(seed=80), "AVIF")),
        Case("truncated.avif", NO, "half of an AVIF", lambda: encoded(photo(), "AVIF")[:3_000]),
    ]


def _flipped(data: bytes, at: int) -> bytes:
    return _put(data, at, bytes([data[at] ^ 255]))


def _put(data: bytes, at: int, part: bytes) -> bytes:
    return data[:at] + part + data[at + len(part) :]


def _huge_tiff() -> bytes:
    tags = [(256, 4, 60_000), (257, 4, 60_000), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 60_000), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(104)
