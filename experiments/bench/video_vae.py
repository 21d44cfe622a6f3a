"""Times the video VAE beside diffusers' AutoencoderKLWan, and in chunks.

    python -m experiments.bench.video_vae [--base_dim 32] [--video 17x128x128]
    python -m experiments.bench.video_vae --stream
    python -m experiments.bench.video_vae --minute --base_dim 8
    python -m experiments.bench.video_vae --tpu v5e:1x1 --base_dim 96

The first command writes random weights for both, runs the peer in its own environment
(`.peers`, the same number of threads, its feature cache on), compares the results, and
times both in turns. `--stream` times chunk sizes against one pass. `--minute` decodes 961
frames of 832x480 in chunks and fails above `--bound` bytes of memory. `--tpu` compiles the
passes over one latent of such a video for a TPU slice (with libtpu, without the slice),
height and width sharded over it, in bfloat16, and prints the memory per chip by kind;
`JAX_OPTIMIZATION_LEVEL=O0` compiles ten times as fast, with nearly the same memory. The
others use float32. All have the layout of Wan 2.1 with a width of `--base_dim`.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.bench import loading, side_by_side
from sora_jax.core import job
from sora_jax.core import mesh as meshes
from sora_jax.models import conv, exchange, peer_configs, streaming, video_vae

# Largest relative errors.
TOLERANCE = {"encode": 1e-5, "decode": 1e-5, "train": 1e-4}


def make(config: video_vae.Config) -> dict:
    """Returns random parameters; none is zero, as some initial values are."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        noise = rng.standard_normal(shape.shape, np.float32)
        if len(shape.shape) > 1:
            return 0.3 * noise / np.sqrt(np.prod(shape.shape[:-1]))
        return 0.1 * noise + ("scale" in jax.tree_util.keystr(path))

    shapes = exchange.VAE.shapes(config)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(config: video_vae.Config, params: dict) -> video_vae.VideoVAE:
    """Builds the network with the given parameters."""
    vae = nnx.eval_shape(lambda: video_vae.VideoVAE(config, nnx.Rngs(0)))
    graph, state = nnx.split(vae)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return nnx.merge(graph, state)


def make_inputs(config: video_vae.Config, size: tuple[int, int, int]) -> dict:
    """Returns a clip and latents of that size, and inputs of a 64-channel convolution."""
    rng = np.random.default_rng(1)
    return {
        "video": rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32),
        "latents": rng.standard_normal((1, *config.latent_shape(*size)), np.float32),
        "x": rng.standard_normal((1, 5, 32, 32, 64), np.float32),
        "kernel": rng.standard_normal((3, 3, 3, 64, 64), np.float32) / 42,
    }


def our_operations(config, params, inputs) -> dict[str, Callable]:
    """Returns the timed operations by the peer's names; their results are compared."""
    graph, state = nnx.split(build(config, params))
    tx = optax.adamw(1e-4, weight_decay=0.01)
    inputs = jax.tree.map(jnp.asarray, inputs)

    def vae(state):
        return nnx.merge(graph, state)

    def loss(state, video):
        decoded = vae(state).decode(vae(state).encode(video)[0])
        return jnp.mean((jnp.clip(decoded, -1, 1) - video) ** 2)

    def step(state, moments, video):
        value, gradient = jax.value_and_grad(loss)(state, video)
        updates, moments = tx.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value

    encode = jax.jit(lambda state, video: vae(state).encode(video)[0])
    decode = jax.jit(lambda state, z: jnp.clip(vae(state).decode(z), -1, 1))
    convolve, train = jax.jit(conv.causal_conv3d), jax.jit(step)
    trained = [jax.tree.map(jnp.copy, state), tx.init(state)]

    def train_once():
        *trained[:], value = train(*trained, inputs["video"])
        return value

    return {
        "encode": lambda: encode(state, inputs["video"]),
        "decode": lambda: decode(state, inputs["latents"]),
        "train": train_once,
        "conv3d": lambda: convolve(inputs["x"], inputs["kernel"]),
    }


