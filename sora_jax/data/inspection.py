"""What a folder of videos holds, told before any clip is made: statistics and pictures.

Videos are read as far as their header, their first frame and, for the contact sheet, two
seconds; damage further on is found only when clips are made.

Letters: h height, w width, c channel (RGB).
"""

import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from sora_jax.core import paths, progress
from sora_jax.data import (
    records,
    reports,
    samples,
    texts,
    video_clips,
    video_io,
    workers,
)

_TILES = 48  # of a contact sheet
_PICTURE = 192  # pixels of the longer side of a picture on it
_COLUMNS, _MARGIN = 8, 6
_TEXT, _LINE = 11, 14  # pixels of letters, and from line to line
_AT = 2.0  # seconds into a video that a picture is taken, as a film may begin in black
_VIDEOS_PER_PART = 16


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of a video before clips are made of it.

    Attributes:
      name: of the video.
      header: None if it cannot be read.
      clips: how many it gives, unless it is damaged further on or stands still.
      reason: why it gives none, or "".
      shapes: how many of them have each (frames, height, width).
      picture_hwc: a frame of its clips, uint8, if the contact sheet shows it.
    """

    name: str
    header: video_io.Header | None = None
    clips: int = 0
    reason: str = ""
    shapes: Mapping[tuple[int, int, int], int] = dataclasses.field(default_factory=dict)
    picture_hwc: np.ndarray | None = None


def inspect(source: video_clips.FolderClips, num_workers: int = 0) -> list[Seen]:
    """Looks at each video of a folder, in the order of the listing.

    Args:
      source: the folder, and the clips that would be made of it.
      num_workers: processes; 0: work in this one.
    """
    videos = [*source.items]
    shown = {videos[index] for index in samples.evenly(len(videos), _TILES)}
    parts = [list(part) for part in itertools.batched(videos, _VIDEOS_PER_PART)]
    seen: dict[int, list[Seen]] = {}
    with progress.Progress(len(videos), "inspect", source.unit) as bar:
        look = functools.partial(_look, source, shown, parts)
        found = workers.run(
            look,
            range(len(parts)),
            num_workers=num_workers,
            on_finished=bar.update,
            bounds=source.bounds,
        )
        for part, result in found:
            seen[part] = result
    result = [one for part in sorted(seen) for one in seen[part]]
    assert all(one.clips or one.reason for one in result)
    return result


def _look(
    source: video_clips.FolderClips,
    shown: set[str],
    parts: Sequence[list[str]],
    part: int,
    note: workers.Note,
    avoid: Mapping[str, str],
) -> list[Seen]:
    seen = []
    for video in parts[part]:
        if video in avoid:
            seen.append(Seen(video, reason=avoid[video]))
        else:
            seen.append(_look_at(source, video, video in shown, note, avoid))
        note(finished=1)
    return seen


def _look_at(
    source: video_clips.FolderClips,
    video: str,
    shown: bool,
    note: workers.Note,
    avoid: Mapping[str, str],
) -> Seen:
    header, tell = None, functools.partial(note, item=video)
    try:
        source.fetch(video, f"copy of {video}", note, avoid)
        tell()
        header, sample = source.opened(video, tell)
        shapes, picture_hwc = source.clips_by_shape(video, header), None
        clips = sum(shapes.values())
        if shown and clips:
            begin, seconds = source.span(video, header)
            at = begin + min(seconds / 2, _AT)
            size = source.shape_of(video, header).size
            pictures = sample([at], _picture_size(size), notes=set())
            picture_hwc = next(pictures, None)  # None: it ends before its header says
        reason = "" if clips else source.too_short(video, header)
        return Seen(video, header, clips, reason, shapes, picture_hwc)
    except video_io.UnreadableVideo as error:
        return Seen(video, header, reason=source.reason(video, error))


def _picture_size(size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of a picture on the contact sheet: even, of the clips' shape."""
    scale = _PICTURE / max(size)
    return tuple(max(8, round(side * scale / 2) * 2) for side in size)


# -- statistics -----------------------------------------------------------------------


