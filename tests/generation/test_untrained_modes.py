"""What Wan's weights do without training, beside plain NumPy loops of each method.

The loops are written from the papers. They call the denoiser as a black box, a function
of latents and a level, and know nothing of rows, chunks or compiled steps. Latents may
differ by 1e-4 of their largest value; a method that is wrong differs by far more.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh, rng
from sora_jax.data import regions
from sora_jax.diffusion import timesteps
from sora_jax.generation import compiled, pipeline, tasks, wan, windows
from sora_jax.models import rows
from sora_jax.training import pretrained
from tests.training import tiny_folder

BAR, WRONG = 1e-4, 1e-2
STEPS, GUIDANCE, SHIFT, SEED = 4, 3.0, 5.0, 3
PROMPT, OTHER = "a red circle moves left", "a blue square"
GRID = (3, 4, 4)  # latents of 9 frames of 32 x 32 pixels


def attentive(dit):
    """The denoiser with sharp attention, so that text and positions matter."""
    graph, state = nnx.split(dit)

    def scaled(path, leaf):
        is_norm = {"norm_q", "norm_k"} & {getattr(key, "key", None) for key in path}
        return 10 * leaf if is_norm else leaf

    return nnx.merge(graph, jax.tree.map_with_path(scaled, state))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tiny_folder.write(tmp_path_factory.mktemp("wan") / "folder")
    found = wan.parts(pretrained.open_folder(folder), "float32")
    found["dit"] = attentive(found["dit"])
    assert found["settings"].trained_patterns == ("none",)
    found["settings"] = dataclasses.replace(
        found["settings"], num_frames=9, height=32, width=32, chunk_steps=3,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, sampler="euler",
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def pipe(parts):
    return pipeline.Pipeline(**parts)


@pytest.fixture(scope="module")
def velocity_of(parts, pipe):
    """Makes the guided velocity of a text: (x [1, t, h, w, c], tau) -> the shape of x."""

    @jax.jit
    def branch(x_bthwc, tau, text, first_is_clean):
        known_bthw = jnp.zeros(x_bthwc.shape[:4], bool).at[:, 0].set(first_is_clean)
        row = rows.of_video(
            tiny_folder.DIT, x_bthwc, jnp.stack([tau, 0.0])[None], **text,
            known_bn=rows.known_tokens(known_bthw, tiny_folder.DIT.patch),
        )  # fmt: skip
        return rows.to_video(
            parts["dit"](row), x_bthwc.shape[1:4], tiny_folder.DIT.patch
        )

    def make(text, guidance=GUIDANCE, first_is_clean=False):
        request = pipe.check_inputs(prompt=text)
        found = pipe.encode_prompt(request, [0])
        given, null = (
            {"text_bld": one["states"], "text_mask_bl": one["mask"]} for one in found
        )

        def velocity(x, tau):
            with_text, without = (
                np.asarray(
                    branch(np.float32(x), np.float32(tau), one, first_is_clean),
                    np.float64,
                )
                for one in (given, null)
            )
            return without + guidance * (with_text - without)

        return velocity

    return make


def film(frames=9, height=32, width=32):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (frames, height, width, 3), np.uint8)


def encoded(pipe, video):
    frames = video[None].astype(np.float32) / 127.5 - 1
    return np.asarray(pipe.encode(frames), np.float64)


def clip_noise(grid=GRID):
    """The noise of the clip of this seed, which a task must use too."""
    drawn = jax.random.normal(rng.key(SEED, "noise"), (*grid, 4))
    return np.asarray(drawn, np.float64)[None]


def levels(sampler="euler", first=1.0):
    """The levels of diffusers' schedulers: n + 1 of the solver, n of the network."""
    taus, network = timesteps.diffusers_schedule(sampler, STEPS, SHIFT)
    begin = sum(taus[:-1] > np.float32(first))
    return taus[begin:].astype(np.float64), network[begin:]


