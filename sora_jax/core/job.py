"""Runs a job: flags, locks, and one sentence where a user's mistake or Ctrl-C ends it."""

import contextlib
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from sora_jax.core import digests, paths, xla_flags
from sora_jax.core import mesh as meshes

_PROFILE = flags.DEFINE_enum(
    "xla_profile",
    "default",
    [*xla_flags.PROFILES],
    "Which flags of XLA to set; see sora_jax/core/xla_flags.py.",
)
# How a flag of each type is defined.
DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
MESH = "Devices on each mesh axis, such as fsdp=4,tensor=2; -1: all that are left."
BAD_INPUT = 2  # exit code
# Of files that a user names. A full disk, for example, is a failure instead.
_WRONG_FILES = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError),
    PermissionError,
)
_LEAST_COMPILE_SECONDS = 0.2  # of a program that JAX_COMPILATION_CACHE_DIR stores
_locks, _locked_folders = contextlib.ExitStack(), set()  # of this job


class BadInput(SystemExit):
    """What a job was given is wrong; the message says what would be right."""


def run(main: Callable[[], None], name: str, any_batch: bool = False) -> None:
    """Parses the flags and calls `main`.

    Exit codes: 0 after --help; 2 with one sentence for wrong flags or input
    (`concise_errors`); 1 for failures such as damaged files, a full disk, numbers that are
    not finite, or too little memory; 130 after Ctrl-C.

    Of several processes, one that fails exits at once: in an orderly exit JAX would wait
    minutes for the others, which wait for this one. Only `sys.exit(number)` is orderly,
    since all processes call it at the same point.

    Args:
      main: does the job's work, as its flags say.
      name: the job's name, which starts its messages.
      any_batch: makes a clip's numbers on CPUs independent of the batch that it is in,
        at a cost of speed (`xla_flags.ANY_BATCH`).
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            left = _parsed(argv)
            if len(left) > 1:
                raise flags.Error(f"unknown argument {left[1]!r}")
            _check_finite(flags.FLAGS)
            if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
                flags.FLAGS["config"].value.keys()  # fails where none could be read
        except flags.Error as error:
            print(f"{name}: {error}; --help lists the flags", file=sys.stderr)
            sys.exit(BAD_INPUT)
        except (AttributeError, KeyError, OSError) as error:
            # ml_collections raises these for a field or a recipe that does not exist.
            reason = " ".join(str(error).strip("\"'").replace("\\n", "\n").split())
            print(
                f"{name}: --config names a file or field that does not exist: {reason}; "
                "configs/base.py lists every field",
                file=sys.stderr,
            )
            sys.exit(BAD_INPUT)
        xla_flags.set_defaults(_PROFILE.value, any_batch=any_batch)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # By default JAX stores programs that took a second; small jobs have none.
            field = "jax_persistent_cache_min_compile_time_secs"
            jax.config.update(field, _LEAST_COMPILE_SECONDS)
        return left

    def guarded(argv: list[str]) -> None:
        log_warnings()
        try:
            with concise_errors(name), _locks:
                main()
        except KeyboardInterrupt:
            _end(f"\n{name}: interrupted; the same command resumes", 130)
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            _end(stop.code, BAD_INPUT if isinstance(stop, BadInput) else 1)
        except Exception as error:
            if _is_out_of_memory(error):
                reason = str(error).splitlines()[0][:200]
                _end(
                    f"{name}: there is not enough memory: use smaller batches, fewer or "
                    f"smaller frames, or more devices ({reason})",
                    1,
                )
            if not jax.distributed.is_initialized():
                raise
            _end(traceback.format_exc().rstrip(), 1)

    sys.unraisablehook = _unraisable
    app.run(guarded, flags_parser=parse)


def _parsed(argv: list[str]) -> list[str]:
    """Parses the flags; returns the other arguments.

    Raises:
      flags.Error: a flag is wrong.
      SystemExit: with code 0, after --help and the like. absl's own code is 1.
    """
    try:
        return flags.FLAGS(argv)
    except SystemExit as stop:
        sys.exit(0 if stop.code == 1 else stop.code)


def _check_finite(flag_values: flags.FlagValues) -> None:
    """Raises flags.Error where a flag is inf or nan, which absl's bounds let pass."""
    for name in flag_values:
        value = flag_values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise flags.IllegalFlagValueError(
                f"flag --{name}={value}: it is not a finite number"
            )


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Prints an exception that Python cannot raise, except for one kind.

    When a write of a checkpoint fails, that error is raised; TensorStore's other writes
    then find their event loop closed, and their tracebacks would hide the reason.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _end(text: str, code: int) -> NoReturn:
    """Prints the reason and ends this process; at once if it is one of several."""
    with contextlib.suppress(OSError):  # a log file on a full disk
        print(text, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether XLA could not allocate an array, on any kind of device."""
    signs = "RESOURCE_EXHAUSTED", "Out of memory"
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in str(error) for sign in signs
    )


@contextlib.contextmanager
def concise_errors(name: str) -> Iterator[None]:
    """Ends the job with one sentence where its input or a file is wrong, not a traceback.

    Raises:
      BadInput: "name: message", for a ValueError, or an OSError of a file that is not
        there or may not be read or written.
      SystemExit: the same, for other OSErrors, digests.Damaged and FloatingPointError,
        which are not the user's mistakes.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        is_wrong = isinstance(error, (ValueError, *_WRONG_FILES))
        is_wrong = is_wrong and not isinstance(error, digests.Damaged)
        kind = BadInput if is_wrong else SystemExit
        raise kind(f"{name}: {text}") from None


def log_warnings() -> None:
    """Shows our warnings and those of libraries, but nothing that Orbax logs.

    Orbax raises its errors, and also logs a traceback for each of its threads.
    """
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().setLevel("CRITICAL")


def _is_first_process() -> bool:
    """Whether this is process 0; initializes no backend where it is the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_writable(*files: str | os.PathLike | None) -> None:
    """Checks in process 0 that files can be written.

    Raises:
      OSError: one cannot be written; see `paths.check_writable`.
    """
    if _is_first_process():
        for file in filter(None, files):
            paths.check_writable(file)


def lock_folder(folder: str | os.PathLike) -> None:
    """Locks a folder against other jobs until this one ends.

    With several processes, process 0 holds the lock for all. A second call does nothing.

    Raises:
      paths.InUse: another job holds it.
    """
    place = os.path.realpath(folder)
    if _is_first_process() and place not in _locked_folders:
        _locks.enter_context(paths.lock(folder))
        _locked_folders.add(place)
        _locks.callback(_locked_folders.remove, place)


def check_taken(
    flag_values: flags.FlagValues,
    kinds: Sequence[str],
    taken_by: Mapping[str, Collection[str]],
) -> None:
    """Checks that exactly one of `kinds` is set, and that it goes with the other flags.

    Args:
      flag_values: the flags.
      kinds: names of the flags that say what to work on.
      taken_by: name of another flag -> the kinds that it goes with.

    Raises:
      ValueError: none or several of `kinds` are set, or a flag that does not go with it.
    """
    chosen = [kind for kind in kinds if flag_values[kind].value]
    if len(chosen) != 1:
        *first, last = (f"--{kind}" for kind in kinds)
        raise ValueError(f"give one of {', '.join(first)} and {last}")
    wrong = [
        n
        for n, of in taken_by.items()
        if flag_values[n].present and chosen[0] not in of
    ]
    if wrong:
        of = taken_by[wrong[0]]
        names = sorted(f"--{name}" for name in wrong if taken_by[name] == of)
        raise ValueError(f"{', '.join(names)} need --{' or --'.join(of)}")


def fill_mesh(config: ml_collections.ConfigDict, mesh: str) -> None:
    """Writes the flag --mesh into the section `mesh` of the config of flag --config.

    An axis that neither --mesh nor --config.mesh names gets size 1.

    Raises:
      ValueError: an axis is given by both, or is unknown.
    """
    shape = meshes.parse(mesh)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    for axis in shape:
        if axis not in meshes.AXES:
            raise ValueError(
                f"--mesh: axis {axis!r} is unknown; choose from {', '.join(meshes.AXES)}"
            )
        if f"mesh.{axis}" in overrides:
            raise ValueError(f"give either --mesh={axis}=... or --config.mesh.{axis}")
    for axis in meshes.AXES:
        if f"mesh.{axis}" not in overrides:
            config.mesh[axis] = shape.get(axis, 1)


def parse_size(text: str) -> tuple[int, int]:
    """Reads the flag --size, WIDTHxHEIGHT or WIDTH*HEIGHT, as (height, width).

    Raises:
      ValueError: the text has another format.
    """
    match = re.fullmatch(r"(\d{1,5})[x*](\d{1,5})", text)
    if not match:
        raise ValueError(f"--size is WIDTHxHEIGHT such as 832x480, not {text!r}")
    return int(match[2]), int(match[1])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A context in which SIGTERM stops the job as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
