"""Compiles the programs of a config for a TPU slice, without the slice.

XLA compiles the same program that a job runs, on any host; it reports the memory that a
device must hold.

Letters: b rows, t, h, w latent time, height and width, c channels, l text tokens, d
text width.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import sharding, trees
from sora_jax.data import packing, transforms
from sora_jax.diffusion import samplers
from sora_jax.forecast import chips, flops, hlo, step_time
from sora_jax.forecast.chips import GIB
from sora_jax.forecast.report import DoesNotFit, Forecast, KernelDoesNotFit
from sora_jax.generation import compiled, plans, runs
from sora_jax.models import (
    discriminator,
    dit,
    lpips,
    streaming,
    text_encoder,
    video_vae,
)
from sora_jax.training import (
    cost,
    jobs,
    loop,
    objectives,
    optim,
    pretrained,
    reconstruction,
)
from sora_jax.training import state as states
from sora_jax.training import step as steps

_IN_GIB = {"M": 2**-10, "G": 1, "T": 2**10}  # as libtpu writes sizes


_FPS = 16.0  # for recipes that take it from their data; no size depends on it


class _EmptyText:
    """A tokenizer that encodes the empty text only, since there is no data."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, texts, length: int):
        ids = np.zeros((len(texts), length), np.int32)
        ids[:, 0] = 1
        return ids, ids > 0


def denoiser_objective(c) -> objectives.Denoiser:
    """The denoiser's objective of a config, without data.

    A frozen text encoder is left out: its states are stored beside the latents.
    """
    null_states = None
    if c.text.frozen:
        null_states = np.zeros((c.text.length, c.model.dit.text_dim), jnp.bfloat16)
    words = _EmptyText(c.model.text_encoder.vocab_size or c.text.vocab_size)
    return objectives.denoiser(
        c, words, fps=c.sample.fps or _FPS, null_states=null_states
    )


def vae_config(c) -> video_vae.Config:
    """The video VAE of a config."""
    return configs.build(video_vae.Config, c.model.vae, "model.vae")


def latent_shape(c) -> tuple[int, int, int, int]:
    """Latents [t, h, w, c] of a clip of `sample`'s size."""
    return vae_config(c).latent_shape(
        c.sample.num_frames, c.sample.height, c.sample.width
    )


def tokens_of(c) -> int:
    """Tokens of a clip of `sample`'s size."""
    patch = configs.build(dit.Config, c.model.dit, "model.dit").patch
    return packing.tokens_of(latent_shape(c), patch)


