"""Times the denoiser beside diffusers' WanTransformer3DModel, with the same weights.

    python -m experiments.bench.denoiser [--rows forward,train] [--json runs/denoiser.json]
    python -m experiments.bench.denoiser --dtype bfloat16
    python -m experiments.bench.denoiser --shape wan_1_3b --dtype bfloat16

Random weights are written once for both, in diffusers' layout. The results are compared
first; then both are timed in turns. Rows:

  forward       the velocity of one clip
  train         forward, backward and AdamW, with as little recomputation as possible
  checkpointed  the same with recomputed blocks: `remat` "attention" beside diffusers'
                gradient checkpointing; the peak memory of both processes is recorded
  sample        Euler steps with guidance: our chunks of steps as in `generate`, two rows
                per call, beside FlowMatchEulerDiscreteScheduler with two calls per step,
                as in WanPipeline

diffusers runs eagerly and, with `--forms eager,compiled`, by torch.compile. On a GPU the
same commands run there. If torch is missing or has no GPU, only our side is timed.
Utilisation is the model's FLOP/s by formula divided by 989 TFLOP/s on a GPU (bfloat16 of
an H100 or H200), and by those of a dense matrix product on a CPU.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.bench import loading, side_by_side
from sora_jax.core import trees
from sora_jax.data import packing
from sora_jax.diffusion import samplers, timesteps
from sora_jax.generation import compiled, request
from sora_jax.models import dit, exchange, peer_configs, rows
from sora_jax.training import cost, weight_files

WAN = {"mask_text": False, "known_embedding": False, "pooled_text": False}
SMALL = dit.Config(
    dim=384, num_layers=8, num_heads=6, mlp_dim=1536, text_dim=512, **WAN
)
WAN_1_3B = dit.Config(**WAN)
WAN_14B = dit.Config(dim=5120, num_layers=4, num_heads=40, mlp_dim=13_824, **WAN)
# Denoiser; latent frames, height and width; text tokens. The third and fourth have 4 of
# the 40 blocks of Wan 14B, which is what fits in a GPU for training.
SHAPES = {
    "small": (SMALL, (5, 48, 34), 64),
    "wan_1_3b": (WAN_1_3B, (21, 60, 104), 512),
    "wan_14b_480p": (WAN_14B, (21, 60, 104), 512),
    "wan_14b_720p": (WAN_14B, (21, 90, 160), 512),
}
LEVEL, SHIFT, GUIDANCE = 0.7, 3.0, 5.0
GPU_PEAK = 989e12
SAMPLE_ROUNDS = 3  # at most, since one takes two minutes on two cores
# Largest relative errors of results and of gradients.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (3e-2, 6e-2)}
# Smallest ratios to reach, in float32 against eager diffusers.
BARS = {"forward": 1.15, "train": 1.0, "checkpointed": 1.0, "sample": 1.15}
# The peer's names of rows, and the results that are compared for them.
PEER_NAMES = {"checkpointed": "train_checkpointed"}
COMPARED = {"train": "gradient", "checkpointed": "gradient_checkpointed"}


def make(config: dit.Config) -> exchange.Tree:
    """Returns random parameters; none is zero, as some initial values are."""
    rng = np.random.default_rng(0)

    def draw(path: str, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("kernel"):
            return noise / np.sqrt(leaf.shape[-2])
        return 0.1 * noise + path.endswith("scale")

    return trees.map_paths(draw, exchange.TRANSFORMER.shapes(config))


def make_inputs(config: dit.Config, grid, text_tokens: int) -> dict[str, np.ndarray]:
    """Returns noised latents and target of a clip, and states of a text and of no text."""
    rng = np.random.default_rng(1)
    video, text = (1, *grid, config.in_channels), (1, text_tokens, config.text_dim)
    sizes = {"x": video, "target": video, "text": text, "null": text}
    drawn = {
        name: rng.standard_normal(size, np.float32) for name, size in sizes.items()
    }
    return drawn | {"level": np.full((1,), LEVEL, np.float32)}


def compared_gradients(config: dit.Config) -> list[str]:
    """Returns the peer's names of weights from the first layer to the last."""
    last = config.num_layers - 1
    return [
        "patch_embedding.weight",
        "blocks.0.attn1.to_q.weight",
        f"blocks.{last}.attn2.to_k.weight",
        f"blocks.{last}.ffn.net.2.weight",
        "proj_out.weight",
    ]


