"""Controls of single families of the toy world: clips that do not show what is stated.

`toyworld_controls.py` prints which share of them the oracle passes, which must be none.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sora_jax.toyworld import families, journeys, oracle, physics, render
from sora_jax.toyworld.scene import DIRECTIONS, Scene, find_tier


def _sampled(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A path [T, ...] at other times, by straight lines."""
    flat = values.reshape(len(values), -1)
    found = [np.interp(at, np.arange(len(values)), column) for column in flat.T]
    return np.stack(found, -1).reshape(len(at), *values.shape[1:])


def _whole(scene: Scene, stop: int) -> Scene:
    """What the first frames show, stretched over the whole clip."""
    at = np.linspace(0, stop - 1, scene.num_frames)
    pos, camera = _sampled(scene.pos, at), _sampled(scene.camera, at)
    return dataclasses.replace(scene, pos=pos, camera=camera, later=())


def no_cut(scene: Scene) -> np.ndarray:
    return render.render(_whole(scene, int((scene.camera[:, 3] == 0).sum())))


def other_character(scene: Scene) -> np.ndarray:
    """From the second shot on, by turns of another colour and of another shape."""
    (thing,), tier = scene.objects, find_tier(scene.tier)
    name, values = (("colour", tier.colours), ("shape", tier.shapes))[scene.index % 2]
    at = values.index(getattr(thing, name)) + 1
    other = dataclasses.replace(thing, **{name: values[at % len(values)]})
    other = render.render(dataclasses.replace(scene, objects=(other,)))
    first = scene.camera[:, 3] == 0
    return np.where(first[:, None, None, None], render.render(scene), other)


def same_background(scene: Scene) -> np.ndarray:
    later = (scene.background,) * len(scene.later)
    return render.render(dataclasses.replace(scene, later=later))


def other_order(scene: Scene) -> np.ndarray:
    video, shot = render.render(scene), scene.camera[:, 3]
    return np.concatenate([video[shot == k] for k in range(int(shot[-1]), -1, -1)])


def one_way(scene: Scene) -> np.ndarray:
    turned = np.flatnonzero(np.abs(np.diff(scene.vel[1:, 0], axis=0)).max(axis=1) > 0.1)
    return render.render(_whole(scene, int(turned[0]) + 2))