def open_peer(python, folder: pathlib.Path, config, params, inputs):
    """Starts the peer with our weights and inputs in its layout."""
    flat = exchange.VAE.export(params, config)
    case = {f"weight/{name}": np.asarray(array) for name, array in flat.items()}
    for name, array in inputs.items():
        forward = (4, 3, 0, 1, 2) if name == "kernel" else (0, 4, 1, 2, 3)
        case[f"in/{name}"] = array.transpose(forward)
    config = peer_configs.write_vae(config)
    return side_by_side.Peer(python, "timed_vae.py", folder, case, config)


def check(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Compares results with the peer's.

    Raises:
      ValueError: a result differs.
    """
    for name, array in theirs.items():
        found = ours[name.removesuffix("_channels_last")]
        side_by_side.check(name, found, array, TOLERANCE.get(name, 1e-5))


def compare(
    python: str, config, size, repeat: int, names=None, json_path: str | None = None
) -> dict[str, float]:
    """Times both in turns; returns the peer's time divided by ours, by operation.

    Raises:
      ValueError: the results differ.
    """
    params, inputs = make(config), make_inputs(config, size)
    ours = our_operations(config, params, inputs)
    ours = {name: run for name, run in ours.items() if not names or name in names}
    forms = {"conv3d": ("conv3d", "conv3d_channels_last")}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        given = pathlib.Path(folder), config, params, inputs
        with open_peer(python, *given) as peer:
            results = {name: np.asarray(run()) for name, run in ours.items()}
            for name in ours:
                for theirs in forms.get(name, (name,)):
                    peer.seconds(theirs)
            found = peer.results()
            check(
                results,
                {
                    k: np.moveaxis(v, 1, -1) if v.ndim == 5 else v
                    for k, v in found.items()
                },
            )
            for name, run in ours.items():
                run = functools.partial(side_by_side.seconds, run)
                calls = {side_by_side.OURS: run}
                for theirs in forms.get(name, (name,)):
                    calls[theirs] = functools.partial(peer.seconds, theirs)
                times = side_by_side.take_turns(calls, repeat)
                label = f"base_dim {config.base_dim}, {size} {name}"
                rows.append(side_by_side.row(label, times))
    side_by_side.write(json_path, rows)
    return {k: v for made in rows for k, v in made["ratios"].items()}


def stream(config, size, repeat: int) -> None:
    """Times encoding and decoding in chunks of several sizes against one pass."""
    params, inputs = make(config), make_inputs(config, size)
    vae = build(config, params)
    ours = our_operations(config, params, inputs)
    ways = {("encode", 0): ours["encode"], ("decode", 0): ours["decode"]}

    def through(run, name, chunk):
        return lambda: [jax.block_until_ready(x) for x in run(inputs[name], chunk)]

    for chunk in (1, 2, 4, 8):
        ways["encode", chunk] = through(vae.encode_stream, "video", chunk)
        ways["decode", chunk] = through(vae.decode_stream, "latents", chunk)
    calls = {
        way: functools.partial(side_by_side.seconds, run) for way, run in ways.items()
    }
    for call in calls.values():
        call(1)  # compiles it
    times = side_by_side.take_turns(calls, repeat)
    for (name, chunk), found in times.items():
        share = np.median(found) / np.median(times[name, 0])
        what = f"{chunk} latents at a time" if chunk else "in one pass"
        print(f"{name} {what}: {side_by_side.describe(found)}, {share:.3f} of one pass")


def minute(config, num_frames: int, size, chunk: int, bound: float) -> None:
    """Decodes a long video in chunks and checks the memory.

    Raises:
      ValueError: more than `bound` bytes of anonymous memory above the start, or a wrong
        number of frames.
    """
    vae = build(config, make(config))
    t, h, w, c = config.latent_shape(num_frames, *size)
    rng = np.random.default_rng(2)
    latents = (rng.standard_normal((1, 1, h, w, c), np.float32) for _ in range(t))
    before, began, count, peaks = loading.anonymous_bytes(), time.perf_counter(), 0, []
    with loading.Peak() as peak:
        for video_bthwc in vae.decode_stream(latents, chunk):
            count += np.asarray(video_bthwc).shape[1]
            peaks.append(peak.bytes - before)
    took, half = time.perf_counter() - began, peaks[len(peaks) // 2]
    print(
        f"{count} frames of {size} in {took:.0f} s, {chunk} latents at a time; peak "
        f"{peaks[-1] / 1e9:.2f} GB above the start, {half / 1e9:.2f} GB at half the "
        f"video; the decoded video has {count * np.prod(size) * 12 / 1e9:.2f} GB"
    )
    if count != num_frames or peaks[-1] > bound:
        raise ValueError(f"{count} frames took {peaks[-1] / 1e9:.2f} GB")


def tpu(config, topology: str, size, passes: list[str]) -> dict[str, dict]:
    """Compiles passes over one latent for a TPU slice; prints bytes per chip by kind.

    Args:
      config: of the video VAE, with its compute dtype.
      topology: such as "v5e:2x2"; height is sharded over its first side, width over its
        second.
      size: height and width of the video.
      passes: "first encode" and "first decode" of the first latent, "encode" and "decode"
        of a later one, with the state of the previous chunk.

    Returns:
      Bytes per chip of each pass: arguments (with state), results, results in place of
      arguments, and temporary memory.
    """
    devices = meshes.compile_only(topology)
    sides = [*map(int, topology.partition(":")[2].split("x"))]
    shape = dict(zip(("ring", "tensor"), sides, strict=False))
    mesh = meshes.make_mesh(shape, devices)
    split = [axis if chips > 1 else None for axis, chips in shape.items()]
    graph, parameters = nnx.split(
        nnx.eval_shape(lambda: video_vae.VideoVAE(config, nnx.Rngs(0)))
    )

    def place(leaf, layout=jax.P()):
        layout = jax.NamedSharding(mesh, layout)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    def chunk(way: str, is_first: bool):
        shape = config.latent_shape(1, *size)
        if way == "encode":
            shape = (1 if is_first else config.temporal_stride, *size, 3)
        frames = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        return place(frames, jax.P(None, None, *split))

    found = {}
    with jax.set_mesh(mesh):
        parameters = jax.tree.map(place, parameters)
        for name in passes:
            way, is_first = name.removeprefix("first "), name.startswith("first ")
            run = {"encode": streaming.encode_chunk, "decode": streaming.decode_chunk}
            run, state, began = run[way], None, time.perf_counter()
            if not is_first:
                begun = jax.eval_shape(run, graph, parameters, chunk(way, True), None)
                state = tuple(place(leaf, leaf.sharding.spec) for leaf in begun[1])
            lowered = run.lower(graph, parameters, chunk(way, is_first), state)
            memory = lowered.compile().memory_analysis()
            took = time.perf_counter() - began
            found[name] = {
                "arguments": memory.argument_size_in_bytes,
                "results": memory.output_size_in_bytes,
                "in_place": memory.alias_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
            }
            kinds = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in found[name].items())
            print(f"{topology} {name} {size}, GB per chip: {kinds} ({took:.0f} s)")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_dim", type=int, default=32)
    parser.add_argument("--video", default="17x128x128")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--operations", help="encode,decode,train,conv3d")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--minute", action="store_true")
    parser.add_argument("--tpu", help="TPU slice to compile for, such as v5e:1x1")
    passes = "first encode,encode,first decode,decode"
    parser.add_argument("--passes", default=passes, help="passes that --tpu compiles")
    parser.add_argument("--num_frames", type=int, default=961)
    parser.add_argument("--size", default="832*480", help="width and height")
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--bound", type=float, default=2.5e9)
    parser.add_argument("--peer", default=side_by_side.PEERS)
    parser.add_argument("--json", help="output file for the rows")
    options = parser.parse_args(argv)
    config = dataclasses.replace(video_vae.WAN_2_1, base_dim=options.base_dim)
    size = tuple(map(int, options.video.split("x")))
    print(f"{side_by_side.THREADS} cores, load {os.getloadavg()[0]:.1f}")
    frame = job.parse_size(options.size)
    if options.tpu:
        config = dataclasses.replace(config, dtype="bfloat16")
        tpu(config, options.tpu, frame, options.passes.split(","))
    elif options.minute:
        count, chunk = options.num_frames, options.chunk
        minute(config, count, frame, chunk, options.bound)
    elif options.stream:
        stream(config, size, options.repeat)
    else:
        names = options.operations and options.operations.split(",")
        compare(options.peer, config, size, options.repeat, names, options.json)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
