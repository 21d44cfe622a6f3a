"""One road for all foreign video: what `prepare` and `evaluate` see is what players show.

Each case is a file made from planes of known numbers, and what is seen is compared with the
picture that they were made of, by formulas.
"""

import fractions

import av
import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from sora_jax.data import colour, records, video_clips, video_io
from sora_jax.evals.videos import clip_files
from tests.data.test_video_io import film, write

H, W, N = 48, 64, 9
# Weights of red and blue in luma, and codes of matrix, primaries and transfer.
MATRICES = {
    "bt601": ((0.299, 0.114), (6, 6, 6)),
    "bt709": ((0.2126, 0.0722), (1, 1, 1)),
    "bt2020": ((0.2627, 0.0593), (9, 9, 14)),
    "untagged": ((0.299, 0.114), None),
}
EVEN = tuple(125 * k for k in range(N))
UNEVEN = (0, 125, 375, 437, 500, 750, 875, 1000, 1125)  # milliseconds


def picture(k):
    """A smooth picture, float 0 to 255: brighter with k, unlike itself when turned."""
    y, x = np.mgrid[:H, :W]
    return np.stack([np.full((H, W), 50.0 + 12 * k), 60 + 0.8 * x, 60 + 1.0 * y], -1)


def planes(rgb, weights, full, bits):
    """Planes of 4:2:0, by the definition of BT.601 and its successors."""
    kr, kb = weights
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    uv = [(b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))]
    h, w = y.shape
    uv = [c.reshape(h // 2, 2, w // 2, 2).mean((1, 3)) for c in uv]
    unit, peak, half = 2 ** (bits - 8), 2**bits - 1, 2 ** (bits - 1)
    if full:
        values = [y * peak, *(half + c * peak for c in uv)]
    else:
        values = [(16 + 219 * y) * unit, *((128 + 224 * c) * unit for c in uv)]
    kind = np.uint8 if bits == 8 else np.uint16
    return [np.round(v).clip(0, peak).astype(kind) for v in values]


def from_planes(values, weights, full, bits):
    """The picture, float, that planes stand for; undoes `planes` but for the rounding."""
    kr, kb = weights
    unit, peak, half = 2 ** (bits - 8), 2**bits - 1, 2 ** (bits - 1)
    y, u, v = (plane.astype(float) for plane in values)
    y = y / peak if full else (y / unit - 16) / 219
    u, v = ((c - half) / (peak if full else 224 * unit) for c in (u, v))
    u, v = (c.repeat(2, 0).repeat(2, 1) for c in (u, v))
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return 255 * np.stack([r, g, b], -1).clip(0, 1)


def store(
    path, pictures, *, times=EVEN, matrix="bt709", full=False, bits=8, turn=None,
    aspect=None, codes=None,
):  # fmt: skip
    """Writes pictures with B-frames at times in milliseconds; they are stored as given."""
    weights, tags = MATRICES[matrix]
    tags = codes or tags
    kind = "yuv420p" if bits == 8 else "yuv420p10le"
    options = {"qp": "0", "preset": "ultrafast", "bf": "2", "g": "6"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.thread_count = kind, 1
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if turn:
            degrees, hflip, vflip = turn
            stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.color_range = 2 if full else 1
        if tags:
            stream.colorspace, stream.color_primaries, stream.color_trc = tags
        for rgb, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], kind)
            for plane, values in zip(
                frame.planes, planes(rgb, weights, full, bits), strict=True
            ):
                rows = np.zeros((values.shape[0], plane.line_size), np.uint8)
                row_bytes = values.view(np.uint8).reshape(values.shape[0], -1)
                rows[:, : row_bytes.shape[1]] = row_bytes
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = time, fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def store_cases(base, cases):
    """Writes a file for each case, in folders of one size each; returns the pictures."""
    pictures = [picture(k) for k in range(N)]
    for number, (degrees, flip, aspect, times, matrix, full, bits) in enumerate(cases):
        folder = base / f"{degrees % 180}_{aspect or 1:.2f}"
        folder.mkdir(exist_ok=True)
        store(
            folder / f"{number}.mp4", pictures, times=times, matrix=matrix, full=full,
            bits=bits, turn=(degrees, *flip), aspect=aspect,
        )  # fmt: skip
    return pictures


def prepared(folder, size, num_frames=5, fps=8.0, **changes):
    """What `prepare` makes of a folder: frames by file, reasons, and remarks."""
    source = video_clips.FolderClips(
        folder, size, num_frames, fps, lossless=True, **changes
    )
    clips, others = {}, []
    for part in source.plan(tuple(source.items))[0]:
        for found in source.clips(part, lambda item=None, finished=0: None, {}):
            if isinstance(found, records.ClipRecord):
                clips.setdefault(found.id.split("#")[0], []).append(found.frames())
            else:
                others.append(found)
    return {name: np.concatenate(of) for name, of in clips.items()}, others


def measured(folder, num_frames, colour=None):
    """What `evaluate` sees of the clips of a folder, by name."""
    read = clip_files.Reader(num_frames, 1, least=1)
    return {s.name: read(s) for s in clip_files.find(folder, colour).sources}


def on_screen(times, seconds):
    return max(k for k, time in enumerate(times) if time <= 1000 * seconds + 1e-6)


def seen(rgb, turn, aspect):
    """The picture of stored pixels, as players show it."""
    degrees, hflip, vflip = turn
    if aspect:
        x = np.clip((np.arange(round(W * aspect)) + 0.5) / aspect - 0.5, 0, W - 1)
        left = np.minimum(x.astype(int), W - 2)
        part = (x - left)[:, None]
        rgb = rgb[:, left] * (1 - part) + rgb[:, left + 1] * part
    rgb = np.rot90(rgb, degrees // 90)
    return rgb[:: -1 if vflip else 1, :: -1 if hflip else 1]


def in_bt709(rgb):
    """BT.2020 to BT.709 by BT.2087: to linear light, by the matrix printed there, back."""
    matrix = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]  # fmt: skip
    signal = rgb / 255
    light = np.where(
        signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45)
    )
    light = (light @ np.array(matrix).T).clip(0, 1)
    return 255 * np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


