"""Run by the Python of Beam's environment: writes shards of tests by a runner.

python -m tests.data.beam_job RUNNER OPTIONS FOLDER

Reads videos from FOLDER/in; writes FOLDER/videos, and FOLDER/clips in two runs, of which
the first fails.
"""

import dataclasses
import pathlib
import sys

from sora_jax.data import beam, shards, video_clips
from tests.data import clips


def main(runner: str, options: str, folder: pathlib.Path) -> None:
    engine = beam.Engine(runner, tuple(options.split()))
    source = video_clips.FolderClips(folder / "in", (24, 32), 5, 5.0, frames_fps=5.0)
    shards.write(folder / "videos", source, engine=engine)
    (folder / "seen").mkdir()
    source = clips.Clips(kills=(2,), skipped=(5,), seen=str(folder / "seen"))
    try:
        failing = dataclasses.replace(source, fails_at=9)
        shards.write(folder / "clips", failing, engine=engine)
    except beam.BeamError as error:
        print(error)
    # Those that are finished: a worker of the failed run may still write its own.
    finished = (folder / "clips").glob(".partial/*/part.json")
    made = [path.with_name("part.array_record") for path in finished]
    print(*sorted(path.stat().st_mtime_ns for path in made))
    shards.write(folder / "clips", source, engine=engine)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