def latents_of(pipe, task, monkeypatch, prompt=PROMPT, **arguments):
    """The latents that a task decodes, which it does not do here."""
    seen = []

    def decode(latents_bthwc):
        seen.append(np.asarray(latents_bthwc))
        b, t, h, w, _ = latents_bthwc.shape
        return np.zeros((b, 1 + 4 * (t - 1), 8 * h, 8 * w, 3), np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "decode_latents", decode)
        pipe.run(task, prompt, seed=SEED, **arguments)
    return seen[-1]


def difference(found, wanted):
    """The largest difference, as a share of the largest value."""
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def check(name, found, wanted, wrong):
    """Compares with the statement of a method, and with one that is wrong on purpose."""
    error, other = difference(found, wanted), difference(found, wrong)
    print(f"{name}: {error:.1e}; a wrong method: {other:.1e}")
    assert error <= BAR
    assert other > WRONG


def euler(velocity, x, taus, network, put=lambda x, tau: x):
    """Euler's method; `put` changes x whenever it has come to a level."""
    x = put(x, taus[0])
    for tau, following, level in zip(taus[:-1], taus[1:], network, strict=True):
        x = put(x + (following - tau) * velocity(x, level), following)
    return x


def heun(velocity, x, taus, network, put=lambda x, tau: x):
    """Heun's method, of which the step to level 0 is Euler's."""
    x = put(x, taus[0])
    for tau, following, level in zip(taus[:-1], taus[1:], network, strict=True):
        slope = velocity(x, level)
        guess = put(x + (following - tau) * slope, following)
        if following > 0:
            mean = (slope + velocity(guess, following)) / 2
            guess = put(x + (following - tau) * mean, following)
        x = guess
    return x


def unipc(velocity, x, taus, network, put=lambda x, tau: x):
    """UniPC of order 2 with B(h) = e^h - 1, for estimates of the data (2302.04867)."""

    def log_snr(tau):
        return np.log((1 - tau) / tau)

    def moved(x, data, tau, following, corrections):
        """x_t of equations 5 and 8, with the sum over estimates given."""
        if following == 0:
            return data
        h = log_snr(following) - log_snr(tau)
        drift = (1 - following) * np.expm1(-h)
        return following / tau * x - drift * (data + corrections)

    x, old = put(x, taus[0]), []  # levels, estimates of the data, and x there
    for step, level in enumerate(network):
        tau = taus[step]
        data = x - tau * velocity(x, level)
        if step:  # the corrector repeats the last step with this estimate
            before, m_0, last = old[-1]
            h = log_snr(tau) - log_snr(before)
            phi = np.expm1(-h) / -h - 1
            if step == 1:
                sum_of = 0.5 * (data - m_0)
            else:
                ratio = (log_snr(old[-2][0]) - log_snr(before)) / h
                targets = [phi / np.expm1(-h), 2 * (phi / -h - 0.5) / np.expm1(-h)]
                a, b = np.linalg.solve([[1, 1], [ratio, 1]], targets)
                sum_of = a * (old[-2][1] - m_0) / ratio + b * (data - m_0)
            x = put(moved(last, m_0, before, tau, sum_of), tau)
        following, sum_of = taus[step + 1], 0.0
        if step and step < len(network) - 1:
            h = log_snr(following) - log_snr(tau)
            ratio = (log_snr(old[-1][0]) - log_snr(tau)) / h
            sum_of = 0.5 * (old[-1][1] - data) / ratio
        old.append((tau, data, x))
        x = put(moved(x, data, tau, following, sum_of), following)
    return x


SOLVERS = {"euler": euler, "heun": heun, "unipc": unipc}


@pytest.mark.parametrize("sampler", SOLVERS)
def test_the_solvers_of_this_file(pipe, velocity_of, sampler):
    """Without a mode they make what the pipeline makes from text."""
    out = pipe(PROMPT, seed=SEED, sampler=sampler, output_type="latent").frames
    wanted = SOLVERS[sampler](velocity_of(PROMPT), clip_noise(), *levels(sampler))
    wrong = euler if sampler != "euler" else heun
    other = wrong(velocity_of(PROMPT), clip_noise(), *levels(sampler))
    check(sampler, out, wanted, other)


