"""Reads what a run wrote for TensorBoard, and what our tracker gives to wandb.

Run by the peers' Python: `python trackers.py tensorboard FOLDER` prints the scalars and
images that TensorBoard finds, as JSON. `python trackers.py wandb ROOT FOLDER` logs with the
tracker of the tree ROOT, offline, and prints the history that wandb finds in its own file.
"""

import base64
import glob
import json
import os
import pathlib
import sys
import time


def read_tensorboard(folder):
    from tensorboard.backend.event_processing import event_accumulator

    reader = event_accumulator.EventAccumulator(folder, {"scalars": 0, "images": 0})
    reader.Reload()
    tags = reader.Tags()
    return {
        "scalars": {
            tag: [(e.step, e.value) for e in reader.Scalars(tag)]
            for tag in tags["scalars"]
        },
        "images": {
            tag: [
                (e.step, base64.b64encode(e.encoded_image_string).decode())
                for e in reader.Images(tag)
            ]
            for tag in tags["images"]
        },
    }


def log_to_wandb(root, folder):
    sys.path.insert(0, root)
    import numpy as np

    from sora_jax.training import trackers

    folder = pathlib.Path(folder)
    for step in (1, 2):  # the second start resumes the run
        tracker = trackers.WandB(folder, "toys", {"seed": 3})
        tracker.scalars(step, {"loss": 0.5 / step})
        video = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
        tracker.videos(step, {"a cat": video}, 8.0)
        tracker.close()


def records(file):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    content, place, parts = pathlib.Path(file).read_bytes(), 7, []
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:  # the rest of a block that is too short for a header
            place += room
            continue
        size, kind = (
            int.from_bytes(content[place + 4 : place + 6], "little"),
            content[place + 6],
        )
        if place + 7 + size > len(content):  # it is still being written
            return
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def whole(file):
    """The parsed records of a file once its last one, of the run's end, is written.

    wandb's own process may write it after `finish` has returned.
    """
    from wandb.proto import wandb_internal_pb2

    for _ in range(300):
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(file)]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{file} has no end")


def read_wandb(folder):
    runs, history = set(), []
    files = glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")
    # Two runs of one second have names in no order.
    for file in sorted(files, key=os.path.getmtime):
        for record in whole(file):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project))
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                history.append(row)
    files = glob.glob(
        f"{folder}/wandb/offline-run-*/files/media/videos/**/*.gif", recursive=True
    )
    return {"runs": sorted(runs), "history": history, "files": sorted(files)}


if sys.argv[1] == "tensorboard":
    print(json.dumps(read_tensorboard(sys.argv[2])))
else:
    log_to_wandb(*sys.argv[2:])
    print("\n" + json.dumps(read_wandb(sys.argv[3])))
