"""Reads archives with the webdataset library, and writes some with it.

Run by the peers' Python: `python webdataset_files.py FOLDER FILM OUT` prints what the
library finds in the archives of FOLDER, as JSON, and writes five samples of the video FILM
into OUT, two an archive.
"""

import hashlib
import json
import pathlib
import sys

sys.modules["torch"] = None  # the library works without it, and it takes seconds
import webdataset  # noqa: E402


def read(folder):
    urls = sorted(map(str, pathlib.Path(folder).glob("*.tar")))
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return [
        {
            "key": sample["__key__"],
            "archive": sample["__url__"],
            "sha256": hashlib.sha256(sample["mp4"]).hexdigest(),
            "txt": sample["txt"],
            "json": sample["json"],
        }
        for sample in samples
    ]


def write(film, out):
    pathlib.Path(out).mkdir()
    content = pathlib.Path(film).read_bytes()
    with webdataset.ShardWriter(f"{out}/%03d.tar", maxcount=2, verbose=0) as sink:
        for index in range(5):
            sample = {"__key__": f"deep/{index}", "mp4": content}
            sample |= {"txt": f"film {index}", "json": {"dense": f"dense {index}"}}
            sink.write(sample)


write(*sys.argv[2:])
print("\n" + json.dumps(read(sys.argv[1])))
