"""What tokens show: checked against the pixels and the exact optical flow."""

import numpy as np
import pytest

from sora_jax.toyworld import families, render, tokens
from sora_jax.toyworld.scene import SHAPES

GRID, STRIDE = (3, 4, 4), 4  # of tw32: 9 frames, tokens of 8 x 8 pixels


def scenes(family, count=20):
    return [families.scene("tw32", "train", i, {family: 1.0}) for i in range(count)]


def by_token(pixels_Thw):
    """The mean over the pixels and frames of each token."""
    cells = pixels_Thw.reshape(len(pixels_Thw), 4, 8, 4, 8).mean((2, 4))
    return np.stack([cells[:1].mean(0), cells[1:5].mean(0), cells[5:].mean(0)])


@pytest.mark.parametrize("family", families.BASIC)
def test_a_token_shows_a_thing_where_there_are_coloured_pixels(family):
    for scene in scenes(family):
        found = tokens.shown(scene, GRID, STRIDE)
        assert found.shape_thw.shape == GRID and found.shape_thw.dtype == np.int8
        video = render.render(scene).astype(int)
        coloured = by_token((np.ptp(video, axis=-1) > 45).astype(float))
        thing = found.shape_thw != tokens.NOTHING
        assert thing.any((1, 2)).all()
        # A disc stands for the shape, which a cross fills by half only.
        assert np.all(thing[coloured > 0.35]), scene.index
        assert not np.any(thing[coloured == 0] & (coloured.max() > 0.9))
        names = {SHAPES[k - 1] for k in np.unique(found.shape_thw) if k}
        assert names == {thing.shape for thing in scene.objects}
        pairs = {*zip(found.shape_thw[thing], found.colour_thw[thing], strict=True)}
        assert pairs <= {
            (1 + SHAPES.index(o.shape), 1 + tokens.COLOURS.index(o.colour))
            for o in scene.objects
        }
        assert not found.colour_thw[~thing].any()


def test_of_two_things_each_token_shows_the_nearer():
    for scene in scenes("relation"):
        found = tokens.shown(scene, GRID, STRIDE).shape_thw[0]
        for k, thing in enumerate(scene.objects):
            x, y = (int(v // 8) for v in scene.pos[0, k])
            assert found[y, x] == 1 + SHAPES.index(thing.shape)


def test_things_move_as_they_do():
    for scene in scenes("motion"):
        found = tokens.shown(scene, GRID, STRIDE)
        thing = found.shape_thw != tokens.NOTHING
        wanted = np.broadcast_to(scene.vel[0, 0], found.motion_thw2[thing].shape)
        np.testing.assert_allclose(found.motion_thw2[thing], wanted, atol=1e-3)
        assert not found.motion_thw2[~thing].any()


def test_under_a_moving_camera_tokens_move_as_the_optical_flow():
    seen = 0
    for scene in scenes("camera", 40):
        flow, _ = render.flow(
            scene
        )  # between frames; the first step stands for frame 0
        flow = np.concatenate([flow[:1], flow])
        flow = np.stack([by_token(flow[..., k]) for k in (0, 1)], -1)
        found = tokens.shown(scene, GRID, STRIDE)
        # A thing under a zoom moves as its centre does, not as each of its parts.
        atol = 0.5 if "zoom" in scene.factors["camera"] else 0.02
        nothing = found.shape_thw == tokens.NOTHING
        np.testing.assert_allclose(found.motion_thw2, flow, atol=atol)
        np.testing.assert_allclose(
            found.motion_thw2[nothing], flow[nothing], atol=min(atol, 0.15)
        )
        seen += np.abs(flow).max() > 0.5
    assert seen > 10


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="9 frames has no 2 latent frames of 4"):
        tokens.shown(scenes("count", 1)[0], (2, 4, 4), STRIDE)