def test_variations_are_those_of_sdedit(pipe, velocity_of, monkeypatch):
    """arXiv 2108.01073: noise the video to a level, and solve from there."""
    video, strength = film(), 0.9
    taus, network = levels(first=strength)
    assert len(network) < STEPS and taus[0] <= strength

    def sdedit(from_level):
        x = (1 - from_level) * encoded(pipe, video) + from_level * clip_noise()
        return euler(velocity_of(PROMPT), x, taus, network)

    found = latents_of(pipe, "vary", monkeypatch, video=video, strength=strength)
    check("SDEdit", found, sdedit(taus[0]), sdedit(1.0))


def test_edits_are_those_of_flowedit(pipe, velocity_of, monkeypatch):
    """arXiv 2412.08629, algorithm 1, with n_avg 1."""
    video, strength = film(), 0.95
    source, taus = encoded(pipe, video), levels(first=strength)[0]
    new, old = velocity_of(PROMPT), velocity_of(OTHER, guidance=1.5)

    def noise(tau):
        number = jnp.round(np.float32(tau) * 2**20).astype(jnp.int32)
        key = jax.random.fold_in(rng.key(SEED, "edit noise"), number)
        tokens_bnc = jax.random.normal(key, (12, 16))[None]
        return np.asarray(rows.to_video(tokens_bnc, GRID, (1, 2, 2)), np.float64)

    def flow_edit(old):
        z = source
        for tau, following in zip(taus[:-1], taus[1:], strict=True):
            noised = (1 - tau) * source + tau * noise(tau)
            change = new(z + noised - source, tau) - old(noised, tau)
            z = z + (following - tau) * change
        return z

    found = latents_of(
        pipe, "edit", monkeypatch, video=video, source=OTHER, strength=strength,
        source_guidance_scale=1.5,
    )  # fmt: skip
    unguided = velocity_of(OTHER, guidance=1.0)
    check("FlowEdit", found, flow_edit(old), flow_edit(unguided))


def test_a_first_frame_is_known_where_the_model_takes_it(
    parts, velocity_of, monkeypatch
):
    """As TI2V-5B: a clean first latent at level 0 at every step."""
    settings = dataclasses.replace(
        parts["settings"], takes_images=True, trained_patterns=("none", "first_frame")
    )
    pipe = pipeline.Pipeline(**parts | {"settings": settings})
    image = film(1)
    first = encoded(pipe, image)

    def put(x, tau):
        return np.concatenate([first, x[:, 1:]], axis=1)

    found = latents_of(pipe, "keyframes", monkeypatch, images=image, at=[0])
    wanted, noisy = (
        euler(velocity_of(PROMPT, first_is_clean=clean), clip_noise(), *levels(), put)
        for clean in (True, False)
    )
    np.testing.assert_array_equal(found[:, :1], np.float32(first))
    check("first frame", found, wanted, noisy)


def blended(pipe, velocity, video, kept_thw, sampler):
    """RePaint and Blended Latent Diffusion (2201.09865, 2206.02779), without resampling.

    After each step the latents that are kept are those of the video, noised to the level.
    Returns the latents, and those of a solver that leaves them alone.
    """
    shown = regions.blanked(video, kept_thw)
    clean = encoded(pipe, shown)
    known = regions.of_latents(kept_thw, 8, 4)[None, ..., None]
    noise = clip_noise(clean.shape[1:4])

    def put(x, tau):
        return np.where(known, (1 - tau) * clean + tau * noise, x)

    solver = functools.partial(SOLVERS[sampler], velocity, noise, *levels(sampler))
    return solver(put), np.where(known, clean, solver())


