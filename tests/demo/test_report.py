"""What is called a win: only what the printed interval decides; and that the committed evaluation says so."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import pages
from selfnpo.demo import report
from selfnpo.demo.config import CFG, NONE, SEEDS, SELF_NPO
from selfnpo.demo.evaluation import Estimate, Evaluation, load
from selfnpo.demo.metrics import HIGHER_IS_BETTER, METRICS

COMMITTED = load(pages.EVALUATION)
CELL = re.compile(r"(\(|\*\*|)([+-][\d.]+)(?: ± ([\d.]+))?(\)|\*\*|)")


def made(differences, base=0.0):
    """An evaluation at one scale in which Self-NPO differs from plain guidance, in every metric, by `differences`."""
    rows = {
        arm: [{metric: base + value for metric in METRICS} for value in values]
        for arm, values in ((NONE, [0.0] * len(differences)), (CFG, [0.0] * len(differences)), (SELF_NPO, differences))
    }
    return Evaluation({arm: {2.0: found} for arm, found in rows.items()}, num_samples=1, seeds=(*range(len(differences)),))


def replicates(mean, errors, count):
    """`count` values whose mean is `mean` and which lies `errors` standard errors from 0."""
    values = np.linspace(-1, 1, count)
    return list(mean + values * abs(mean) / errors / stats.sem(values))


def cells(table):
    """Of a table of differences: metric, mark, mean and half width as printed."""
    for line in table.splitlines()[2:]:
        for metric, cell in zip(METRICS, line.split(" | ")[1:], strict=True):
            mark, mean, half_width, _ = CELL.fullmatch(cell.removesuffix(" |")).groups()
            yield metric, mark, float(mean), half_width and float(half_width)


def obeys(evaluation, baseline=CFG):
    """The marks of the table follow from its printed numbers, and these from the interval of scipy."""
    found = cells(report.difference_table(evaluation, baseline))
    for scale in evaluation.guidance_scales:
        for metric in METRICS:
            name, mark, mean, half_width = next(found)
            decided = half_width is not None and not mean - half_width <= 0 <= mean + half_width
            better = (mean > 0) == HIGHER_IS_BETTER[metric]
            assert (name, mark) == (metric, "" if decided and better else "**" if decided else "(")
            pairs = zip(*(evaluation.values[arm][scale] for arm in (SELF_NPO, baseline)), strict=True)
            values = [ours[metric] - other[metric] for ours, other in pairs]
            if decided and np.ptp(values):
                low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
                assert low > 0 or high < 0
    assert not [*found]


@pytest.mark.parametrize(
    ("errors", "count", "wins"), [(3.5, 3, None), (4.25, 3, None), (4.8, 3, True), (2.5, 6, None), (2.7, 6, True)]
)
def test_standard_errors_that_a_win_takes(errors, count, wins):
    """Student's t is 4.30 for three replicates and 2.57 for six."""
    for mean in (0.02, -0.02):
        evaluation = made(replicates(mean, errors, count))
        for metric in METRICS:
            found = report.wins(evaluation.difference(SELF_NPO, 2.0, metric), metric)
            assert found == (wins and (mean > 0) == HIGHER_IS_BETTER[metric])
        obeys(evaluation)


@given(mean=st.floats(-50, 50), errors=st.floats(0.5, 20), count=st.sampled_from([1, 2, 3, 6]), base=st.floats(-10, 10))
def test_no_win_holds_zero(mean, errors, count, base):
    obeys(made([mean] if count == 1 else replicates(mean, errors, count), base))


@given(mean=st.floats(1e-7, 100), ratio=st.floats(0.98, 1.02), count=st.sampled_from([2, 3, 6]))
def test_no_win_holds_zero_on_the_edge(mean, ratio, count):
    """Intervals that nearly end at 0."""
    obeys(made(replicates(mean, ratio * stats.t.ppf(0.975, count - 1), count)))


def test_printed_ends_of_a_win_lie_on_one_side():
    assert report.wins(Estimate(1.004, 0.996), "recall") is None  # printed as 1.00 ± 1.00
    assert report.wins(Estimate(1.02, 0.98), "recall") is True
    assert report.wins(Estimate(1.02, 0.98), "fd") is False


def test_the_verdict_names_every_metric_once():
    text = report.verdict(made(replicates(0.5, 10, 3)))
    assert text == (
        "- **guidance_scale = 2**: Self-NPO wins in precision (+0.50 ± 0.22), recall (+0.50 ± 0.22), "
        "density (+0.50 ± 0.22), coverage (+0.50 ± 0.22), lp (+0.50 ± 0.22); "
        "loses in fd (+0.50 ± 0.22), nn (+0.50 ± 0.22); undecided: nothing."
    )
    text = report.verdict(made([0.5]))
    assert "wins in nothing; loses in nothing; undecided: fd (+0.500), precision (+0.500)" in text


def test_the_best_is_named_with_its_equals():
    rows = {NONE: [1.0, 2.0, 3.0], CFG: [1.1, 2.0, 3.0], SELF_NPO: [4.0, 5.1, 6.2]}
    values = {arm: {2.0: [dict.fromkeys(METRICS, value) for value in each]} for arm, each in rows.items()}
    text = report.best(Evaluation(values, num_samples=1, seeds=(0, 1, 2)))
    assert "- fd: no guidance (2.0 ± 2.5) or plain guidance (CFG), guidance_scale = 2 (2.0 ± 2.4)\n" in text
    assert "- recall: Self-NPO, guidance_scale = 2 (5.1 ± 2.7)\n" in text
    assert report.best(made([0.5])).count("undecided") == len(METRICS)


def test_what_is_said_of_the_criterion():
    text = report.explain(made([1.0, 2.0, 3.0]), one_negative=True)
    assert "3 replicates (seeds 0, 1, 2)" in text
    assert "7 differences" in text
    assert "not of training" in text


def test_the_committed_evaluation_obeys():
    assert COMMITTED.seeds == SEEDS
    assert COMMITTED.values.keys() == report.LABELS.keys()
    for baseline in (CFG, "fresh"):
        obeys(COMMITTED, baseline)


def test_the_committed_report_is_made_of_the_committed_values():
    text = pages.EVALUATION.with_suffix(".md").read_text()
    for part in (
        report.explain(COMMITTED, one_negative=False),
        report.table(COMMITTED),
        report.difference_table(COMMITTED),
        report.difference_table(COMMITTED, "fresh"),
        report.verdict(COMMITTED),
        report.best(COMMITTED),
        report.CAVEATS,
    ):
        assert f"\n\n{part}\n\n" in text
    assert report.difference_table(COMMITTED) in pages.EVALUATION.with_name("README.md").read_text()
