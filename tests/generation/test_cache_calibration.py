"""The pipeline with a step cache: what is spared, what stays, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sora_jax.core import mesh
from sora_jax.diffusion import samplers, step_cache, timesteps
from sora_jax.evals.metrics import reconstruction
from sora_jax.evals.prompts import cached_sampling
from sora_jax.generation import cache_calibration, compiled, pipeline
from sora_jax.models import rows as rows_of
from tests.generation import tiny

PROMPTS = {"prompt": ["a dog", "a cat", "x"], "seed": [0, 3, 5]}
STEPS = {"num_inference_steps": 8}
LATENT = PROMPTS | STEPS | {"output_type": "latent"}


def new_pipe(settings=tiny.SETTINGS, **given) -> pipeline.Pipeline:
    return pipeline.Pipeline(
        **tiny.networks(), tokenizer=tiny.Letters(), settings=settings, **given
    )


@pytest.fixture(scope="module")
def calibrated():
    pipe = new_pipe(source={"model": "m", "step": 7})
    done = []
    made = cached_sampling.calibrate(
        pipe, thresholds=(0.0, 0.3, 100.0), note=done.append, **PROMPTS, **STEPS
    )
    # once recorded, once for each schedule
    assert sum(done) == 3 * 8 * (1 + 3) and pipe.calibration == made
    return pipe


def by_hand(pipe, sampler: str, threshold: float) -> np.ndarray:
    """One clip's latents by a loop over steps and branches, without any machinery."""
    request = pipe.check_inputs(prompt="a cat", seed=3, sampler=sampler, **STEPS)
    rows = [0, 0, 0, 0]
    text, null = pipe.encode_prompt(request, rows)
    noise, _ = pipe.prepare_latents(request, rows)
    dit = tiny.networks()["dit"]
    ((reuse, gain),) = pipe.calibration.schedules(threshold)
    asked, kept = iter(zip(reuse, gain, strict=True)), [None, None]

    @jax.jit
    def residual_of(x, level, states, mask):
        """What the blocks add: seen by the head's input with and without them."""
        row = rows_of.of_video(tiny.DIT, x, level, states, mask, fps=8.0)
        nothing = compiled.start_cache(tiny.DIT, *row.tokens_bnc.shape[:2])["residual"]
        return dit(row, dits_reuse(nothing, False, np.ones(4)))[1]

    @jax.jit
    def head_of(x, level, states, mask, residual):
        row = rows_of.of_video(tiny.DIT, x, level, states, mask, fps=8.0)
        found = dit(row, dits_reuse(residual, True, np.ones(4)))[0]
        return rows_of.to_video(found, x.shape[1:4], tiny.DIT.patch)

    def velocity(x, tau):
        spared, gains = next(asked)
        level, found = np.full((4, 1), tau, np.float32), []
        for branch, condition in enumerate((text, null)):
            given = x, level, condition["states"], condition["mask"]
            if spared:
                residual = gains[branch] * kept[branch]
            else:
                residual = kept[branch] = residual_of(*given)
            found.append(head_of(*given, residual))
        with_text, without = found
        return without + 2.0 * (with_text - without)

    plan = samplers.plan(sampler, timesteps.schedule(8, 3.0))
    x, memory = noise, samplers.init_memory(noise, sampler)
    step_of = samplers._STEPS[sampler]
    for i in range(8):
        step = {name: value[i] for name, value in plan.items()}

        def ask(x, level, cache, number):
            return velocity(x, level), None

        with jax.disable_jit():  # so that conditions are Python's
            x, memory, _ = step_of(ask, x, memory, None, step, lambda x: x)
    return np.asarray(x)[0]


def dits_reuse(residual, now, gain):
    from sora_jax.models import dit

    return dit.Reuse(residual, now, gain)


