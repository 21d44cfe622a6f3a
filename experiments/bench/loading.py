"""Measures time and host memory of loading a folder of weights.

    python -m experiments.bench.loading --gigabytes 4

writes a synthetic transformer of that size in bfloat16, then reads it in separate
processes: with safetensors alone, tensor by tensor, as a lower bound; and onto eight
virtual devices, fsdp = 8, in the stored type. The peak is that of anonymous resident
memory, sampled; cached pages of files can be dropped at any time and do not count.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parents[2]


def anonymous_bytes(process: int | str = "self") -> int:
    """Returns the anonymous resident memory of a process, by default of this one."""
    for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("the kernel does not report RssAnon")


class Peak:
    """Samples a process's anonymous memory in a thread while it is open."""

    def __init__(self, process: int | str = "self"):
        self._process = process

    def __enter__(self):
        self.bytes, self._done = anonymous_bytes(self._process), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes(self._process))

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()


def write(folder: pathlib.Path, gigabytes: float) -> None:
    """Writes a transformer of about that size, one tensor in memory at a time."""
    import jax.numpy as jnp
    import numpy as np

    from sora_jax.models import dit, peer_configs
    from sora_jax.training import pretrained, weight_files

    dim, mlp = 2048, 8192
    layers = max(1, round(gigabytes * 1e9 / 2 / (8 * dim**2 + 2 * dim * mlp)))
    config = dit.Config(
        dim=dim,
        num_heads=16,
        mlp_dim=mlp,
        num_layers=layers,
        mask_text=False,
        known_embedding=False,
        pooled_text=False,
    )
    peer = pretrained.KINDS["transformer"].peer
    shapes = {name: leaf.shape for name, leaf in _exported_shapes(peer, config).items()}

    class Random(Mapping):
        """Arrays that are drawn on access."""

        def __getitem__(self, name: str):
            tile = np.random.default_rng(len(name)).normal(size=1 << 16)
            return np.resize(tile.astype(jnp.bfloat16), shapes[name])

        def __iter__(self) -> Iterator[str]:
            return iter(shapes)

        def __len__(self) -> int:
            return len(shapes)

    weight_files.write(folder, "diffusion_pytorch_model", Random(), 10**9)
    text = json.dumps(peer_configs.write_transformer(config))
    (folder / "config.json").write_text(text)


def _exported_shapes(peer, config):
    import jax

    return jax.eval_shape(lambda p: peer.export(p, config), peer.shapes(config))


def with_safetensors(folder: pathlib.Path) -> dict:
    """Reads every tensor once without keeping it: a lower bound for any loader."""
    import safetensors

    began, total = time.perf_counter(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "flax") as file:  # supports bfloat16
            for name in file.keys():
                total += file.get_tensor(name).block_until_ready().nbytes
    return {"seconds": time.perf_counter() - began, "bytes": total}


def onto_the_mesh(folder: pathlib.Path) -> dict:
    """Loads the component onto all devices."""
    import jax

    from sora_jax.core import mesh
    from sora_jax.training import pretrained

    jax.devices()
    before = anonymous_bytes()
    with jax.set_mesh(mesh.make_mesh({"fsdp": -1})), Peak() as peak:
        began = time.perf_counter()
        component = pretrained.open_component(folder, "transformer")
        opened = time.perf_counter() - began
        params = jax.block_until_ready(component.load("bfloat16"))
        seconds = time.perf_counter() - began
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "seconds": seconds,
        "opened": opened,
        "bytes": size,
        "devices": len(jax.devices()),
        "peak": peak.bytes - before,
    }


MEASURES = {"safetensors": with_safetensors, "mesh": onto_the_mesh}


def measure(name: str, folder: pathlib.Path) -> dict:
    """Runs one measurement in a separate process."""
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "experiments.bench.loading", name, str(folder)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 2 and argv[0] in MEASURES:
        print(json.dumps(MEASURES[argv[0]](pathlib.Path(argv[1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        folder = pathlib.Path(base) / "transformer"
        write(folder, options.gigabytes)
        for _ in range(options.repeat):
            floor = measure("safetensors", folder)
            found = measure("mesh", folder)
            print(
                f"{found['bytes'] / 1e9:.2f} GB on {found['devices']} devices: "
                f"{found['seconds']:.2f} s (of which {found['opened']:.2f} s to check the "
                f"folder), safetensors alone {floor['seconds']:.2f} s; peak anonymous "
                f"memory {found['peak'] / found['bytes']:.3f} of the weights"
            )


if __name__ == "__main__":
    main()