def our_operations(
    config: dit.Config, params, inputs, steps: int
) -> dict[str, Callable]:
    """Returns the timed operations and those whose results are compared."""
    given = {name: jnp.asarray(x) for name, x in inputs.items()}
    mask = jnp.ones(given["text"].shape[:2], bool)

    def network(config, dtype):
        graph, state = nnx.split(
            nnx.eval_shape(lambda: dit.DiT(config, rngs=nnx.Rngs(0)))
        )
        arrays = jax.tree.map(lambda x: jnp.array(x, dtype), params)
        nnx.replace_by_pure_dict(state, arrays)
        return graph, state

    def velocity(graph, state, x, level, text):
        row = rows.of_video(config, x, level[:, None], text, mask)
        found = nnx.merge(graph, state)(row)
        return rows.to_video(found, x.shape[1:4], config.patch)

    # As in a pipeline, weights have the compute dtype; except in training.
    graph, fixed = network(config, config.dtype)
    forward = jax.jit(functools.partial(velocity, graph))

    def sample():
        taus, levels = timesteps.diffusers_schedule("euler", steps, SHIFT)
        plan = samplers.plan("euler", taus, levels)
        branches = tuple(
            compiled.start_rows(
                config, given["x"], {"states": given[name], "mask": mask}, 16.0, 0.0
            )
            for name in ("text", "null")
        )
        x = branches[0].tokens_bnc
        memory = samplers.init_memory(x, "euler")
        for part in samplers.chunks(plan, request.Settings.chunk_steps):
            x, memory, _ = compiled.denoise_chunk(
                graph,
                fixed,
                x,
                memory,
                part,
                branches,
                (np.float32(GUIDANCE),),
                sampler="euler",
            )
        return rows.to_video(x, given["x"].shape[1:4], config.patch)

    found = {
        "forward": lambda: forward(fixed, given["x"], given["level"], given["text"]),
        "sample": sample,
    }
    for row, remat in (("train", config.remat), ("checkpointed", "attention")):
        make_network = functools.partial(
            network, dataclasses.replace(config, remat=remat), jnp.float32
        )
        train, gradient = _training(make_network, velocity, given, config)
        found |= {row: train, COMPARED[row]: gradient}
    return found


def _training(make_network, velocity, given, config):
    """Returns a train step and the compared gradients; weights are created lazily."""
    tx = optax.adamw(1e-4, weight_decay=0.01)
    names = compared_gradients(config)

    @functools.cache
    def begun():
        graph, state = make_network()

        def loss(state):
            args = given["x"], given["level"], given["text"]
            return jnp.mean((velocity(graph, state, *args) - given["target"]) ** 2)

        def step(state, moments):
            value, gradient = jax.value_and_grad(loss)(state)
            updates, moments = tx.update(gradient, moments, state)
            return optax.apply_updates(state, updates), moments, value

        carried = [state, jax.jit(tx.init)(state)]
        return loss, carried, jax.jit(step, donate_argnums=(0, 1))

    def train():
        _, carried, step = begun()
        *carried[:], value = step(*carried)
        return value

    def gradient():
        loss, carried, _ = begun()
        found = nnx.to_pure_dict(jax.jit(jax.grad(loss))(carried[0]))
        flat = exchange.TRANSFORMER.export(found, config)
        return np.concatenate([np.asarray(flat[name]).ravel() for name in names])

    return train, gradient


def open_peer(python, folder: pathlib.Path, config, params, inputs, steps: int):
    """Starts the peer with our weights in a folder of diffusers' layout."""
    weights = folder / "transformer"
    flat = exchange.TRANSFORMER.export(params, config, lazily=True)
    weight_files.write(weights, "diffusion_pytorch_model", flat, 5 * 10**9)
    text = json.dumps(peer_configs.write_transformer(config))
    (weights / "config.json").write_text(text)
    case = {
        name: np.moveaxis(x, -1, 1) if x.ndim == 5 else x for name, x in inputs.items()
    }
    sampling = {"steps": steps, "shift": SHIFT, "guidance": GUIDANCE}
    names = {"dtype": config.dtype, "gradients": compared_gradients(config)}
    return side_by_side.Peer(python, "timed_dit.py", folder, case, sampling | names)


def agree(peer, ours, rows, forms, dtype: str) -> dict[str, dict[str, float]]:
    """Compares results; returns row -> form -> error, for the forms that work.

    Raises:
      ValueError: a result differs.
    """
    available = {}
    for row in rows:
        name = COMPARED.get(row, row)
        expected = None
        for form in forms:
            if form == "compiled" and row == "checkpointed":
                continue
            theirs = name if form == "eager" else f"{name}_compiled"
            try:
                took = peer.seconds(theirs)
            except side_by_side.Refused as error:
                print(f"diffusers {form} does not support {row}: {error}")
                continue
            if form == "compiled":
                print(f"{row}: torch compiled and ran it in {took:.0f} s")
            expected = np.asarray(ours[name]()) if expected is None else expected
            found = peer.results()[theirs]
            found = np.moveaxis(found, 1, -1) if found.ndim == 5 else found
            tolerance = TOLERANCE[dtype][row in COMPARED]
            error = side_by_side.check(theirs, expected, found, tolerance)
            available.setdefault(row, {})[form] = error
    return available


