"""Files that damage, accident or malice may put into a folder of videos.

`make` writes a number of them, always the same ones: each kind in turn, with other random
numbers each time.
"""

import functools
import io
import itertools
import os
import pathlib
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator

import av
import numpy as np
import PIL.Image

from tests.data.test_video_io import film, write

BIG = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x00FFFFFF, 0xFFFFFF, 65535, 0)
# Boxes of MP4 whose numbers are sizes, counts, times or edits.
BOXES = (b"stts", b"ctts", b"stsz", b"stsc", b"stco", b"stss", b"elst", b"mvhd", b"tkhd",
         b"mdhd", b"moov", b"trak", b"mdia", b"stbl", b"mdat", b"avc1", b"avcC")  # fmt: skip
TEXTS = (
    b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\nhttp://127.0.0.1:1/a.ts\n",
    b"ffconcat version 1.0\nfile '/etc/passwd'\nduration 1e99\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    b"<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><MPD>&b;</MPD>",
    b"#!/bin/sh\nrm -rf $HOME\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 1 RTP/AVP 96\n",
    "only a sentence, in UTF-16".encode("utf-16"),
)
NAMES = (
    "line\nend {}.mp4", "back\rspace\b {}.mp4", "\x1b[2J\x1b[31mred {}.mp4",
    "\u202e4pm.cod{}.mp4", "mark\u200f\u200e{}.mp4", "-rf {}.mp4", "$(touch pwned){}.mp4",
    "`id`;{}|&.mp4", "..\\..\\..\\up {}.mp4", "%2e%2e%2fup {}.mp4", "a#00000 {}.mp4",
    "{}".ljust(100) + ".mp4", "{}" + "n" * 240 + ".mp4", "'quoted\" {}.mp4",
    "猫が寝ている {}.mp4", "кошка {}.mp4", "قطة {}.mp4", "🎬 {}.mp4", "e\u0301 {}.mp4",
    "CON {}.mp4", "{} (1 of 2).mp4", "{}.mp4.mp4", "tab\t{}.MP4", "nul\x01{}.mp4",
)  # fmt: skip


