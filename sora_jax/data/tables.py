"""Parquet files, in which Hugging Face publishes data sets.

A video is a path, or stands in the file itself: a column of {bytes, path}. All reading of
Parquet is in this module.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from sora_jax.data import containers, frames

SUFFIX = ".parquet"
# Bytes of the videos of a group of rows, which is read as a whole.
_GROUP_BYTES = 2 << 30
_ROWS = 1024  # that are read at once


@dataclasses.dataclass(frozen=True)
class Cell:
    """A video that stands in a file.

    Attributes:
      path: the file.
      column: of {bytes, path}.
      group: of rows, that the video's row is in.
      row: in the group.
      size: of the video in bytes: the mean of its group.
    """

    path: str
    column: str
    group: int
    row: int
    size: int

    def __str__(self) -> str:
        return "video bytes"  # as `containers.boundary` says

    def read(self) -> bytes:
        """Returns the video.

        Raises:
          containers.UnreadableVideo: it is damaged, or its group of rows is too large.
        """
        with containers.boundary(b""):
            video = _group(self.path, self.column, self.group)[self.row].as_py()
            if video is None:
                raise frames.Refused(
                    "its row has no video, unlike others of its group: write rows with "
                    "videos and rows with paths alone in groups of their own"
                )
            return video


@functools.lru_cache(maxsize=1)  # a group is read for its first video, and serves all
def _group(path: str, column: str, group: int):
    file = _open(path)
    size = _column(file.metadata.row_group(group), column).total_uncompressed_size
    if size > _GROUP_BYTES:
        raise frames.Refused(
            f"its group of rows has {size} bytes, and is read as a whole: write the file "
            f"with fewer rows a group; the limit of it is {_GROUP_BYTES} bytes"
        )
    table = file.read_row_group(group, columns=[f"{column}.bytes"])
    return table.column(column).combine_chunks().field("bytes")


def _open(path: str | os.PathLike):
    import pyarrow.parquet  # slow to import

    return pyarrow.parquet.ParquetFile(path)


def _column(group, column: str):
    """Returns the metadata of the videos of a group of rows.

    Raises:
      ValueError: its columns are not those of the file.
    """
    for index in range(group.num_columns):
        if group.column(index).path_in_schema == f"{column}.bytes":
            return group.column(index)
    raise ValueError(f"a group of its rows has no column {column}.bytes")


def _mean_size(group, column: str) -> int:
    """Bytes of a video of a group of rows, by its metadata; 0 if it has none."""
    metadata = _column(group, column)
    statistics = metadata.statistics
    if statistics is not None and statistics.null_count == group.num_rows:
        return 0
    return math.ceil(metadata.total_uncompressed_size / max(1, group.num_rows))


def rows(
    path: pathlib.Path, check_header
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yields (row, fields) of a file, in its order; rows are counted from 1.

    A video that stands in the file is a `Cell`; of one that does not, its path. Fields
    without a value are left out.

    Args:
      path: the file.
      check_header: is given the columns; raises ValueError where they are not those that
        are needed.

    Raises:
      ValueError: it is not Parquet, or damaged.
    """
    import pyarrow

    number = 0
    try:
        file = _open(path)
        schema = file.schema_arrow
        videos = [
            field.name
            for field in schema
            if pyarrow.types.is_struct(field.type)
            and {"bytes", "path"} <= {inner.name for inner in field.type}
        ]
        try:
            check_header(["video" if n in videos else n for n in schema.names])
        except ValueError as error:
            yield 1, error
            return
        columns = [name for name in schema.names if name not in videos]
        columns += [f"{name}.path" for name in videos]
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            sizes = {name: _mean_size(metadata, name) for name in videos}
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=columns)
            fields_of = (row for batch in batches for row in batch.to_pylist())
            for row, fields in enumerate(fields_of):
                number += 1
                for name in videos:
                    fields[name] = (fields[name] or {}).get("path")
                    if size := sizes[name]:
                        fields[name] = Cell(str(path), name, group, row, size)
                yield number, {k: v for k, v in fields.items() if v is not None}
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"it cannot be read as Parquet behind row {number}: {str(error)[:200]}"
        ) from None