def compare(
    python: str | None,
    config: dit.Config,
    grid,
    text_tokens: int,
    rows,
    forms,
    rounds: int,
    steps: int,
    label: str,
) -> list[dict]:
    """Times rows in turns with the peer, or alone if python is None.

    Returns:
      The rows, see `side_by_side.row`.

    Raises:
      ValueError: the results differ.
    """
    params, inputs = make(config), make_inputs(config, grid, text_tokens)
    ours = our_operations(config, params, inputs, steps)
    tokens = packing.tokens_of((*grid, config.in_channels), config.patch)
    flops = cost.dit_forward_flops(config, tokens, text_tokens)
    times_flops = {"forward": 1, "sample": 2 * steps, "train": 3, "checkpointed": 3}
    on_gpu = jax.default_backend() == "gpu"
    peak = GPU_PEAK if on_gpu else cost.matmul_peak()
    found = []

    def run(peer, available):
        for row in rows:
            ours[row]()  # compiles it and creates its weights
            run_row = functools.partial(side_by_side.seconds, ours[row])
            calls = {side_by_side.OURS: run_row}
            for form in available.get(row, ()):
                theirs = PEER_NAMES.get(row, row)
                theirs = theirs if form == "eager" else f"{theirs}_compiled"
                peer.seconds(theirs)
                calls[form] = functools.partial(peer.seconds, theirs)
            more = {}
            if peer is not None:
                more = {"errors": available.get(row, {}), "peer": peer.versions()}
            if row == "checkpointed" and not on_gpu:
                more["memory"] = _memory(calls, peer)
            turns = min(rounds, SAMPLE_ROUNDS) if row == "sample" else rounds
            times = side_by_side.take_turns(calls, turns)
            rate = times_flops[row] * flops / np.median(times[side_by_side.OURS])
            more["utilisation"] = f"{rate / 1e12:.3g} TFLOP/s, {rate / peak:.0%}"
            bars = {"eager": BARS[row]} if config.dtype == "float32" else {}
            name = f"{label} {config.dtype} {row}"
            found.append(side_by_side.row(name, times, bars, **more))

    if python is None:
        run(None, {})
        return found
    with (
        tempfile.TemporaryDirectory() as folder,
        open_peer(python, pathlib.Path(folder), config, params, inputs, steps) as peer,
    ):
        run(peer, agree(peer, ours, rows, forms, config.dtype))
    return found


def _memory(calls, peer) -> dict[str, int]:
    """Returns the peak memory of each process during one run, in bytes."""
    found = {}
    for form, call in calls.items():
        process = "self" if form == side_by_side.OURS else peer.pid
        with loading.Peak(process) as watched:
            call()
        found[form] = watched.bytes
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", help="some of forward,train,checkpointed,sample")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--forms", default="eager", help="of the peer: eager,compiled")
    parser.add_argument("--remat", choices=dit.REMAT, help="of the row train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of the row sample")
    parser.add_argument("--peer", default=side_by_side.PEERS)
    parser.add_argument("--json", help="output file for the rows")
    options = parser.parse_args(argv)
    # Two libraries share the GPU, so none may allocate all memory in advance.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config, grid, text_tokens = SHAPES[options.shape]
    # Without recomputation, long rows do not fit in a GPU.
    small = options.shape == "small"
    default = "forward,train,checkpointed,sample" if small else "forward,checkpointed"
    rows = (options.rows or default).split(",")
    if unknown := set(rows) - set(BARS):
        parser.error(f"rows are {', '.join(BARS)}; not {', '.join(sorted(unknown))}")
    forms = options.forms.split(",")
    if unknown := set(forms) - {"eager", "compiled"}:
        parser.error(f"forms are eager and compiled; not {', '.join(sorted(unknown))}")
    if options.dtype not in TOLERANCE:
        parser.error(f"dtype is one of {', '.join(TOLERANCE)}")
    remat = options.remat or ("dots" if jax.default_backend() == "cpu" else "none")
    config = dataclasses.replace(config, dtype=options.dtype, remat=remat)
    python = options.peer
    if reason := side_by_side.missing(python, ["diffusers"]):
        print(f"Only our side is timed: {reason}")
        python = None
    print(f"{side_by_side.THREADS} cores, load {os.getloadavg()[0]:.1f}")
    made = compare(
        python,
        config,
        grid,
        text_tokens,
        rows,
        forms,
        options.rounds,
        options.steps,
        options.shape,
    )
    about = {"bench": "denoiser", "shape": options.shape, "remat": remat}
    side_by_side.write(options.json, made, **about)


if __name__ == "__main__":
    main()