def test_threshold_zero_is_todays_program_and_bits(calibrated, pipe):
    before = compiled.denoise_chunk._cache_size()
    want = pipe(**LATENT).frames
    size = compiled.denoise_chunk._cache_size()
    got = calibrated(**LATENT, step_cache=0.0).frames
    np.testing.assert_array_equal(got, want)
    assert compiled.denoise_chunk._cache_size() <= max(size, before + 1)
    assert "step_cache_digest" not in calibrated.recipe(
        calibrated.check_inputs(prompt="a"), 0
    )
    # A schedule that spares nothing computes the same.
    tiny_error = calibrated(**LATENT, step_cache=1e-9).frames
    assert calibrated.calibration.counts(1e-9) == (8, 8)
    np.testing.assert_allclose(tiny_error, want, atol=1e-5)


def test_a_calibration_records_ratios_and_quality(calibrated):
    made = calibrated.calibration
    ratio = np.asarray(made.ratio)
    assert ratio.shape == np.shape(made.distance) == (1, 8, 2)  # expert, step, branch
    assert np.all(ratio[0, 0] == 1) and np.all(ratio[0, 1:] != 1)
    assert np.all(ratio[0, 1:, 0] != ratio[0, 1:, 1])
    assert np.all(np.asarray(made.distance)[0, 1:] > 0)
    assert made.clips == {"clips": 3, "num_frames": 9, "height": 16, "width": 16}
    exact, some, worst = made.quality
    assert exact.psnr > 60 and exact.computed == 8
    assert exact.psnr > some.psnr >= worst.psnr >= worst.lowest_psnr
    dense, cached = (
        calibrated(**PROMPTS, **STEPS, step_cache=t).frames for t in (0.0, 100.0)
    )
    psnr_n = reconstruction.psnr(dense, cached)
    np.testing.assert_allclose(worst.psnr, psnr_n.mean(), atol=0.01)
    np.testing.assert_allclose(worst.lowest_psnr, psnr_n.min(), atol=0.01)
    text = made.describe(100.0)
    assert f"{worst.computed} of 8 evaluations are computed" in text
    assert f"PSNR {worst.psnr:.1f} dB" in text
    between = made.describe(0.02)
    assert "  0 (8 computed)" in between and "  0.3 (" in between


@pytest.mark.parametrize(
    "sampler", ["euler", pytest.param("heun", marks=pytest.mark.slow), "unipc"]
)
def test_sampling_is_that_of_a_loop_by_hand(calibrated, sampler):
    made = calibrated.calibration
    count = samplers.evaluations(sampler, 8)
    ratio = np.random.default_rng(1).uniform(0.8, 1.1, (1, count, 2)).tolist()
    other = dataclasses.replace(
        made,
        ratio=ratio, deviation=ratio, distance=ratio, quality=(),
        sampling=made.sampling | {"sampler": sampler},
    )  # fmt: skip
    pipe = new_pipe(source=calibrated.source, calibration=other)
    ((reuse, _),) = other.schedules(0.5)
    assert 2 <= reuse.sum() < count - 2
    given = {"prompt": "a cat", "seed": 3, "sampler": sampler, "output_type": "latent"}
    got = pipe(**given, **STEPS, step_cache=0.5).frames[0]
    np.testing.assert_allclose(got, by_hand(pipe, sampler, 0.5), atol=1e-4)
    dense = pipe(**given, **STEPS).frames[0]
    assert np.abs(dense - got).max() > 1e-2


def test_from_changed_latents_the_next_evaluation_is_computed(calibrated):
    """The next evaluation would reuse a residual of the latents before the change."""
    ((reuse, _),) = calibrated.calibration.schedules(100.0)
    assert reuse[6] and not reuse[7]

    def change(pipe, step, tau, tensors):
        if step == 5:
            tensors["latents"][:] = 1.7

    cached, dense = (
        calibrated(**LATENT, step_cache=error, callback_on_step_end=change).frames
        for error in (100.0, 0.0)
    )
    np.testing.assert_allclose(cached, dense, atol=1e-5)