def sources(folder: pathlib.Path) -> dict[str, bytes]:
    """Undamaged files by suffix; some suffixes have several."""
    shown, found = film(30), {}
    for name, codec, options in (
        ("a.mp4", "libx264", {"bf": "2"}),
        ("a.mov", "mpeg4", {}),
        ("a.mkv", "libx264", {"g": "5"}),
        ("b.mp4", "libx265", {"x265-params": "log-level=none"}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8"}),
        ("b.webm", "libvpx", {"cpu-used": "8"}),
        ("b.mkv", "ffv1", {}),
        ("a.gif", "gif", {}),
        ("a.avi", "mpeg4", {"bf": "2"}),
        ("a.ts", "libx264", {}),
    ):
        # x265 asks for 64 pixels a side at least.
        frames = film(12, height=64) if codec == "libx265" else shown
        found[name] = write(folder / name, frames, codec=codec, **options).read_bytes()
    path = write(folder / "a.mpg", film(50, 25), fps=25, codec="mpeg2video", b="9M")
    found["a.mpg"] = path.read_bytes()
    found["c.mkv"] = with_sound_and_subtitles(folder / "c.mkv").read_bytes()
    for name in found:
        (folder / name).unlink()
    return found


def with_sound_and_subtitles(path: pathlib.Path) -> pathlib.Path:
    """Three seconds of film; the sound ends with them, and the subtitle stays longer."""
    said = io.BytesIO(b"1\n00:00:00,500 --> 00:00:09,500\na red film\n")
    with av.open(said, format="srt") as spoken, av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        sound = container.add_stream("aac", rate=48000)
        words = container.add_stream_from_template(spoken.streams[0])
        for frame_hwc in film(30):
            frame = av.VideoFrame.from_ndarray(frame_hwc, format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for k in range(140):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "flt")
            silence.sample_rate, silence.pts = 48000, 1024 * k
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
        for line in spoken.demux():
            if line.size:
                line.stream = words
                container.mux(line)
    return path


def large(path: pathlib.Path, codec: str, kind: str, **options) -> bytes:
    """A file of the largest frames that are read by default, in a pixel format."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 4096, 2304, kind
        for number in range(12):
            frame_hwc = np.full((2304, 4096, 3), 10 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(frame_hwc, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = path.read_bytes()
    path.unlink()
    return content


# -- damage ---------------------------------------------------------------------------


def cut_off(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    broken = bytearray(content)
    for _ in range(draw.choice((1, 3, 10, 100))):
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def overwrite(content: bytes, draw: random.Random) -> bytes:
    at, size = draw.randrange(len(content)), draw.choice((16, 64, 1024))
    return content[:at] + draw.randbytes(size) + content[at + size :]


def remove(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.choice((1, 7, 512)) :]


def repeat(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at : at + 300] * 50 + content[at:]


def huge_numbers(content: bytes, draw: random.Random) -> bytes:
    """Numbers of boxes of an MP4, or of the head of another format, become huge."""
    broken = bytearray(content)
    boxes = [at for tag in BOXES if (at := content.rfind(tag)) > 0]
    for _ in range(draw.choice((1, 1, 3))):
        if boxes:
            at = draw.choice(boxes) + draw.choice((-4, 4, 8, 12, 16, 20, 24, 28))
        else:
            at = draw.randrange(min(400, len(broken)))
        at = min(max(0, at), len(broken) - 4)
        broken[at : at + 4] = struct.pack(">I", draw.choice(BIG))
    return bytes(broken)


DAMAGE = (cut_off, flip_bits, overwrite, remove, repeat, huge_numbers)


# -- bombs ----------------------------------------------------------------------------


def absurd_times(content: bytes, draw: random.Random) -> bytes:
    """An MP4 whose frames, or edits, last for hours or for ever."""
    broken = bytearray(content)
    stts, elst = content.rfind(b"stts"), content.rfind(b"elst")
    mdhd, mvhd = content.rfind(b"mdhd"), content.rfind(b"mvhd")
    delta = draw.choice((1 << 24, 1 << 29, 0xFFFFFFFF, 0x80000000, 50_000_000))
    if draw.random() < 0.7:
        broken[stts + 16 : stts + 20] = struct.pack(">I", delta)
    if draw.random() < 0.5:
        broken[mdhd + 16 : mdhd + 24] = struct.pack(
            ">II", draw.choice((1, 1000)), delta
        )
        broken[mvhd + 16 : mvhd + 24] = struct.pack(
            ">II", draw.choice((1, 1000)), delta
        )
    if elst > 0 and draw.random() < 0.5:
        edit = (delta, draw.choice((-1, -(2**31), 2**31 - 1)), draw.choice(BIG))
        broken[elst + 12 : elst + 24] = struct.pack(">IiI", *edit)
    return bytes(broken)


def gif_bomb(draw: random.Random, heavy: bool) -> bytes:
    """A GIF of a huge canvas, or of thousands of frames of one pixel each."""
    width, height = draw.choice(
        ((65535, 65535), (4096, 2304), (8192, 1152), (65535, 1), (3000, 3000), (0, 9))
    )
    delay = draw.choice((0, 1, 65535))
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"\x21\xf9\x04\x00" + struct.pack("<H", delay) + b"\x00\x00"
    frame += b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * draw.choice((2, 50, 20_000 if heavy else 100)) + b";"


def png(width: int, height: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of one bit per pixel with these compressed rows and further chunks."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


@functools.cache
def zeros(mebibytes: int) -> bytes:
    """So many MiB of zeros, compressed."""
    packer = zlib.compressobj()
    packed = [packer.compress(bytes(1 << 20)) for _ in range(mebibytes)]
    return b"".join(packed) + packer.flush()


def picture_bomb(draw: random.Random, heavy: bool) -> tuple[str, bytes]:
    """The suffix and the content of a picture that unpacks to far more than it has."""
    kind = draw.randrange(6)
    if kind == 0:
        return "png", png(60_000, 60_000, zlib.compress(bytes(1 << 20)))
    if kind == 1:  # 30,000 x 300, longer than 20:1
        return "png", png(30_000, 300, zlib.compress(bytes(3751 * 300)))
    if kind in (2, 3):
        note = ((b"zTXt", b"iCCP")[kind - 2], b"x\0\0" + zeros(200 if heavy else 10))
        return "png", png(64, 48, zlib.compress(bytes(9 * 48)), note)
    flat = PIL.Image.new("L", (4096, 2304) if kind == 4 else (64, 48))
    file = io.BytesIO()
    flat.save(file, "WEBP" if kind == 4 else "JPEG", lossless=True)
    content = bytearray(file.getvalue())
    if kind == 5:
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = b"\xff\xff\xff\xff"
    return ("webp", "jpg")[kind - 4], bytes(content)


def frame_folder(path: pathlib.Path, draw: random.Random, heavy: bool) -> None:
    """A folder of numbered pictures that are bombs, or whose numbers are absurd."""
    path.mkdir()
    if draw.random() < 0.7:
        suffix, content = picture_bomb(draw, heavy)
        for number in range(draw.choice((1, 16, 40) if heavy else (1, 3))):
            (path / f"{number:05d}.{suffix}").write_bytes(content)
        return
    PIL.Image.fromarray(film(1)[0]).save(path / "1.png")
    content = (path / "1.png").read_bytes()
    others = draw.choice(
        (("9" * 200,), ("2", "02"), ("2", "x"), ("-1", "-3"), ("2.png" * 9, "\n3"))
    )
    for name in others:
        (path / f"{name}.png").write_bytes(draw.choice((content, b"", b"\x89PNG")))


# -- folder ---------------------------------------------------------------------------


def make(folder: pathlib.Path, count: int, *, heavy: bool) -> list[str]:
    """Writes hostile files, or folders of frames, and returns their names.

    Args:
      folder: to write them to.
      count: how many.
      heavy: also those that take seconds each to make or to read.
    """
    draw = random.Random(0)
    whole = sources(folder)
    kinds = itertools.cycle(_kinds(folder, whole, draw, heavy))
    names = [next(kinds)(number) for number in range(count)]
    assert len(set(names)) == count
    return names


def _kinds(
    folder: pathlib.Path,
    whole: dict[str, bytes],
    draw: random.Random,
    heavy: bool,
) -> Iterator[Callable[[int], str]]:
    """Functions that each write a file of some kind with a number, and name it."""
    names, containers = itertools.cycle(NAMES), itertools.cycle(whole)
    larges = itertools.cycle(
        [
            large(folder / "x.mkv", "libx264", kind, preset="ultrafast", **more)
            for kind, more in (
                ("yuv420p", {"x264-params": "ref=16:b-pyramid=normal:bframes=3"}),
                ("yuv444p10le", {"x264-params": "ref=5"}),
            )
            if heavy
        ]
    )

    def store(name: str, content: bytes) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return name

    def damaged(how):
        def write_one(number: int) -> str:
            source = next(containers)
            return store(
                f"{how.__name__} {number}.{source[2:]}", how(whole[source], draw)
            )

        return write_one

    def swapped(number: int) -> str:
        one, other = draw.sample(sorted(whole), 2)
        size = draw.choice((8, 64, 600))
        content = whole[one][:size] + whole[other][size:]
        return store(f"swapped {number}.{other[2:]}", content)

    def renamed(number: int) -> str:
        suffix = draw.choice(("mp4", "mkv", "gif", "ts", "webm"))
        return store(f"text {number}.{suffix}", draw.choice(TEXTS))

    def noise(number: int) -> str:
        head = whole[next(containers)][: draw.choice((0, 8, 16, 48))]
        return store(f"noise {number}.mkv", head + draw.randbytes(5000))

    def strangely_named(number: int) -> str:
        content = flip_bits(whole["a.mp4"], draw)
        return store(next(names).format(number), content)

    def deep(number: int) -> str:
        place = "/".join(["d"] * draw.choice((50, 500)))
        return store(f"{place}/{number}.mp4", cut_off(whole["a.mp4"], draw))

    def of_large_frames(number: int) -> str:
        content = next(larges)
        if draw.random() < 0.5:
            content = flip_bits(content, draw)
        return store(f"large {number}.mkv", content)

    def endless(number: int) -> str:
        return store(f"endless {number}.mp4", absurd_times(whole["a.mp4"], draw))

    def special(number: int) -> str:
        """What is no file at all: pipes, sockets, and links that lead nowhere or out."""
        name = f"special {number}.mp4"
        path, kind = folder / name, draw.randrange(5)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            with socket.socket(socket.AF_UNIX) as listening:
                place = os.open(folder, os.O_RDONLY)
                listening.bind(f"/proc/self/fd/{place}/{name}")
                os.close(place)
        else:
            target = ("/dev/zero", path.name, "/etc/passwd")[kind - 2]
            path.symlink_to(target)
        return name

    def frames(number: int) -> str:
        frame_folder(folder / f"frames {number}", draw, heavy)
        return f"frames {number}"

    return [
        *(damaged(how) for how in (*DAMAGE, huge_numbers, flip_bits)),
        swapped,
        renamed,
        noise,
        strangely_named,
        deep,
        endless,
        *([of_large_frames] if heavy else ()),
        frames,
        lambda number: store(f"bomb {number}.gif", gif_bomb(draw, heavy)),
        lambda number: store(f"empty {number}.mp4", b""),
        special,
    ]
