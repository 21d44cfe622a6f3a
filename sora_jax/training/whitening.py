"""Whitening of a video VAE's latents: their variances are evened out.

Letters: c latent channels.
"""

from collections.abc import Mapping

import jax
import numpy as np

from sora_jax.models import video_vae


def check(config: video_vae.Config, share: float) -> None:
    """Raises ValueError where latents cannot be whitened."""
    if share and config.linear_channels:
        raise ValueError(
            f"model.latent_whitening is {share:g}, but the channels of a linear codec "
            "(model.vae.linear_channels) are decoded as they are: set one of them to 0"
        )


def whitened(
    params: Mapping, config: video_vae.Config, covariance_cc: np.ndarray, share: float
) -> tuple[dict, np.ndarray, float]:
    """Evens out the variances of the latent space, without changing what is decoded.

    The eigenvalues of the latents' covariance C can differ by a factor of hundreds, and
    what the small ones hold, such as shapes, then weighs little in a denoiser's loss.
    Latents z become C^(-share / 2) z, whose covariance is C^(1 - share). The map and its
    inverse are multiplied into the 1 x 1 convolutions at the two ends of the latents, so
    the VAE keeps its architecture. The log variances stay those of the old channels;
    only training samples with them.

    Args:
      params: the VAE's parameters.
      config: its sizes.
      covariance_cc: of the latents.
      share: 1: all directions get the same variance.

    Returns:
      The new parameters, the map, and the root mean square of the new deviations.
    """
    check(config, share)
    c = config.latent_channels
    values_c, basis_cc = np.linalg.eigh(covariance_cc)
    values_c = np.maximum(values_c, 1e-8 * values_c.max())
    map_cc = (basis_cc * values_c ** (-share / 2)) @ basis_cc.T
    inverse_cc = (basis_cc * values_c ** (share / 2)) @ basis_cc.T
    quant, post = (
        {name: np.asarray(leaf, np.float64) for name, leaf in params[layer].items()}
        for layer in ("quant_conv", "post_quant_conv")
    )
    # y = x W + b for row vectors; the first c outputs are the means.
    quant["kernel"][:, :c] = quant["kernel"][:, :c] @ map_cc.T
    quant["bias"][:c] = map_cc @ quant["bias"][:c]
    post["kernel"] = inverse_cc.T @ post["kernel"]
    changed = {"quant_conv": quant, "post_quant_conv": post}
    changed = jax.tree.map(lambda leaf: leaf.astype(np.float32), changed)
    std = float(np.sqrt(np.mean(values_c ** (1 - share))))
    return dict(params) | changed, map_cc, std
