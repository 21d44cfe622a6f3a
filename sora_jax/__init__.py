"""Text-to-video diffusion on JAX: compress, diffuse, recaption, measure."""

__version__ = "0.1.0"