@pytest.mark.parametrize("sampler", SOLVERS)
def test_inpainting_is_blending(pipe, velocity_of, monkeypatch, sampler):
    video, kept = film(), np.ones((9, 32, 32), bool)
    kept[:, 4:, 17:20] = False
    kept[5:, :20, 8:] = False
    known = regions.of_latents(kept, 8, 4)
    tokens = known.reshape(3, 2, 2, 2, 2).mean((2, 4))
    assert {0.5, 1.0} <= {*tokens.ravel()}  # a token may be known in part
    found = latents_of(
        pipe, "inpaint", monkeypatch, video=video, mask=~kept, sampler=sampler
    )
    wanted, free = blended(pipe, velocity_of(PROMPT), video, kept, sampler)
    clean = encoded(pipe, regions.blanked(video, kept))
    np.testing.assert_array_equal(found[0][known], np.float32(clean)[0][known])
    check(f"inpaint, {sampler}", found, wanted, free)


def test_outpainting_is_blending(pipe, velocity_of, monkeypatch):
    video = film(9, 16, 32)
    kept, canvas = np.zeros((9, 32, 32), bool), np.zeros((9, 32, 32, 3), np.uint8)
    kept[:, 8:24], canvas[:, 8:24] = True, video
    found = latents_of(pipe, "outpaint", monkeypatch, video=video, height=32, width=32)
    check("outpaint", found, *blended(pipe, velocity_of(PROMPT), canvas, kept, "euler"))


def test_kept_pixels_come_back_as_they_were(pipe):
    video, mask = film(), np.zeros((32, 32), bool)
    mask[3:20, 5:30] = True
    out = pipe.run("inpaint", [PROMPT, OTHER], seed=SEED, video=video, mask=mask)
    frames = np.round(out.frames * 255).astype(np.uint8)
    np.testing.assert_array_equal(frames[:, :, ~mask], np.stack([video[:, ~mask]] * 2))
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("sampler", SOLVERS)
def test_blended_latents_stay_on_their_path(pipe, monkeypatch, sampler):
    """Also with guidance's rescaling, which changes velocities."""
    seen, chunk = [], compiled.denoise_chunk
    video, mask = film(), np.zeros((9, 32, 32), bool)
    mask[:, :, 16:] = True

    def spying(*arguments, **named):
        x_bnc, *rest = chunk(*arguments, **named)
        video = rows.to_video(x_bnc, GRID, tiny_folder.DIT.patch)
        seen.append((float(arguments[4]["next"][-1]), np.asarray(video)))
        return x_bnc, *rest

    monkeypatch.setattr(compiled, "denoise_chunk", spying)
    arguments = {"video": video, "mask": mask, "sampler": sampler}
    pipe.run("inpaint", PROMPT, seed=SEED, guidance_rescale=0.7, **arguments)
    assert len(seen) == 2 and seen[0][0] > 0.02 and seen[1][0] == 0
    clean = encoded(pipe, regions.blanked(video, ~mask))
    known = regions.of_latents(~mask, 8, 4)
    for tau, found in seen:
        there = (1 - tau) * clean + tau * clip_noise()
        np.testing.assert_allclose(found[0][known], there[0][known], atol=1e-4)
        assert np.abs(found[0][~known] - there[0][~known]).max() > 0.1


def rolled(solver, velocity, grid, sampler, skip):
    """Mobius (2502.20307): the circle is rolled further at each step of the solver."""
    taus, network = levels(sampler)
    numbers = {np.float32(level): k for k, level in enumerate(network)}

    def of_circle(x, level):
        offset = numbers[np.float32(level)] * skip % grid[0]
        turned = np.concatenate([x[:, offset:], x[:, :offset]], axis=1)
        found, back = velocity(turned, level), grid[0] - offset
        return np.concatenate([found[:, back:], found[:, :back]], axis=1)

    return solver(of_circle, clip_noise(grid), taus, network)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_loop_is_a_circle_that_is_rolled(pipe, velocity_of, monkeypatch, sampler):
    grid = (5, *GRID[1:])
    found = latents_of(pipe, "loop", monkeypatch, num_frames=21, sampler=sampler)
    np.testing.assert_array_equal(found[:, :5], found[:, -5:])  # a lap before the last
    wanted, still = (
        rolled(SOLVERS[sampler], velocity_of(PROMPT), grid, sampler, skip)
        for skip in (2, 0)
    )
    check(f"loop, {sampler}", found[:, -5:], wanted, still)