def test_other_schedules_are_not_compiled_again(calibrated):
    calibrated(**LATENT, step_cache=100.0)
    before = compiled.denoise_chunk._cache_size()
    calibrated(**LATENT, step_cache=0.3)
    assert compiled.denoise_chunk._cache_size() == before


def test_a_spared_evaluation_runs_no_block(calibrated):
    """The blocks are in one branch of a condition, and nowhere else in the program."""
    request = calibrated.check_inputs(**PROMPTS, **STEPS, step_cache=0.3)
    (network, scale, plan), *_ = calibrated._stages(request)
    rows = [0, 1, 2, 2]
    text, null = calibrated.encode_prompt(request, rows)
    x, _ = calibrated.prepare_latents(request, rows)
    branches = tuple(
        compiled.start_rows(tiny.DIT, x, given, 8.0, 0.0) for given in (text, null)
    )
    x = branches[0].tokens_bnc
    cache = compiled.start_cache(tiny.DIT, 8, x.shape[1])
    jaxpr = jax.make_jaxpr(
        lambda *given: compiled.denoise_chunk.__wrapped__(
            *network, *given, sampler="euler", cache=cache
        )
    )(x, (), plan, branches, (2.0,))

    def scans(jaxpr, inside=()):
        """Lengths of scans, with the branches of conditions that they stand in."""
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name == "scan":
                yield equation.params["length"], inside
            if name == "cond":
                for number, branch in enumerate(equation.params["branches"]):
                    yield from scans(branch.jaxpr, (*inside, number))
                continue
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from scans(inner, inside)

    found = [where for length, where in scans(jaxpr.jaxpr) if length == 2]
    # one scan over the two blocks: of a step that is not idle (1), not spared (0)
    assert found == [(1, 0)]
    assert calibrated.calibration.counts(0.3)[0] == 8 - plan["reuse"].sum() < 8


@pytest.mark.parametrize(
    "shape", [{"replica": 2, "fsdp": 4}, {"replica": 2, "ring": 2, "tensor": 2}]
)
def test_eight_devices_make_the_same_clips(calibrated, shape):
    given = LATENT | {"step_cache": 0.3, "batch_size": 1}
    one = calibrated(**given).frames
    with jax.set_mesh(mesh.make_mesh(shape)):
        spread = new_pipe(source=calibrated.source, calibration=calibrated.calibration)
        np.testing.assert_allclose(spread(**given).frames, one, atol=1e-4)
        if "ring" in shape:
            return
        again = cached_sampling.calibrate(spread, thresholds=(), **PROMPTS, **STEPS)
    np.testing.assert_allclose(again.ratio, calibrated.calibration.ratio, rtol=1e-4)


