"""Ratios and medians of measurements that were repeated in turns."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Ratio:
    """The ratio of two measurements that were both repeated."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Sample:
    """One value, measured in one round."""

    subject: str
    metric: str
    case: str
    value: float


@dataclass(frozen=True)
class Comparison:
    """Medians of a metric for two subjects, and the ratio of the second to the first."""

    metric: str
    case: str
    first: float
    second: float
    ratio: Ratio


def in_turns(subjects: Sequence[Subject], number: int) -> Sequence[Subject]:
    """Return the subjects in their order for even numbers, otherwise in the reverse order.

    The order therefore favors no subject.
    """
    return subjects[::-1] if number % 2 else subjects


def divide(numerator: float, denominator: float) -> float:
    """Return the quotient, or infinity if the denominator is 0, such as debits/s of a slow peer."""
    return numerator / denominator if denominator else math.inf


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Return the median, lowest and highest ratio of the values of each round."""
    ratios = [divide(*pair) for pair in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def compare(samples: Sequence[Sample], first: str, second: str) -> list[Comparison]:
    """Compare two subjects in every metric and case, in the order of the samples."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for sample in samples:
        of_case = values.setdefault((sample.metric, sample.case), {first: [], second: []})
        of_case[sample.subject].append(sample.value)
    return [
        Comparison(
            metric,
            case,
            statistics.median(of_case[first]),
            statistics.median(of_case[second]),
            ratio_of(of_case[second], of_case[first]),
        )
        for (metric, case), of_case in values.items()
    ]