def test_a_circle_is_rolled_on_where_another_expert_takes_over(
    parts, pipe, monkeypatch
):
    """Two experts of the same weights are one denoiser; chunks are of three steps."""
    settings = dataclasses.replace(parts["settings"], boundary=0.9)
    assert sum(levels()[1] >= 0.9) == 2
    two = pipeline.Pipeline(**parts | {"dit_2": parts["dit"], "settings": settings})
    told = []
    found, wanted = (
        latents_of(one, "loop", monkeypatch, num_frames=21, progress=told.append)
        for one in (two, pipe)
    )
    assert difference(found, wanted) <= BAR
    assert told == [2, 2, 3, 1]


@pytest.mark.parametrize("frames", range(1, 40))
def test_every_latent_of_a_circle_is_once_the_first(frames):
    step = compiled.circle_step(frames)
    assert {k * step % frames for k in range(frames)} == {*range(frames)}
    assert step <= frames / 2 and (frames < 7 or step > frames / 4)


def test_a_loop_has_no_seam(pipe):
    """What comes after its last frame is its first, as one more lap would show."""
    made = []

    class Spying(windows.Windows):
        def decode_loop(self, latents_bthwc):
            loop = super().decode_loop(latents_bthwc)
            made.append((self.decode(jnp.tile(latents_bthwc, (1, 8, 1, 1, 1))), loop))
            return loop

    request = pipe.check_inputs(prompt=PROMPT, num_frames=21)
    text, null = pipe.encode_prompt(request, [0])
    tasks.loop(Spying(pipe, request, [0], text, null))
    ((long, loop),) = made
    assert loop.shape == (1, 20, 32, 32, 3) and long.shape[1] == 1 + 4 * (8 * 5 - 1)
    for lap in (long[:, -40:-20], long[:, -20:]):
        assert np.abs(lap.astype(int) - loop).mean() < 0.1
    cold = np.abs(long[:, 1:20].astype(int) - loop[:, 1:])
    assert cold.mean() > 1  # without a lap before it


@pytest.mark.parametrize("shape", [{"replica": 1}, {"fsdp": 2, "ring": 2}])
def test_modes_on_a_mesh(parts, pipe, monkeypatch, shape):
    video, mask = film(), np.zeros((32, 32), bool)
    mask[:, 16:] = True
    asked = {"inpaint": {"video": video, "mask": mask}, "loop": {"num_frames": 21}}
    devices = jax.devices()[: math.prod(shape.values())]
    with jax.set_mesh(mesh.make_mesh(shape, devices)):
        spread = pipeline.Pipeline(**parts)
        found = {t: latents_of(spread, t, monkeypatch, **a) for t, a in asked.items()}
    for task, arguments in asked.items():
        wanted = latents_of(pipe, task, monkeypatch, **arguments)
        assert difference(found[task][:1], wanted) <= BAR, task


def test_what_needs_training_is_refused_by_name(pipe):
    """And what does not is not refused."""
    inputs = {
        "keyframes": {"images": film(2), "at": [0, 8]},
        "extend": {"video": film(), "frames": 4},
        "extend_backwards": {"video": film(), "frames": 4},
        "connect": {"video": film(), "video_2": film(), "frames": 3},
        "replace": {"video": film(), "first": 3, "last": 5},
        "fill": {"video": film()},
        "inpaint": {"video": film(), "mask": np.ones((32, 32), bool)},
        "outpaint": {"video": film(), "height": 48, "width": 48},
        "vary": {"video": film()},
        "edit": {"video": film(), "source": OTHER},
        "loop": {},
        "reference": {"references": film(1)},
        "blend": {"video": film(), "video_2": film()},
    }
    assert inputs.keys() == tasks.TASKS.keys()
    refused = set()
    for task, given in inputs.items():
        try:
            pipe.check_task(task, PROMPT, **given)
        except ValueError as error:
            assert f"task {task!r} needs a denoiser that was trained with" in str(error)
            refused.add(task)
    assert refused == {
        *("keyframes", "extend", "extend_backwards", "connect", "replace", "fill"),
        "reference",
    }
