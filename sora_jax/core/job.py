"""Runs a job's main function: what the user gets wrong or stops ends in one sentence."""

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
from absl import app, flags, logging

from sora_jax.core import paths, xla_flags

_PROFILE = flags.DEFINE_enum(
    "xla_profile", "default", [*xla_flags.PROFILES],
    "Flags of XLA; sora_jax/core/xla_flags.py says why.",
)  # fmt: skip
_held, _held_folders = contextlib.ExitStack(), set()  # the locks of this job


def run(main: Callable[[list[str]], None], name: str, any_batch: bool = False) -> None:
    """Parses the flags and calls `main`.

    Exits with 2 where they are not understood, with 130 where Ctrl-C stopped it. A file
    or folder that cannot be read or written, or too little memory, ends it in one
    sentence, with 1.

    A process of several that fails ends at once: on its way out JAX would wait minutes
    for the others, which wait for it. An exit with a number is one that all processes
    have agreed on.

    Args:
      main: takes the arguments that are no flags.
      name: of the job, in front of what it says.
      any_batch: keeps a clip's numbers on CPUs from depending on the batch it is in,
        at a cost of speed (`xla_flags.ANY_BATCH`).
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            left = flags.FLAGS(argv)
            _check_finite(flags.FLAGS)
            if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
                flags.FLAGS["config"].value.keys()  # fails where none could be read
        except flags.Error as error:
            print(f"{name}: {error}; --help lists the flags", file=sys.stderr)
            sys.exit(2)
        except (AttributeError, KeyError, OSError) as error:
            # What ml_collections raises for a field or a recipe that is not there.
            reason = " ".join(str(error).strip("\"'").replace("\\n", "\n").split())
            print(
                f"{name}: --config names what is not there: {reason}; "
                "configs/base.py lists every field",
                file=sys.stderr,
            )
            sys.exit(2)
        xla_flags.set_defaults(_PROFILE.value, any_batch=any_batch)
        return left

    def guarded(argv: list[str]) -> None:
        try:
            with _held:
                main(argv)
        except KeyboardInterrupt:
            _end(f"\n{name}: interrupted; the same command goes on here", 130)
        except OSError as error:
            _end(f"{name}: {sentence(error)}", 1)
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            _end(stop.code, 1)
        except Exception as error:
            if _is_out_of_memory(error):
                reason = str(error).splitlines()[0][:200]
                _end(
                    f"{name}: there is not enough memory: ask for smaller batches, or "
                    f"fewer or smaller frames, or take more devices ({reason})",
                    1,
                )
            if not jax.distributed.is_initialized():
                raise
            _end(traceback.format_exc().rstrip(), 1)

    sys.unraisablehook = _unraisable
    app.run(guarded, flags_parser=parse)


def _check_finite(given: flags.FlagValues) -> None:
    """Raises flags.Error where a flag is inf or nan, which pass every bound of absl's."""
    for name in given:
        value = given[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise flags.IllegalFlagValueError(
                f"flag --{name}={value}: it is not a finite number"
            )


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Shows what no caller can be told of.

    But for one thing: after a write of a checkpoint has failed, which is raised, the
    others of TensorStore find no event loop any more, and say so a traceback each.
    """
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def _end(text: str, code: int) -> NoReturn:
    """Says why this process ends, and ends it; of several at once, whatever they do."""
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


def sentence(error: Exception) -> str:
    """What an error says to a user; of a file, which one and why."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def log_warnings() -> None:
    """Shows warnings, ours and those of libraries, but nothing that Orbax logs.

    What fails in Orbax is raised, and it also logs a traceback for each of its threads.
    """
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().setLevel("CRITICAL")


def check_writable(*files: str | os.PathLike | None) -> None:
    """Checks that files can be written; of several processes the first one does.

    Raises:
      OSError: one cannot; see `paths.check_writable`.
    """
    if not (jax.distributed.is_initialized() and jax.process_index()):
        for file in filter(None, files):
            paths.check_writable(file)


def hold(folder: str | os.PathLike) -> None:
    """Keeps other jobs out of a folder until this one ends; once more does nothing.

    Of several processes the first one does, for all of them.

    Raises:
      paths.InUse: another job writes there.
    """
    place = os.path.realpath(folder)
    other = jax.distributed.is_initialized() and jax.process_index() > 0
    if not other and place not in _held_folders:
        _held.enter_context(paths.lock(folder))
        _held_folders.add(place)
        _held.callback(_held_folders.remove, place)


def check_taken(
    given: flags.FlagValues,
    kinds: Sequence[str],
    taken_by: Mapping[str, Collection[str]],
) -> None:
    """Checks that a job has one kind of thing to work on, and no flag in vain.

    Args:
      given: the flags.
      kinds: names of those that say what to work on.
      taken_by: name of a flag -> the kinds that take it.

    Raises:
      ValueError: not one of the kinds is given, or with it a flag that it does not take.
    """
    asked = [kind for kind in kinds if given[kind].value]
    if len(asked) != 1:
        *first, last = (f"--{kind}" for kind in kinds)
        raise ValueError(f"give one of {', '.join(first)} and {last}")
    vain = [n for n, of in taken_by.items() if given[n].present and asked[0] not in of]
    if vain:
        of = taken_by[vain[0]]
        names = sorted(f"--{name}" for name in vain if taken_by[name] == of)
        raise ValueError(f"{', '.join(names)} need --{' or --'.join(of)}")


def parse_size(text: str) -> tuple[int, int]:
    """Reads the flag --size, WIDTHxHEIGHT or WIDTH*HEIGHT, as (height, width).

    Raises:
      ValueError: it is something else.
    """
    found = re.fullmatch(r"(\d{1,5})[x*](\d{1,5})", text)
    if not found:
        raise ValueError(f"--size is WIDTHxHEIGHT such as 832x480, not {text!r}")
    return int(found[2]), int(found[1])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it, SIGTERM stops the job as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
