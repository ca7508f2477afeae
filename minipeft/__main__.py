"""`python -m minipeft …`: runs a command. It ends with one line on standard error if it fails or is
stopped, and then its exit status is 1; or 2 if the options are wrong."""

import os
import sys
from signal import SIG_IGN, SIGINT, SIGTERM, getsignal, signal


def on_stop(handler) -> None:
    """Set what Ctrl-C and SIGTERM do, unless they are ignored, as in a script's background."""
    for number in (SIGINT, SIGTERM):
        if getsignal(number) != SIG_IGN:
            signal(number, handler)


def leave(*_, line: str = "stopped.") -> None:
    """End the process at once: what Python does when it exits can be interrupted."""
    on_stop(SIG_IGN)
    os.write(2, f"{line}\n".encode())
    os._exit(1)


def unraisable(found) -> None:
    """Ctrl-C where Python could only print it, as in a destructor, is not lost."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(found)


def flush() -> None:
    """Write what was printed. If that fails, Python must not try again when it exits."""
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None
        raise


def work() -> None:
    from minipeft.lab import cli

    if sys.stdout is None:
        raise OSError("standard output is closed")
    # for characters that a terminal does not have
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore
    args = cli.parser().parse_args()
    from minipeft.lab.checkpoint import Interrupt  # imports torch, which takes seconds

    on_stop(Interrupt())
    cli.run(args)


def run() -> str | None:
    """Do the work, and return the line that tells how it failed."""
    try:
        try:
            work()
        finally:
            flush()
        on_stop(SIG_IGN)  # nothing is left to stop
        return None
    except SystemExit:  # after --help, or a usage error
        raise
    except BaseException as error:
        return line_of(error)


def line_of(error: BaseException) -> str:
    from minipeft.lab.cli import one_line

    if hasattr(error, "saved"):  # checkpoint.Stopped: the end of a step was reached
        return f"{one_line(str(error))}.{' Continue with --resume.' if error.saved else ''}"
    if isinstance(error, KeyboardInterrupt):  # Python may have added where it was raised
        return "stopped."
    if any(getattr(getsignal(number), "raised", False) for number in (SIGINT, SIGTERM)):
        return "stopped."  # torch has turned the interrupt into another error
    if os.environ.get("MINIPEFT_DEBUG") == "1":
        raise error
    expected = isinstance(error, ValueError | FloatingPointError | OSError)
    kind = "" if expected else f"{type(error).__name__}: "
    return f"error: {one_line(f'{kind}{error}')}"


def main() -> None:
    """Run the command that sys.argv names; with MINIPEFT_DEBUG=1, errors have a traceback."""
    sys.unraisablehook = unraisable
    on_stop(leave)  # until the work begins
    try:
        line = run()
    except KeyboardInterrupt:  # a second one, before the first was handled
        line = "stopped."
    if line is not None:  # by now, progress bars have ended their lines
        leave(line=line)


if __name__ == "__main__":
    main()
