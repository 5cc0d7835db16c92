"""Progress: a bar on a terminal, lines elsewhere."""

import re
import sys
import time

import pytest

from selfnpo import progress


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)


def test_progress_is_lines_where_there_is_no_terminal(quick, capsys):
    for _ in progress.progress(range(2), desc="judge", unit="batch"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) in range(3, 7)  # also while a batch lasts
    assert lines[0] == "judge: 0 of 2 batches, 00:00 passed"
    assert re.fullmatch(r"judge: 1 of 2 batches, 00:00 passed, 00:00 left, [\d.]+ batches/s", lines[-2])
    assert re.fullmatch(r"judge: 2 of 2 batches, 00:00 passed, [\d.]+ batches/s", lines[-1])


def test_what_is_quick_gets_no_line(capsys):
    for _ in progress.progress(range(100_000), desc="sample", unit="step", leave=False):
        pass
    with progress.lasting("loading vae"):
        pass
    assert capsys.readouterr().err == ""
    with progress.progress(total=3, initial=1, desc="train", unit="step") as bar:
        bar.update(2)
        bar.set_postfix_str("loss=0.5")
    assert re.fullmatch(r"train: 3 of 3 steps, 00:00 passed, [\d.e+]+ steps/s, loss=0.5\n", capsys.readouterr().err)


def test_what_lasts_says_so(quick, capsys):
    with progress.lasting("loading vae"):
        time.sleep(0.3)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "loading vae: 00:00 passed"
    assert others
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # nothing goes on


def test_a_line_of_progress_comes_within_two_seconds_and_then_every_few():
    assert progress.FIRST_LINE < 2
    assert progress.LINE_SECONDS <= 10


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress.progress(range(3), desc="judge", unit="sample"):
        pass
    assert "| 3/3 [" in capsys.readouterr().err
