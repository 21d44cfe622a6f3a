"""The pipeline that the tests of this room share, compiled once."""

import pytest

from sora_jax.generation import pipeline
from tests.generation import tiny


@pytest.fixture(scope="session")
def pipe() -> pipeline.Pipeline:
    return pipeline.Pipeline(
        **tiny.networks(), tokenizer=tiny.Letters(), settings=tiny.SETTINGS
    )