def fixed_shapes(c, objective) -> dict:
    """The weights that a run with LoRA adapts, as shapes in their types; else nothing."""
    if not c.lora.rank:
        return {}

    def one(path, leaf):
        dtype = pretrained.type_of(path, c.model.dit.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return {"dit": trees.map_paths(one, objective.networks.abstract()["dit"])}


def begin(c, objective):
    """A function that initialises the state of a run, and its optimizer.

    It leaves out the networks that are not trained.
    """
    optimizer = optim.make(
        configs.build(optim.Config, c.optim, "optim"), c.loop.num_steps
    )

    fixed = ("dit",) if c.lora.rank else ()
    return jax.jit(states.make_init(objective.networks, optimizer, 0, fixed)), optimizer


def _place(mesh, dtype, *size):
    layout = sharding.named_sharding(mesh, "batch", *(None,) * (len(size) - 1))
    return jax.ShapeDtypeStruct(size, dtype, sharding=layout)


def batch_of(c, mesh, objective: objectives.Denoiser) -> dict:
    """A global batch of a denoiser's run, as sharded shapes."""
    rows, length = c.data.batch_size, c.text.length
    batch = {
        "latents": _place(mesh, jnp.float32, rows, *latent_shape(c)),
        "slots": _place(mesh, jnp.int8, rows, tokens_of(c)),
        "pattern": _place(mesh, jnp.int32, rows),
        "text_mask": _place(mesh, jnp.bool_, rows, length),
    }
    if c.text.frozen:
        width = objective.text_config.dim
        return batch | {"text_states": _place(mesh, jnp.bfloat16, rows, length, width)}
    return batch | {"text_ids": _place(mesh, jnp.int32, rows, length)}


def step_of(c, objective, optimizer):
    """The train step of a run, as a function of state and batch."""
    return steps.make_train_step(
        objective,
        optimizer,
        seed=0,
        num_steps=c.loop.num_steps,
        ema_decay=c.optim.ema_decay,
        accumulation=c.loop.accumulation,
    )


def train_step(c, mesh: jax.sharding.Mesh) -> Forecast:
    """Compiles a denoiser's train step of clips of `sample`'s size.

    Args:
      c: the config of a denoiser.
      mesh: of `meshes.compile_only` devices.

    Raises:
      DoesNotFit: XLA fails to compile it for lack of memory.
      ValueError: a size does not divide over the mesh.
    """
    objective = denoiser_objective(c)
    tokens = tokens_of(c)
    jobs.check_denoiser(mesh, c, objective)
    rows, length = c.data.batch_size, c.text.length
    batch = batch_of(c, mesh, objective)
    flops_of_row = cost.dit_train_flops(
        objective.dit_config, tokens, length, adapted=c.lora.rank > 0
    )
    return _step(c, mesh, objective, batch, float(rows * flops_of_row), rows, tokens)


def _step(c, mesh, objective, batch, model_flops, rows, tokens) -> Forecast:
    make, optimizer = begin(c, objective)
    with jax.set_mesh(mesh):
        state = loop.abstract_state(make, mesh)
        fixed = {
            name: jax.tree.map(
                lambda leaf, layout: leaf.update(sharding=layout),
                shapes,
                objective.networks.layouts()[name],
            )
            for name, shapes in fixed_shapes(c, objective).items()
        }
    state = dataclasses.replace(state, fixed=fixed)
    step = step_of(c, objective, optimizer)
    named = {
        "parameters": state.params,
        "average": state.ema,
        "optimizer": state.opt_state,
        **({"fixed": fixed} if fixed else {}),
    }
    what = f"a step of {rows} rows" + (f" of {tokens:,} tokens" if tokens else "")
    return _compile(
        mesh,
        jax.jit(step, donate_argnums=0),
        (state, batch),
        named,
        what=what,
        model_flops=model_flops,
        rows=rows,
        tokens=tokens,
    )


def sample_step(c, mesh: jax.sharding.Mesh) -> Forecast:
    """Compiles one step of the sampler, for one clip of `sample`'s size per row of devices.

    It is the step of `generate`, with guidance; a clip takes `sample.num_inference_steps`
    of them. Weights are float32, as those of a run (imported bfloat16 weights take half),
    of one expert if there are two. Of the text encoder and the video VAE, which
    `generate` keeps on the device, only the weights are counted.

    Raises:
      DoesNotFit, ValueError: see `train_step`.
    """
    settings, objective = runs.settings(c), denoiser_objective(c)
    config, text_config = objective.dit_config, objective.text_config
    sampler, count = settings.sampler, settings.num_inference_steps
    tokens, rows = tokens_of(c), sharding.logical_axis_size(mesh, "batch")
    sizes = {f"model.dit.{name}": size for name, size in config.sharded_sizes.items()}
    sharding.check_divisible(mesh, sizes)
    steps_of_clip = plans.solver(settings, sampler, count, settings.shift)
    plan = next(samplers.chunks(steps_of_clip, 1))
    guided = settings.guidance_scale != 1
    with jax.set_mesh(mesh):
        graph, weights = network(mesh, lambda rngs: dit.DiT(config, rngs=rngs))
        _, encoder = network(
            mesh, lambda rngs: text_encoder.TextEncoder(text_config, rngs=rngs)
        )
        _, vae = network(
            mesh, lambda rngs: video_vae.VideoVAE(vae_config(c), rngs=rngs)
        )
        noise = _place(mesh, jnp.float32, rows, *latent_shape(c))
        text = {
            "states": _place(
                mesh, c.model.text_encoder.dtype, rows, c.text.length, config.text_dim
            ),
            "mask": _place(mesh, jnp.bool_, rows, c.text.length),
        }

        def start(noise, text):
            return compiled.start_rows(config, noise, text, settings.fps or _FPS, 0.0)

        row = _abstract(mesh, start, noise, text)
        x = row.tokens_bnc
        memory = _abstract(mesh, lambda x: samplers.init_memory(x, sampler), x)
    branches, weights_of = (row,), ()
    if guided:
        branches, weights_of = (row, row), (np.float32(settings.guidance_scale),)
    arguments = (graph, weights, x, memory, plan, branches, weights_of)
    passes = samplers.evaluations(sampler, count) / count * (1 + guided)
    forward = cost.dit_forward_flops(config, tokens, c.text.length)
    return _compile(
        mesh,
        compiled.denoise_chunk,
        arguments,
        {"parameters": weights},
        keywords={"sampler": sampler},
        what=f"a step of the sampler (denoiser only) of {rows} clips of {tokens:,} tokens",
        model_flops=passes * rows * forward,
        rows=rows,
        tokens=tokens,
        runs=count,
        others={"text encoder": encoder, "video VAE": vae},
    )


def decode_chunk(c, mesh: jax.sharding.Mesh) -> Forecast:
    """Compiles the streamed decoding of a chunk of latent frames of `sample`'s size.

    Raises:
      DoesNotFit, ValueError: see `train_step`.
    """
    config = vae_config(c)
    t, h, w, channels = latent_shape(c)
    rows, size = sharding.logical_axis_size(mesh, "batch"), min(streaming.CHUNK, t)
    with jax.set_mesh(mesh):
        layout = streaming.default_spec(mesh, rows, (h, w))
        latents = jax.ShapeDtypeStruct(
            (rows, size, h, w, channels),
            jnp.float32,
            sharding=jax.NamedSharding(mesh, layout),
        )
        graph, weights = network(
            mesh, lambda rngs: video_vae.VideoVAE(config, rngs=rngs)
        )

        def first(weights, latents):
            return nnx.merge(graph, weights).decode_chunk(latents)[1]

        state = _abstract(mesh, first, weights, latents)
    return _compile(
        mesh,
        streaming.decode_chunk,
        (graph, weights, latents, state),
        {"parameters": weights, "past": state},
        what=f"the decoding of {size} latent frames of {rows} clips",
        rows=rows,
        tokens=size * h * w,
        runs=t / size,
    )


def vae_step(c, mesh: jax.sharding.Mesh) -> Forecast:
    """Compiles a video VAE's train step, for the stage with the most voxels.

    A window of the clip's own size has the size of `sample`. LPIPS is left out.

    Raises:
      DoesNotFit, ValueError: see `train_step`.
    """
    weights = configs.build(reconstruction.Weights, c.reconstruction, "reconstruction")
    judge = configs.build(
        discriminator.Config, c.model.discriminator, "model.discriminator"
    )
    objective = reconstruction.Reconstruction(
        vae_config(c), dataclasses.replace(weights, lpips=0.0), judge, lpips.Config()
    )
    rows, whole = (
        c.data.batch_size,
        (c.sample.num_frames, c.sample.height, c.sample.width),
    )
    sharding.check_divisible(mesh, {"data.batch_size": ("batch", rows)})
    batches = []
    for _, crops in transforms.stages(c.data.crops, c.loop.num_steps):
        batch = {}
        for place, crop in enumerate(crops):
            size = [wanted or own for wanted, own in zip(crop.size, whole, strict=True)]
            objective.config.latent_shape(*size)
            batch[f"video{place}"] = _place(
                mesh, jnp.uint8, rows * crop.count, *size, 3
            )
        batches.append(batch)
    batch = max(batches, key=lambda one: sum(math.prod(v.shape) for v in one.values()))
    return _step(c, mesh, objective, batch, None, rows, 0)


def network(mesh, make):
    """A network's definition, and its abstract weights sharded as `generate` does."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def place(variable):
        value = variable.get_value()
        layout = sharding.parameter_spec(variable.get_metadata("axes"), value.shape)
        return variable.replace(
            jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=jax.NamedSharding(mesh, layout)
            )
        )

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return graph, jax.tree.map(place, state, is_leaf=is_variable)


def _abstract(mesh, function, *arguments):
    """The results of a function as sharded shapes."""

    def one(leaf):
        layout = leaf.sharding.spec if leaf.sharding else jax.P()
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, layout)
        )

    return jax.tree.map(one, jax.eval_shape(function, *arguments))


def _compile(
    mesh,
    function,
    arguments,
    named: Mapping[str, Any],
    *,
    what,
    rows,
    tokens,
    keywords=None,
    model_flops=None,
    runs=1.0,
    others=None,
) -> Forecast:
    """Compiles a function for a mesh.

    Args:
      named: the arguments whose memory is listed by name.
      others: by name, what a device holds apart from the arguments.
      The other arguments are those of the function and of `Forecast`.
    """
    kind = chips.kind_of(mesh.devices.flat[0])
    chip = chips.CHIPS[kind]
    sizes = {name: bytes_of(tree) for name, tree in named.items()}
    needed = sum(sizes.values())
    if needed > chip.hbm:
        *first, last = sizes
        names = f"{', '.join(first)} and {last}" if first else last
        raise DoesNotFit(
            f"{names} alone take {needed / GIB:.1f} GiB of the {chip.hbm / GIB:.2f} of a "
            f"device; shard them over {math.ceil(needed * mesh.size / chip.hbm)} devices "
            "or more",
            needed,
        )
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments, **(keywords or {}))
        began = time.monotonic()
        done = _finish(traced.lower())
    seconds = time.monotonic() - began
    program = hlo.parse(done.as_text())
    counted = flops.flops_of(traced.jaxpr.jaxpr, mesh.size)
    slices = {getattr(device, "slice_index", 0) for device in mesh.devices.flat}
    return Forecast(
        what=what,
        kind=kind,
        memory=_memory(done, sizes)
        | {name: bytes_of(tree) for name, tree in (others or {}).items()},
        model_flops=counted if model_flops is None else model_flops,
        program_flops=counted,
        collectives=hlo.exchanges(program),
        work=step_time.work_of(program, chip, chips.REACHED, mesh.size, len(slices)),
        compile_seconds=seconds,
        rows=rows,
        tokens=tokens,
        runs=runs,
        devices=mesh.size,
    )


def _finish(lowered):
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        if "ScopedVmem" in text:
            table = "sora_jax/models/splash_tiles.json" if "splash" in text else "tiles"
            raise KernelDoesNotFit(
                f"a kernel does not fit into VMEM ({table}): "
                f"{' '.join(text.split())[:400]}"
            ) from None
        # The temporaries in this message include the state.
        needed = re.search(r"\(([\d.]+)([MGT])\) exceeds", text)
        raise DoesNotFit(
            " ".join(text.splitlines()[0].split()),
            float(needed[1]) * GIB * _IN_GIB[needed[2]] if needed else 0.0,
        ) from None


def bytes_of(tree: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(done, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a device by kind; donated arguments count once.

    The compiler's count of temporary bytes includes the carries of loops twice; its total
    allocation, by which it accepts or rejects a program, includes them once.
    """
    analysis = done.memory_analysis()
    rest = analysis.argument_size_in_bytes - sum(sizes.values())
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    arguments = analysis.argument_size_in_bytes + results
    return dict(sizes) | {
        "batch": max(0, rest),
        "results": max(0, results),
        "temporary": max(0, analysis.total_allocation_bytes - arguments),
        "program": analysis.generated_code_size_in_bytes,
    }
