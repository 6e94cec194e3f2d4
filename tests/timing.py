"""Durations, measured on a machine that also runs other programs."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


class TooSlow(AssertionError):
    """An operation exceeded its time limit."""


def assert_below(seconds: float, limit_seconds: float) -> None:
    """Raise TooSlow if a duration is not below its limit."""
    if seconds >= limit_seconds:
        raise TooSlow(f"{seconds:.3f} s; less than {limit_seconds} s are allowed")


def repeated_if_too_slow(test: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Run a test up to three times until it is fast enough.

    Another program may delay one run; a fault of the service delays every run.
    """

    @wraps(test)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        for _ in range(2):
            with suppress(TooSlow):
                test(*arguments, **named)
                return
        test(*arguments, **named)

    return run
