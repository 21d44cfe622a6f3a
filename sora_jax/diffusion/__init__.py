"""Rectified flow: noise levels, known tokens, guidance, samplers. Pure functions."""