# Every value of each, and every rotation with every mirroring.
CASES = [
    (turn * 90, flip, aspect, times, matrix, full, bits)
    for number, (turn, flip) in enumerate(
        (t, f) for t in range(4) for f in ((False, False), (True, False), (False, True))
    )
    for aspect, times, matrix, full, bits in [
        (
            (None, fractions.Fraction(5, 4))[number // 2 % 2],
            (EVEN, UNEVEN)[number % 2],
            [*MATRICES][number % 4],
            number % 3 == 1,
            (8, 10)[number // 4 % 2],
        )
    ]
] + [
    (0, (False, False), None, EVEN, matrix, full, bits)
    for matrix in MATRICES
    for full in (False, True)
    for bits in (8, 10)
]


def test_prepare_and_evaluate_see_what_players_show(tmp_path):
    pictures = store_cases(tmp_path, CASES)
    ours = {}
    for folder in tmp_path.iterdir():
        whole = measured(folder, N)
        size = next(iter(whole.values())).size
        clips, _ = prepared(folder, tuple(side // 2 * 2 for side in size))
        ours |= {name: (clips[name], whole[name]) for name in clips}
    for number, (degrees, flip, aspect, times, matrix, full, bits) in enumerate(CASES):
        made, whole = ours[f"{number}.mp4"]
        made = made[:5]
        how = MATRICES[matrix][0], full, bits
        truth = [from_planes(planes(rgb, *how), *how) for rgb in pictures]
        truth = [seen(rgb, (degrees, *flip), aspect) for rgb in truth]
        if matrix == "bt2020":
            truth = [in_bt709(rgb) for rgb in truth]
        truth = np.stack(truth)
        assert whole.size == truth.shape[1:3], CASES[number]
        expected = truth[[on_screen(times, k / 8) for k in range(5)]]
        off = np.abs(made - expected)[:, 2:-2, 2:-2]  # chroma has no neighbour outside
        # The matrix of the wide gamut adds up what was rounded, and FFmpeg's scaler rounds
        # down where it scales.
        bound = 6 if matrix == "bt2020" or aspect else 4
        assert off.max() <= bound, CASES[number]
        # Where both take the same frame, they see the same numbers.
        uneven = any("uneven" in note for note in whole.notes)
        assert uneven == (times is UNEVEN) and (uneven or whole.fps == 8)
        for k, picture_hwc in enumerate(whole.video_thwc):
            taken = on_screen(times, k / whole.fps) if uneven else k
            for j in (j for j in range(5) if on_screen(times, j / 8) == taken):
                assert np.array_equal(picture_hwc, made[j]), CASES[number]


def test_players_rule_for_what_is_not_tagged_and_the_flag(tmp_path):
    """BT.709 from a width of 1280 or more than 576 lines; what is tagged stays."""
    flat = {}
    for name, (height, width), matrix, codes in (
        ("sd", (576, 64), "bt601", None),
        ("wide", (64, 1280), "bt709", None),
        ("tall", (578, 64), "bt709", None),
        ("tagged", (578, 64), "bt601", (6, 6, 6)),
    ):
        rgb = np.full((height, width, 3), (200.0, 60, 60))
        MATRICES["given"] = MATRICES[matrix][0], codes
        store(tmp_path / f"{name}.mp4", [rgb] * 2, times=EVEN[:2], matrix="given")
        flat[name] = video_io.decode(tmp_path / f"{name}.mp4").frames[0, 9, 9]
    del MATRICES["given"]
    for name, seen_c in flat.items():
        assert np.abs(seen_c.astype(int) - (200, 60, 60)).max() <= 2, name
    (tmp_path / "one").mkdir()
    (tmp_path / "sd.mp4").rename(tmp_path / "one" / "sd.mp4")
    clips, remarks = prepared(tmp_path / "one", (64, 64), 1, colour="bt709")
    clip = measured(tmp_path / "one", 1, "bt709")["sd.mp4"]
    kr, kb = MATRICES["bt601"][0]
    y, cr = kr * 200 + (1 - kr) * 60, 140 * (1 - kr) / (2 * (1 - kr))
    red = y + 2 * (1 - 0.2126) * cr
    assert abs(int(clips["sd.mp4"][0, 9, 9, 0]) - red) <= 3
    assert (
        np.abs(clip.video_thwc[0, 9, 9].astype(int) - clips["sd.mp4"][0, 9, 9]).max()
        < 2
    )
    assert [r.what for r in remarks] == ["with untagged colours, read as bt709"]


def test_wide_gamut_and_hdr_become_bt709(tmp_path):
    """Signals made by the standards' own formulas, read back as the light that they are."""
    x = np.linspace(0, 1, 256)
    nits = colour.pq_light(x)
    assert nits[0] == 0 and nits[-1] == pytest.approx(10000)
    assert colour.pq_light(np.array([0.5806888810416109]))[0] == pytest.approx(
        203, 1e-4
    )
    assert np.abs(colour.pq_signal(nits) - x).max() < 1e-6
    light = np.array([0.0, 50, 87, 203, 1000, 4000])
    mapped = colour.tone_map(light)
    # BT.2390: as it is below the knee, then up to the white of SDR, and no further.
    assert np.array_equal(mapped[:2], light[:2]) and 150 < mapped[3] < 170
    assert mapped[4] == pytest.approx(203) and mapped[5] == pytest.approx(203)
    # Greys of 20 and 80 cd/m2 of a screen of PQ, at a white of 203 and a gamma of 2.4.
    for cd in (20, 80):
        code = np.full((1, 1, 3), round(65535 * float(colour.pq_signal(cd))), np.uint16)
        expected = 255 * (cd / 203) ** (1 / 2.4)
        assert np.abs(colour.convert(code, 9, 16) - expected).max() <= 1
        # HLG: that light is the scene's to the power of 1.2, on a screen of 1000.
        scene = (cd / 1000) ** (1 / 1.2)
        hlg = np.sqrt(3 * scene)
        if scene > 1 / 12:
            hlg = 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073
        code = np.full((1, 1, 3), round(65535 * hlg), np.uint16)
        assert np.abs(colour.convert(code, 9, 18) - expected).max() <= 1
    # Colours of BT.709 in BT.2020, by the matrix of BT.2087, come back.
    rgb = np.array([[[200, 40, 40], [40, 180, 60], [50, 60, 200]]]) / 255
    to_wide = [
        [0.6274, 0.3293, 0.0433],
        [0.0691, 0.9195, 0.0114],
        [0.0164, 0.088, 0.8956],
    ]
    light = np.where(rgb < 0.081, rgb / 4.5, ((rgb + 0.099) / 1.099) ** (1 / 0.45))
    wide = light @ np.array(to_wide).T
    wide = np.where(wide < 0.018, 4.5 * wide, 1.099 * wide**0.45 - 0.099)
    back = colour.convert(np.round(wide * 65535).astype(np.uint16), 9, 14)
    assert np.abs(back - 255 * rgb).max() <= 1
    # Files say what was done to them, and what is not read is refused.
    grey = [np.full((H, W, 3), 100.0)] * 5
    store(
        tmp_path / "pq.mp4",
        grey,
        times=EVEN[:5],
        matrix="bt2020",
        bits=10,
        codes=(9, 9, 16),
    )
    _, (remark,) = prepared(tmp_path, (H, W))
    assert "HDR (PQ)" in remark.what and "BT.2390" in remark.what
    assert measured(tmp_path, 5)["pq.mp4"].notes == (remark.what,)
    store(tmp_path / "pq.mp4", grey, times=EVEN[:5], codes=(8, 1, 1))
    with pytest.raises(video_io.UnreadableVideo, match="coded with matrix 8 of H.273"):
        video_io.decode(tmp_path / "pq.mp4")


@pytest.mark.parametrize(
    "name, codec, fps, count, num_frames, at",
    [
        ("a.mkv", "libx264", 30, 17, 17, 30),  # time stamps are whole milliseconds
        ("a.webm", "libvpx-vp9", fractions.Fraction(30000, 1001), 17, 17, 30000 / 1001),
        ("a.mp4", "libx264", 24, 25, 17, 16),  # its last frame is due at 1 s
        ("a.mp4", "libx264", 24, 24, 17, 16),
        ("a.mp4", "libx264", 25, 1, 1, 8),
        ("a.avi", "mpeg4", 10, 17, 17, 10),
        ("a.ts", "libx264", 25, 17, 17, 25),
        ("a.mpg", "mpeg2video", 25, 17, 17, 25),
    ],
)
def test_a_clip_needs_its_last_frame_on_screen_and_no_more(
    tmp_path, name, codec, fps, count, num_frames, at
):
    write(
        tmp_path / name, film(count, float(fps)), fps=fps, codec=codec, bf="2", b="9M"
    )
    clips, others = prepared(tmp_path, (H, W), num_frames, at)
    last = (num_frames - 1) / at
    if last < count / fps - 1e-3:
        assert len(clips[name]) == num_frames
        red = 40 + 40 * np.floor(
            np.arange(num_frames) / at * float(fps) + 1e-6
        ) / float(fps)
        assert np.abs(clips[name][..., 0].mean((1, 2)) - red).max() < 5
    else:
        assert not clips and "is due at 1.00 s" in others[0].reason


def test_every_container_is_sought_in(tmp_path):
    """From the middle as from the start, B-frames or not, and what has no index."""
    for name, codec in (
        ("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.m2ts", "libx264"),
        ("a.mpg", "mpeg2video"), ("a.mkv", "libx264"), ("a.gif", "gif"),
    ):  # fmt: skip
        path = tmp_path / name
        write(
            path,
            film(125, 25),
            25,
            codec,
            **{} if codec == "gif" else {"bf": "2", "g": "12", "b": "9M"},
        )
        seconds = np.arange(25) / 5
        whole = list(video_io.sample(path, seconds, (24, 32)))
        part = list(video_io.sample(path, seconds[14:], (24, 32)))
        assert len(whole) == 25 and np.array_equal(part, whole[14:]), name


def test_good_files_are_not_said_to_end_early(tmp_path):
    """Longer sound, a late start, a last picture that stays: 2 s of video are 2 s."""
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        video, sound = (
            container.add_stream("libx264", 25),
            container.add_stream("aac", 48000),
        )
        video.height, video.width, video.pix_fmt = H, W, "yuv420p"
        for k, frame_hwc in enumerate(film(50, 25)):
            frame = av.VideoFrame.from_ndarray(frame_hwc, "rgb24")
            frame.pts, frame.time_base = k + 37, fractions.Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for k in range(200):
            noise = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp")
            noise.sample_rate, noise.pts = 48000, 1024 * k
            container.mux(sound.encode(noise))
        container.mux(sound.encode())
    stills = [PIL.Image.fromarray(frame) for frame in film(9, 8)]
    stills[0].save(
        tmp_path / "hold.gif", save_all=True, append_images=stills[1:],
        duration=[120] * 8 + [3040], loop=0,
    )  # fmt: skip
    clips, others = prepared(tmp_path, (H, W), 5, 8.0)
    assert (len(clips["sound.mkv"]), len(clips["hold.gif"])) == (15, 10)
    assert {
        other.what: other.frames for other in others if other.file == "hold.gif"
    } == {
        "slower than the clips, with frames repeated": 1,
        "still for whole clips, which are left out": 20,
    }
    assert not [other for other in others if hasattr(other, "reason")]
    assert measured(tmp_path, 9)["hold.gif"].fps == pytest.approx(1 / 0.12)


def test_repeated_frames_are_counted(tmp_path):
    write(tmp_path / "slow.mp4", film(10, 5), fps=5)
    _, remarks = prepared(tmp_path, (H, W), 45, 24.0)
    (repeated,) = [r for r in remarks if "repeated" in r.what]
    assert (repeated.file, repeated.frames) == ("slow.mp4", 45 - 10)


def test_interlaced_frames_are_deinterlaced(tmp_path):
    """Fields of a bar that moves: a comb without deinterlacing."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        options = {"x264-params": "tff=1:qp=1", "preset": "ultrafast"}
        stream = container.add_stream("libx264", 10, options=options)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        for k in range(10):
            frame_hwc = np.full((H, W, 3), 40, np.uint8)
            for field in (0, 1):
                left = 4 * (2 * k + field) % 48
                frame_hwc[field::2, left : left + 12] = 200
            frame = av.VideoFrame.from_ndarray(frame_hwc, "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clips, others = prepared(tmp_path, (H, W), 5, 10.0)
    whole = measured(tmp_path, 10)["a.mp4"]
    assert any(r.what.startswith("interlaced") for r in others)
    assert any(n.startswith("interlaced") for n in whole.notes)
    assert len(whole.video_thwc) == 10 and np.array_equal(
        whole.video_thwc, clips["a.mp4"]
    )
    grey = whole.video_thwc[2:8, 8:-8, :, 1].astype(int)
    comb = np.abs(2 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:])
    assert comb.mean() < 8  # and above 25 as it is stored


def test_transparent_video_is_laid_on_black(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("qtrle", 8)
        stream.height, stream.width, stream.pix_fmt = H, W, "argb"
        rgba = np.full((H, W, 4), (250, 20, 20, 255), np.uint8)
        rgba[:, : W // 2, 3], rgba[: H // 2, : W // 2, 3] = 128, 0
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(rgba, "rgba")
            container.mux(stream.encode(frame.reformat(format="argb")))
        container.mux(stream.encode())
    clips, (remark,) = prepared(tmp_path, (H, W))
    frame_hwc = clips["a.mov"][0]
    assert remark.what == "transparent in places, laid on black"
    assert frame_hwc[4, 4].tolist() == [0, 0, 0] and frame_hwc[4, 60].tolist() == [
        250,
        20,
        20,
    ]
    assert np.abs(frame_hwc[40, 4] - np.array([125.5, 10, 10])).max() <= 1
    assert np.array_equal(measured(tmp_path, 5)["a.mov"].video_thwc, clips["a.mov"])


def test_the_stream_that_players_choose(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("libx264", 8) for _ in range(2)]
        streams[0].disposition, streams[1].disposition = 0, 1
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        for level, stream in zip((20, 200), streams, strict=True):
            for _ in range(5):
                flat = np.full((H, W, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(flat, "rgb24")))
            container.mux(stream.encode())
    assert abs(int(video_io.decode(tmp_path / "a.mkv").frames[0, 5, 5, 0]) - 200) < 4


def _profile(name):
    return PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile(name)).tobytes()


def test_pictures_of_every_kind(tmp_path):
    """16 bits are scaled, transparent parts black, profiles applied, EXIF followed."""

    def read(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return video_io.read_image(tmp_path / name)[0, 0].tolist()

    def flat(value, kind=np.uint8):
        return PIL.Image.fromarray(np.full((8, 8, *np.shape(value)), value, kind))

    assert read(flat(32768, np.uint16)) == [128] * 3
    assert read(flat(257 * 40, np.uint16)) == [40] * 3
    assert read(flat(32768, np.uint16), transparency=32768) == [0] * 3
    assert read(flat((250, 10, 10, 0))) == [0, 0, 0]
    assert read(flat((250, 10, 10, 51))) == [50, 2, 2]
    assert read(flat((200, 51)), "a.png") == [40] * 3
    assert read(flat((9, 8, 7)), transparency=(9, 8, 7)) == [0, 0, 0]
    palette = flat((250, 10, 10)).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    index = palette.getpixel((0, 0))
    assert (
        read(palette) == [250, 10, 10] and read(palette, transparency=index) == [0] * 3
    )
    assert read(palette, "a.gif", transparency=index) == [0] * 3
    assert read(flat(255).convert("1")) == [255] * 3
    cmyk = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.array(read(cmyk, "a.jpg", quality=95))
    assert np.abs(red - (255, 0, 0)).max() <= 3
    # A broken profile counts as none, as in browsers.
    assert read(flat((120, 60, 30)), icc_profile=_profile("sRGB")) == [120, 60, 30]
    assert read(flat((120, 60, 30)), icc_profile=b"broken") == [120, 60, 30]