def test_a_calibration_is_written_and_read(calibrated, tmp_path):
    made, path = calibrated.calibration, tmp_path / cache_calibration.FILE
    made.save(path)
    found = cache_calibration.read(path)
    assert found == dataclasses.replace(made) and found.digest() == made.digest()
    pipe = new_pipe(source=calibrated.source, calibration=path)
    output = pipe(**LATENT, step_cache=0.3)
    np.testing.assert_array_equal(
        output.frames, calibrated(**LATENT, step_cache=0.3).frames
    )
    recipe = output.recipes[0]
    assert (recipe["step_cache"], recipe["step_cache_digest"]) == (0.3, made.digest())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": "heun"}, "calibrated for sampler 'euler' and not 'heun'"),
        ({"num_inference_steps": 9}, "num_inference_steps 8 and not 9"),
        ({"shift": 4.0}, "shift 3.0 and not 4.0"),
        ({"guidance_scale": 1.0}, "guidance_scale 2.0 and not 1.0"),
        ({"step_cache": -1.0}, "step_cache is -1.0; it must be a number in"),
        ({"step_cache": float("nan")}, "step_cache is nan; it must be a number in"),
    ],
)
def test_what_it_was_not_calibrated_for_is_refused(calibrated, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrated(**PROMPTS | STEPS | {"step_cache": 0.3} | changes)


def test_a_calibration_of_another_model_is_refused(calibrated):
    pipe = new_pipe(
        source={"model": "m", "step": 8}, calibration=calibrated.calibration
    )
    with pytest.raises(ValueError, match="calibrated for step 7 and not 8"):
        pipe(**PROMPTS, **STEPS, step_cache=0.3)
    with pytest.raises(FileNotFoundError, match="is not calibrated"):
        new_pipe()("a cat", step_cache=0.1)
    short = [expert[:-1] for expert in calibrated.calibration.ratio]
    shorter = dataclasses.replace(
        calibrated.calibration, ratio=short, deviation=short, distance=short, quality=()
    )
    pipe = new_pipe(source=calibrated.source, calibration=shorter)
    with pytest.raises(ValueError, match="not of 8 evaluations with .2. branches"):
        pipe(**PROMPTS, **STEPS, step_cache=0.3)


def test_damaged_files_are_refused_with_one_sentence(calibrated, tmp_path):
    path = tmp_path / cache_calibration.FILE
    calibrated.calibration.save(path)
    whole = json.loads(path.read_text())
    first = whole["ratio"][0]
    for damage in (
        "", "[]", "null", "{", path.read_text()[:-20],
        {"ratio": []}, {"ratio": [first[:-1]]}, {"ratio": "x"}, {"ratio": [[["a", "b"]]]},
        {"ratio": [[[-1.0, 1.0]] * 8]}, {"max_skips": 0}, {"max_skips": "2"},
        {"retention": 2}, {"retention": None}, {"clips": {}}, {"clips": 3},
        {"model": None}, {"sampling": 3}, {"quality": [1]}, {"quality": [{"x": 1}]},
        {"quality": 5}, {"more": 1}, "[" * 100_000,
        path.read_text().replace('"retention": 0.2', '"retention": NaN'),
    ):  # fmt: skip
        text = damage if isinstance(damage, str) else json.dumps(whole | damage)
        path.write_text(text)
        with pytest.raises(
            ValueError, match="not a calibration of a step cache .*again"
        ):
            cache_calibration.read(path)


def test_policy_is_the_calibrations(calibrated):
    made = calibrated.calibration
    eager = dataclasses.replace(made, max_skips=7, retention=0.0)
    assert eager.counts(1e6) == (1, 8) and made.counts(1e6)[0] > 1
    assert eager.digest() != made.digest()
    ((reuse, gain),) = eager.schedules(0.3)
    want = step_cache.schedule(made.ratio[0], 0.3, 7, 0.0)
    np.testing.assert_array_equal(reuse, want[0])
    np.testing.assert_array_equal(gain, want[1])


def test_each_expert_begins_with_nothing_kept():
    """Of eight levels the first expert's come first; the second has no guidance here."""
    settings = dataclasses.replace(
        tiny.SETTINGS, boundary=0.7, guidance_scale_2=1.0, num_inference_steps=8
    )
    pipe = new_pipe(settings, dit_2=tiny.networks()["dit"])
    made = cached_sampling.calibrate(pipe, thresholds=(), retention=0.0, **PROMPTS)
    high, low = made.ratio
    assert len(high) + len(low) == 8 and min(len(high), len(low)) > 1
    assert (len(high[0]), len(low[0])) == (2, 1)
    assert high[0] == (1.0, 1.0) and low[0] == (1.0,)
    assert [reuse[0] for reuse, _ in made.schedules(1e6)] == [False, False]
    cached = pipe(**PROMPTS, step_cache=1e2).frames
    dense = pipe(**PROMPTS).frames
    assert 20 < reconstruction.psnr(dense, cached).mean() < 100
