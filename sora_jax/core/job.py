"""Runs a job's main function: what the user gets wrong or stops ends in one sentence."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import app


def run(main: Callable[[list[str]], None], name: str) -> None:
    """Parses the flags and calls `main`; exits with 130 where Ctrl-C stopped it.

    Args:
      main: takes the arguments that are no flags.
      name: of the job, in front of what it says.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(argv)
        except (AttributeError, KeyError, OSError) as error:
            # What ml_collections raises for a field or a recipe that is not there.
            reason = " ".join(str(error).strip("\"'").replace("\\n", "\n").split())
            sys.exit(
                f"{name}: --config names what is not there: {reason}; "
                "configs/base.py lists every field"
            )

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except KeyboardInterrupt:
            sentence = f"\n{name}: interrupted; the same command goes on here"
            print(sentence, file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


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
