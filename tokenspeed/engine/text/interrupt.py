"""Long work on a text that nobody waits for any more ends at its next step."""

import threading
from contextvars import ContextVar

# Set by whoever may give the work up; it follows the work into its thread.
interrupt: ContextVar[threading.Event | None] = ContextVar("interrupt", default=None)


class Interrupted(Exception):
    """The work was given up."""


def check_interrupt() -> None:
    """Raises Interrupted where the work was given up."""
    event = interrupt.get()
    if event is not None and event.is_set():
        raise Interrupted
