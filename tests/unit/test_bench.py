"""The arithmetic, the chart and the checkout of the benchmark."""

import json
import math
import os
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.chart import LABELS, PROFILES, draw_chart, grid_step, read_figures
from bench.cpu import cpu_seconds
from bench.processes import BenchFailed
from bench.ratios import Comparison, Ratio, Sample, compare, in_turns, ratio_of
from bench.worktree import commit_of, worktree

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = [4736.4, 4183, 840, 548, 27, 28, 1313, 862]
FIGURES = dict(
    zip(((peer, profile) for peer in LABELS for profile in PROFILES), NUMBERS, strict=True)
)


def git(repository: Path, *arguments: str) -> str:
    """Run git without the settings of the user, and return its output."""
    return subprocess.check_output(
        ["git", "-C", repository, "-c", "user.name=test", "-c", "user.email=test@test", *arguments],
        text=True,
        env=os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null"},
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Create a repository with two commits of one file."""
    git(tmp_path, "init", "--quiet")
    for text in ("first", "second"):
        (tmp_path / "file").write_text(text)
        git(tmp_path, "add", "file")
        git(tmp_path, "commit", "--quiet", "--message", text)
    return tmp_path


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    assert ratio_of([10, 30, 20], [10, 10, 40]) == Ratio(median=1, lowest=0.5, highest=3)


def test_a_ratio_to_zero_is_infinite() -> None:
    assert ratio_of([10, 10, 10], [0, 10, 10]) == Ratio(median=1, lowest=1, highest=math.inf)


def test_missing_rounds_of_a_subject_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio_of([1, 2], [1])


def test_a_comparison_has_the_medians_of_both_and_the_ratio_of_the_second() -> None:
    samples = [
        Sample(subject, "debits/s", "one hot user", value)
        for subject, values in (("before", (100, 90, 200)), ("after", (150, 180, 200)))
        for value in values
    ]
    assert compare(samples, "before", "after") == [
        Comparison("debits/s", "one hot user", 100, 180, Ratio(1.5, 1, 2))
    ]


def test_cases_and_metrics_are_compared_separately() -> None:
    samples = [
        Sample(subject, metric, case, value)
        for subject, value in (("before", 2), ("after", 3))
        for metric in ("debits/s", "CPU")
        for case in ("spread out", "hot")
    ]
    compared = compare(samples, "before", "after")
    assert [(row.metric, row.case) for row in compared] == [
        ("debits/s", "spread out"),
        ("debits/s", "hot"),
        ("CPU", "spread out"),
        ("CPU", "hot"),
    ]
    assert {row.ratio.median for row in compared} == {1.5}


def test_the_order_of_subjects_alternates() -> None:
    assert [list(in_turns("AB", number)) for number in range(3)] == [
        ["A", "B"],
        ["B", "A"],
        ["A", "B"],
    ]


def test_cpu_time_is_that_of_the_process() -> None:
    before = cpu_seconds(os.getpid())
    expected = time.process_time() + 0.2
    while time.process_time() < expected:
        pass
    assert 0.18 <= cpu_seconds(os.getpid()) - before <= 0.5  # in ticks of 0.01 s


def test_the_chart_shows_every_figure_and_is_described() -> None:
    root = ElementTree.fromstring(draw_chart(FIGURES))  # noqa: S314 - written by this test
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"4,736", "4,183", "840", "548", "27", "28", "1,313", "862"} <= set(texts)
    assert {*LABELS.values(), *PROFILES, "debits/s"} <= set(texts)
    assert "service, one hot user: 4,183" in root.findtext(f"{SVG}desc", "")
    assert root.findtext(f"{SVG}title")


def test_bars_are_as_long_as_their_figures_and_end_within_the_axis() -> None:
    root = ElementTree.fromstring(draw_chart(FIGURES))  # noqa: S314 - written by this test
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("height") == "16"]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert len(widths) == len(NUMBERS)
    assert widths[0] / widths[2] == pytest.approx(NUMBERS[0] / NUMBERS[2], rel=0.01)
    assert max(widths) <= 480


@pytest.mark.parametrize(
    ("highest", "step"), [(7, 1), (8, 2), (4736, 1000), (7001, 2000), (14_001, 5000), (0, 1)]
)
def test_the_axis_has_at_most_seven_round_steps(highest: float, step: int) -> None:
    assert grid_step(highest) == step


def test_figures_are_those_at_128_connections(tmp_path: Path) -> None:
    results = [
        {"peer": peer, "profile": profile, "connections": connections, "per_second": per_second}
        for (peer, profile), value in FIGURES.items()
        for connections, per_second in ((1, 1.0), (128, value), (32, 2.0))
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": results}))
    assert read_figures(file) == FIGURES


def test_a_worktree_has_the_files_of_its_revision_and_is_removed(repository: Path) -> None:
    with worktree(commit_of("HEAD~1", repository), repository) as checkout:
        assert (checkout / "file").read_text() == "first"
        assert (repository / "file").read_text() == "second"
    assert not checkout.parent.exists()
    assert git(repository, "worktree", "list").count("\n") == 1


def test_a_worktree_is_removed_when_the_run_is_interrupted(repository: Path) -> None:
    folders = []

    def interrupt() -> None:
        with worktree(commit_of("HEAD", repository), repository) as checkout:
            folders.append(checkout.parent)
            (checkout / "file").write_text("changed")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not folders[0].exists()
    assert git(repository, "worktree", "list").count("\n") == 1


@pytest.mark.parametrize("revision", ["missing", "--help", "HEAD:file", ""])
def test_a_revision_that_is_not_a_commit_is_reported(repository: Path, revision: str) -> None:
    with pytest.raises(BenchFailed, match="is not a commit of this repository"):
        commit_of(revision, repository)