def describe(
    source: video_clips.FolderClips,
    seen: Sequence[Seen],
    count_tokens: Callable[[str], int] | None = None,
) -> list[str]:
    """Returns the lines that say what a folder holds, and what is not used and why.

    Args:
      source: the folder.
      seen: the result of `inspect`.
      count_tokens: of a caption; None: only words are counted.
    """
    listing = source.listing
    read = [one for one in seen if one.header]
    used = [one for one in seen if one.clips]
    hours = sum(one.header.seconds for one in read) / 3600
    shapes = collections.Counter()
    for one in seen:
        shapes.update(one.shapes)
    fps = f"{source.fps:g} fps" if source.fps else f"up to {source.max_fps:g} fps"
    lines = [
        f"{source.folder}: {reports.census(listing)}",
        f"{len(seen)} videos of {sum(listing.videos.values()) / 2**30:.2f} GiB and "
        f"{hours:.2f} hours: {len(used)} can be used, and give up to "
        f"{sum(one.clips for one in used)} clips of "
        f"{reports.of_shapes(shapes) if shapes else 'no size'}, {fps}",
        *reports.shapes(shapes),
    ]
    columns = {
        "width, pixels": [one.header.width for one in read],
        "height, pixels": [one.header.height for one in read],
        "frames a second": [one.header.fps for one in read],
        "seconds": [one.header.seconds for one in read],
        "MiB": [listing.videos[one.name] / 2**20 for one in read],
        "clips": [one.clips for one in read],
    }
    captions = [
        [
            caption
            for several in listing.texts[one.name].captions.values()
            for caption in records.variants(several)
        ]
        if one.name in listing.texts
        else []
        for one in seen
    ]
    spoken = [caption for several in captions for caption in several]
    columns["words of a caption"] = [len(caption.split()) for caption in spoken]
    if count_tokens:
        columns["tokens of a caption"] = [*map(count_tokens, spoken)]
    lines += _table(columns)
    headers = [one.header for one in read]
    kinds = collections.Counter(f"{h.codec} in {h.container}" for h in headers)
    lines += [f"{count:6d} {kind}" for kind, count in kinds.most_common()]
    tiers = collections.Counter(
        tier for one in seen if one.name in listing.texts
        for tier in listing.texts[one.name].captions
    )  # fmt: skip
    of_tiers = ", ".join(f"{n} {tier}" for tier, n in sorted(tiers.items()))
    lines.append(
        f"captions: {sum(map(bool, captions))} of {len(seen)} videos have one; by tier: "
        f"{of_tiers or 'none'}"
    )
    refused = [(one.name, one.reason) for one in seen if one.reason]
    others = [(one.file, one.reason) for one in listing.skipped]
    for what, faults in (("videos", refused), ("other files or lines", others)):
        if faults:
            lines.append(f"{len(faults)} {what} that cannot be used:")
            lines += reports.kinds(faults)
    return lines


def _table(columns: Mapping[str, Sequence[float]]) -> list[str]:
    """Rows of least, median, and so on of each list of numbers that is not empty."""
    shares = {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "most": 100}
    rows = [" " * 20 + "".join(f"{share:>10}" for share in shares)]
    for name, numbers in columns.items():
        if numbers:
            found = np.percentile(numbers, [*shares.values()], method="nearest")
            rows.append(f"{name:20}" + "".join(f"{_short(n):>10}" for n in found))
    return rows if len(rows) > 1 else []


def _short(number: float) -> str:
    return f"{number:.0f}" if number == int(number) else f"{number:.2f}"


# -- contact sheet --------------------------------------------------------------------


def write_sheet(path: pathlib.Path, seen: Sequence[Seen]) -> list[str]:
    """Draws a contact sheet: pictures of up to 48 videos, each with its name and header.

    A video that cannot be used has its reason in place of a picture.

    Args:
      path: the file to write, .png or .jpg.
      seen: the result of `inspect`, at least one.

    Returns:
      Lines that say what was drawn; names in scripts that the font lacks are among them.
    """
    font = PIL.ImageFont.load_default(_TEXT)
    tiles = [seen[index] for index in samples.evenly(len(seen), _TILES)]
    pictures = [one.picture_hwc for one in tiles if one.picture_hwc is not None]
    height = max((len(picture_hwc) for picture_hwc in pictures), default=_PICTURE // 2)
    columns = min(_COLUMNS, len(tiles))
    step_x, step_y = _PICTURE + _MARGIN, height + 2 * _LINE + _MARGIN
    rows = math.ceil(len(tiles) / columns)
    whole = (columns * step_x + _MARGIN, rows * step_y + _MARGIN)
    sheet = PIL.Image.new("RGB", whole, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    lines = [f"{path}: pictures of {len(tiles)} videos"]
    for place, one in enumerate(tiles):
        x = _MARGIN + place % columns * step_x
        y = _MARGIN + place // columns * step_y
        if one.picture_hwc is not None:
            sheet.paste(PIL.Image.fromarray(one.picture_hwc), (x, y))
        else:
            draw.rectangle((x, y, x + _PICTURE - 1, y + height - 1), "#553333")
            reason = textwrap.wrap(texts.escaped(one.reason), _PICTURE // 6)
            reason = "\n".join(reason[: height // _LINE])
            draw.multiline_text((x + 4, y + 4), reason, "white", font)
        name = reports.name(one.name)
        if not name.isascii():
            lines.append(f"picture {place + 1} is of {name}")
        for number, line in enumerate((f"{place + 1} {name}", _summary(one))):
            while font.getlength(line) > _PICTURE:
                line = f"{line[:-4]}..."
            draw.text((x, y + height + 2 + number * _LINE), line, "black", font)
    with paths.replacing(path) as temporary:
        sheet.save(temporary, "PNG" if path.suffix.lower() == ".png" else "JPEG")
    return lines


def _summary(one: Seen) -> str:
    if not (h := one.header):
        return ""
    return f"{h.width}x{h.height} {h.fps:.4g} fps {h.seconds:.1f} s {h.codec}"