def other_turns(scene: Scene) -> np.ndarray:
    """Once in place of twice, twice in place of once, or off no edge."""
    pos, steps = scene.pos, scene.num_frames - 1
    kind = scene.truth.events[0].value
    if kind == "bounce":
        middle = scene.size / 2
        pos = middle + 0.4 * (pos - middle)
    else:
        legs = 6 - journeys.LEGS[kind]
        leg, far = steps / legs, pos[steps // journeys.LEGS[kind]]
        t = np.arange(steps + 1)
        out = (1 - abs(1 - (t / leg) % 2))[:, None, None]
        pos = pos[0] + out * (far - pos[0])
    return render.render(dataclasses.replace(scene, pos=pos))


def uneven(scene: Scene) -> np.ndarray:
    """The first half of the way in three tenths of the time."""
    steps = scene.num_frames - 1
    at = np.interp(np.arange(steps + 1) / steps, (0, 0.3, 1), (0, 0.5 * steps, steps))
    return render.render(dataclasses.replace(scene, pos=_sampled(scene.pos, at)))


def not_home(scene: Scene) -> np.ndarray | None:
    """One turn after seven tenths of the time, and the same pace."""
    if scene.truth.events[0].value == "bounce":  # It need not come back.
        return None
    steps, way = scene.num_frames - 1, scene.truth.subjects[0].direction
    t = np.arange(steps + 1)[:, None, None] / steps
    reach = np.ptp(scene.pos, axis=0).max() / np.abs(DIRECTIONS[way]).max()
    out = 1 - abs(0.7 - t) / 0.7
    pos = scene.pos[0] + out * reach * np.array(DIRECTIONS[way])
    return render.render(dataclasses.replace(scene, pos=pos))


def _change(scene: Scene) -> int:
    """The frame at which the camera's motion becomes another one."""
    rate = np.diff(scene.camera[:, :3], axis=0)
    return 1 + int(
        np.argmax(np.abs(np.diff(np.sign(np.round(rate, 3)), axis=0)).sum(1))
    )


def one_move(scene: Scene) -> np.ndarray:
    return render.render(_whole(scene, _change(scene) + 1))


def moves_exchanged(scene: Scene) -> np.ndarray:
    """The second motion of the camera before the first."""
    rate, at = np.diff(scene.camera, axis=0), _change(scene)
    rate = np.concatenate([rate[at:], rate[:at]])
    camera = np.concatenate([np.zeros((1, 4)), np.cumsum(rate, axis=0)])
    camera += (scene.camera - camera).mean(axis=0)
    return render.render(dataclasses.replace(scene, camera=camera))


def moved(scene: Scene, pos: np.ndarray) -> Scene:
    """The scene with other paths [T, K, 2]."""
    return dataclasses.replace(scene, pos=np.round(pos, 4))


def _fallen(scene: Scene, above: Callable[[float, float, int], np.ndarray]) -> Scene:
    """The scene with other heights above the ground, of height, gravity and frames."""
    pos = scene.pos.copy()
    gravity = physics.FALLS[scene.tier].gravity
    ground = scene.size - physics.GROUND
    ground -= physics.below(scene.objects[0].shape) * scene.objects[0].radius
    start = ground - pos[0, 0, 1]
    pos[:, 0, 1] = ground - above(start, gravity, scene.num_frames)
    return moved(scene, pos)


def even_fall(scene: Scene) -> Scene:
    """It comes down at constant speed, and lies still."""

    def above(start: float, gravity: float, frames: int) -> np.ndarray:
        lands = np.sqrt(2 * start / gravity)
        return start * np.maximum(0.0, 1 - np.arange(frames) / lands)

    return _fallen(scene, above)


def other_gravity(scene: Scene) -> Scene:
    """It falls as stated under gravity that is 1.6 times as strong."""
    restitution = physics.RESTITUTION if scene.truth.events[1].happens else 0.0
    return _fallen(
        scene, lambda h, g, frames: physics.heights(h, 1.6 * g, restitution, frames)[0]
    )


def other_end(scene: Scene) -> Scene:
    """It bounces where it should lie still, or the other way round."""
    restitution = 0.0 if scene.truth.events[1].happens else physics.RESTITUTION
    return _fallen(
        scene, lambda h, g, frames: physics.heights(h, g, restitution, frames)[0]
    )


def higher_bounce(scene: Scene) -> Scene:
    """It bounces higher than it fell."""
    return _fallen(scene, lambda h, g, frames: physics.heights(h, g, 1.3, frames)[0])


def ghost(scene: Scene) -> Scene:
    """Two things pass through one another."""
    t = np.arange(scene.num_frames)[:, None, None]
    return moved(scene, scene.pos[0] + t * scene.vel[1])


def both_stop(scene: Scene) -> Scene:
    """Two things stay where they meet."""
    meets = int(np.argmax(np.abs(np.diff(scene.vel, axis=0)).max(axis=(1, 2)) > 0.05))
    pos = scene.pos.copy()
    pos[meets + 1 :] = pos[meets]
    return moved(scene, pos)


def no_push(scene: Scene) -> Scene:
    """The first thing turns back, as if from a wall, and the second goes on."""
    pos, straight = scene.pos.copy(), ghost(scene).pos
    meets = int(np.argmax(np.abs(np.diff(scene.vel, axis=0)).max(axis=(1, 2)) > 0.05))
    pos[:, 1] = straight[:, 1]
    back = np.arange(len(pos) - meets)[:, None]
    pos[meets:, 0] = pos[meets, 0] - back * scene.vel[1, 0]
    return moved(scene, pos)


def sideways_hop(scene: Scene) -> Scene:
    """What falls is pushed to a side where it lands."""
    pos = scene.pos.copy()
    lands = int(np.argmax(pos[:, 0, 1]))
    room = 0.3 * scene.size * np.sign(scene.size / 2 - pos[lands, 0, 0])
    share = np.linspace(0, 1, len(pos) - lands)
    pos[lands:, 0, 0] = pos[lands, 0, 0] + room * share
    return moved(scene, pos)


def there_and_back(scene: Scene) -> Scene:
    """What changes also leaves its place for a while."""
    pos, middle = scene.pos.copy(), scene.size / 2
    away = np.sin(np.linspace(0, np.pi, len(pos)))[:, None]
    reach = 0.25 * scene.size * np.sign(middle - pos[0, 0])
    return moved(scene, pos + (away * reach)[:, None])


def half_way_back(scene: Scene) -> Scene:
    """What has changed changes back in the last quarter of the clip."""
    scale = scene.scale.copy()
    quarter = scene.num_frames // 4
    scale[-quarter:] = scene.scale[:quarter][::-1]
    return dataclasses.replace(scene, scale=scale)


def _rendered(change: Callable[[Scene], Scene]) -> Callable[[Scene], np.ndarray]:
    return lambda scene: render.render(change(scene))


# None of these shows what is stated; None where a scene has no such clip.
CONTROLS: dict[str, dict[str, Callable[[Scene], np.ndarray | None]]] = {
    "shots": {
        "no cut": no_cut,
        "other character in later shots": other_character,
        "same background": same_background,
        "shots in the other order": other_order,
    },
    "to_and_fro": {
        "one way": one_way,
        "other turns": other_turns,
        "uneven": uneven,
        "not home": not_home,
    },
    "camera_path": {"one move": one_move, "moves exchanged": moves_exchanged},
    "gravity": {
        "at constant speed": _rendered(even_fall),
        "gravity x 1.6": _rendered(other_gravity),
        "bounces for lies, lies for bounces": _rendered(other_end),
        "bounces higher": _rendered(higher_bounce),
        "goes aside where it lands": _rendered(sideways_hop),
    },
    "change": {
        "changes back": _rendered(half_way_back),
        "goes there and back": _rendered(there_and_back),
    },
    "collision": {
        "ghosts": _rendered(ghost),
        "both stop": _rendered(both_stop),
        "no push": _rendered(no_push),
    },
}


def controls(
    tier: str, family: str, clips: int, split: str = "test"
) -> dict[str, tuple[float, float]]:
    """Returns pass rates of the family's own controls with their expected values."""
    scenes = [families.scene(tier, split, i, {family: 1.0}) for i in range(clips)]
    found = {}
    for name, change in CONTROLS.get(family, {}).items():
        clips_of = [(scene, change(scene)) for scene in scenes]
        passed = [
            oracle.score(scene, video)["pass"]
            for scene, video in clips_of
            if video is not None
        ]
        found[name] = (float(np.mean(passed)), 0.0)
    return found
