"""The job `train` in this process."""

import functools
import pathlib
from unittest import mock

import jax
import pytest

from configs import toy
from sora_jax.training import optim, state, step
from tests import conftest
from tests.training.tiny_job import TINY


@pytest.fixture(scope="module", autouse=True)
def equal_programs_are_traced_once():
    """Runs of equal settings share their step: the time of most is that of tracing it.

    Only within a file, since a process has a limited number of memory maps, and each
    compiled program takes some.
    """
    with (
        mock.patch.object(optim, "make", functools.cache(optim.make)),
        mock.patch.object(state, "make_init", functools.cache(state.make_init)),
        mock.patch.object(
            step, "make_train_step", functools.cache(step.make_train_step)
        ),
    ):
        yield


@pytest.fixture
def start(tmp_path):
    """Starts the job `train` up to its first step; returns what the loop is given."""
    with (
        conftest.lone_job("train") as job,
        mock.patch.object(job.loop, "train") as begun,
    ):

        def call(run, **changes):
            values = TINY | {n.replace("__", "."): v for n, v in changes.items()}
            for name, value in values.items():
                values[name] = str(value) if isinstance(value, pathlib.Path) else value
            c = toy.get_config()
            c.update_from_flattened_dict(values)
            given = {"_CONFIG": c, "_OUT": tmp_path / run}
            flags = {name: mock.Mock(value=value) for name, value in given.items()}
            mesh = jax.sharding.get_mesh()  # the job sets its own
            with mock.patch.multiple(job, **flags), jax.set_mesh(mesh):
                conftest.run_job(job)
            return begun.call_args

        yield call
