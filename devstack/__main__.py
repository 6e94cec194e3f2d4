"""The command `python -m devstack`; Ctrl-C stops it without a traceback, even during imports."""

import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the stack until it fails or a signal stops it."""
    # Also SIGINT: a shell starts background processes with SIGINT ignored.
    for number in SIGNALS:
        signal.signal(number, _interrupt_once)
    try:
        from devstack.stack import run  # noqa: PLC0415 - takes half a second

        sys.exit(run())
    except KeyboardInterrupt:
        print("\nStopped.")


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Start to stop, and ignore further signals, so that the processes stop in order."""
    del number, frame
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
