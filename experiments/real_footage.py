"""Compares the video VAE with principal components of the same size on real footage.

    python -m experiments.real_footage --clips FOLDER --out runs/real [--num_steps 1500]

The last second of every video is held out. The VAE is trained on random crops of the rest.
The principal components are fitted on blocks of the rest, of the size that a latent covers
in time, height and width, and are as many as the VAE's latent channels (blocks of one
frame for the first frame, as in the VAE). Both reconstruct the complete last second.
Writes scores.json and side_by_side.png: original, VAE, principal components.

Letters: n blocks, t time, h height, w width, c channels, k components.
"""

import argparse
import contextlib
import json
import math
import pathlib

import jax
import numpy as np
from PIL import Image

from sora_jax.core import job, paths
from sora_jax.core import mesh as meshes
from sora_jax.data import video_io
from sora_jax.evals.metrics import reconstruction as evaluation
from sora_jax.models import video_vae
from sora_jax.training import loop, optim, principal, reconstruction

FPS = 24.0
CROP = (21, 48, 48)  # frames, height, width
VAE = video_vae.Config(
    latent_channels=16,
    patch_size=4,
    base_dim=64,
    channel_multipliers=(1, 1, 1),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    spatial_downsample=(False, True),
    linear_channels=16,
)


def read(folder: pathlib.Path, size: tuple[int, int]) -> list[np.ndarray]:
    """Reads at most ten seconds of each video of a folder at FPS: uint8 [t, h, w, 3]."""
    found = []
    for path in sorted(folder.glob("*.mp4")):
        seconds = np.arange(0, min(video_io.probe(path).seconds, 10), 1 / FPS)
        found.append(np.stack([*video_io.sample(path, seconds, size)]))
    if not found:
        raise SystemExit(f"real_footage: {folder} has no mp4 file")
    return found


def split(video_thwc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits off the last second: 1 + 4n frames."""
    held = 1 + 4 * int((FPS - 1) // 4)
    return video_thwc[:-held], video_thwc[-held:]


def by_components(train: list, held_thwc: np.ndarray, config) -> np.ndarray:
    """Reconstructs the held-out second from principal components of the VAE's size."""
    space, k, parts = config.spatial_stride, config.latent_channels, []
    for time, frames in ((1, held_thwc[:1]), (config.temporal_stride, held_thwc[1:])):
        sample = [
            principal.blocks(video[phase:], time, space)
            for video in train
            for phase in range(time)
        ]
        mean_m, basis_mk, _ = principal.components(np.concatenate(sample), k)
        numbers_nk = (principal.blocks(frames, time, space) - mean_m) @ basis_mk
        parts.append(unblock(numbers_nk @ basis_mk.T + mean_m, frames.shape, time))
    return np.concatenate(parts)


def unblock(blocks_nm: np.ndarray, shape: tuple[int, ...], time: int) -> np.ndarray:
    """Inverts `principal.blocks`."""
    t, h, w, c = shape
    space = math.isqrt(blocks_nm.shape[1] // (c * time))
    x = blocks_nm.reshape(t // time, h // space, w // space, c, time, space, space)
    return x.transpose(0, 4, 1, 5, 2, 6, 3).reshape(shape)


def crops(train: list, batch_size: int):
    """Returns a source of batches for the loop: random crops, a function of the step."""

    def batches(start):
        def rows():
            step = start
            while True:
                random = np.random.default_rng(step)
                picked = []
                for _ in range(batch_size):
                    video = train[random.integers(len(train))]
                    room = np.array(video.shape[:3]) - CROP + 1
                    t, h, w = random.integers(0, room)
                    crop = video[t : t + CROP[0], h : h + CROP[1], w : w + CROP[2]]
                    # Mirrored and reversed crops are valid videos too.
                    time, width = 1 - 2 * random.integers(0, 2, size=2)
                    picked.append(crop[::time, :, ::width])
                yield {"video": np.stack(picked)}
                step += 1

        return contextlib.nullcontext(rows())

    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--num_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--size", default="320x176", help="width and height")
    args = parser.parse_args()
    videos = read(args.clips, job.parse_size(args.size))
    parts = [split(video) for video in videos]
    train = [part[0] for part in parts]
    held = np.stack([part[1] for part in parts])
    objective = reconstruction.Reconstruction(
        VAE, reconstruction.Weights(l1=0.0, mse=10.0, bands=0.0)
    )
    evaluator = evaluation.Reconstruction(VAE, held, batch_size=1)
    mesh = meshes.make_mesh()
    with jax.set_mesh(mesh):
        state = loop.train(
            loop.Config(
                num_steps=args.num_steps,
                log_every=20,
                eval_every=250,
                checkpoint_every=250,
            ),
            optim.Config(
                learning_rate=5e-3,
                muon_learning_rate=0.03,
                momentum=0.9,
                warmup_steps=20,
                ema_decay=0.99,
                learning_rate_factors=(("^vae.linear", 0.0),),
            ),
            objective,
            crops(train, args.batch_size),
            seed=0,
            folder=args.out,
            mesh=mesh,
            initial=lambda: {"vae": {"linear": principal.linear_codec(train, VAE)}},
            evaluators={"held_out": evaluator},
        )
        vae = evaluator.reconstruct(state.ema["vae"])[0]
    truth = held.astype(np.float32) / 255
    train = [video.astype(np.float32) / 255 for video in train]
    components = np.stack([by_components(train, clip, VAE) for clip in truth])
    components = np.clip(components, 0, 1)
    scores = {
        name: {
            "psnr": float(np.mean(evaluation.psnr(truth, found))),
            "ssim": float(np.mean(evaluation.ssim(truth, found))),
            "flicker": float(np.mean(evaluation.flicker(truth, found))),
        }
        for name, found in (("vae", vae), ("principal_components", components))
    }
    text = json.dumps(scores, indent=1) + "\n"
    paths.write_atomically(args.out / "scores.json", text)
    shown = [0, held.shape[1] // 2, held.shape[1] - 1]
    sheet = np.concatenate(
        [np.concatenate([x[0, t] for x in (truth, vae, components)], 1) for t in shown]
    )
    Image.fromarray(np.round(sheet * 255).astype(np.uint8)).save(
        args.out / "side_by_side.png"
    )
    print(text)


if __name__ == "__main__":
    main()
