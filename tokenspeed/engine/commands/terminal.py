"""Lines typed or pasted at a terminal, and keys pressed while something else is written to it."""

import contextlib
import io
import select
import sys
from collections.abc import Iterator

_PASTED_S = 0.02  # a line that follows another sooner was not typed


def prepare() -> None:
    """Line editing in `input`, with a pasted block as one text, where the platform has it."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def read_block(prompt: str) -> str:
    """What is typed up to a line's end; of a pasted block all lines. Raises EOFError at the end of the input."""
    lines = [input(prompt)]
    while _waits():
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)


def _waits() -> bool:
    """Whether more input is there already."""
    try:
        return bool(select.select([sys.stdin.fileno()], [], [], _PASTED_S)[0])
    except (io.UnsupportedOperation, OSError, ValueError):  # no terminal, or one that cannot be asked
        return False


@contextlib.contextmanager
def keys_held() -> Iterator[None]:
    """Keys pressed within it are neither shown nor read afterwards; Ctrl-C interrupts as ever."""
    try:
        import termios
    except ImportError:  # not on this platform
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (io.UnsupportedOperation, OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcflush(descriptor, termios.TCIFLUSH)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
