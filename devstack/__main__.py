"""`python -m devstack`: Ctrl-C ends it with one line, also while the libraries are imported."""

import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    # SIGINT too: a shell lets what it starts in the background ignore it.
    for number in SIGNALS:
        signal.signal(number, _interrupt_once)
    try:
        from devstack.stack import run  # noqa: PLC0415 - takes half a second

        sys.exit(run())
    except KeyboardInterrupt:
        print("\nStopped.")


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Begin to stop, and ignore further signals, so that everything ends in order."""
    del number, frame
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
