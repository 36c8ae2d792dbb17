"""Intervals cover what they promise to cover, and tests reject as often as they say."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from mixadv.robustness import bootstrap, bootstrap_difference, holm, paired_t_test, t_interval
from mixadv.tokens.substitution.attacks import wilson

numbers = st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=30)
p_values = st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 1), min_size=1, max_size=8)


def band(sets, level=0.95, errors=3.0):
    """What share of intervals may cover, that of right ones being within `errors` of the level."""
    half = errors * math.sqrt(level * (1 - level) / sets)
    return level - half, level + half


def coverage(intervals, truth):
    return np.mean([low - 1e-12 <= truth <= high + 1e-12 for _, low, high in intervals])


# Bootstrap -------------------------------------------------------------------------------------

LAWS = {
    "normal, mean": (lambda r, n: r.normal(size=n), 0.0, "mean"),
    "exponential, mean": (lambda r, n: r.exponential(size=n), 1.0, "mean"),
    "exponential, median": (lambda r, n: r.exponential(size=n), math.log(2), "median"),
    "accuracy 0.8": (lambda r, n: r.random(n) < 0.8, 0.8, "mean"),
}


def bootstrapped(law, sets, n=60, resamples=500):
    draw, truth, statistic = LAWS[law]
    random = np.random.default_rng(0)
    samples = (draw(random, n) for _ in range(sets))
    found = [bootstrap(x, statistic, resamples=resamples, seed=i) for i, x in enumerate(samples)]
    return coverage(found, truth)


def of_a_normal_mean(n=60, level=0.95):
    """How often the percentiles of resampled means of n normal samples cover the mean.

    They lie z·σ̂/√n from the sample's mean with σ̂² = Σ(x − x̄)²/n, where Student's t is right.
    """
    z = stats.norm.ppf((1 + level) / 2) * math.sqrt((n - 1) / n)
    return 2 * stats.t.cdf(z, n - 1) - 1


def test_bootstrap_intervals_cover_the_mean_of_what_was_sampled_from():
    low, high = band(400, of_a_normal_mean())
    assert low <= bootstrapped("normal, mean", 400) <= high


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_bootstrap_intervals_cover(law):
    """Percentiles fall short by 0.02 where samples are skewed, as BCa does (by 0.015)."""
    expected = {"normal, mean": of_a_normal_mean(), "exponential, mean": 0.932}.get(law, 0.95)
    low, high = band(3000, expected)
    assert low <= bootstrapped(law, 3000, resamples=1000) <= high + 0.01


def test_differences_of_two_sets_are_covered_and_not_those_of_pairs():
    """Rows of one set do not belong to rows of the other: a common part does not cancel."""
    random = np.random.default_rng(1)
    sets = 200
    found = []
    for i in range(sets):
        pair = random.normal(1, 1, 50), random.normal(0, 2, 70)
        found.append(bootstrap_difference(*pair, resamples=300, seed=i))
    low, high = band(sets)
    assert low <= coverage(found, 1.0) <= high
    common = random.normal(size=100)
    value, below, above = bootstrap_difference(common, common)
    assert value == 0
    assert above - below == pytest.approx(2 * 1.96 * math.sqrt(2) * common.std() / 10, rel=0.1)


@given(numbers, st.integers(-5, 5), st.sampled_from(["mean", "median"]))
def test_bootstrap_moves_with_the_values(values, shift, statistic):
    one = bootstrap(values, statistic, resamples=50)
    moved = bootstrap(np.array(values) + shift, statistic, resamples=50)
    assert one.low <= one.high
    assert moved == pytest.approx([x + shift for x in one], abs=1e-9)
    assert min(values) <= one.low
    assert one.high <= max(values)


@given(numbers)
def test_a_bootstrap_is_repeatable_and_draws_from_its_own_generator(values):
    before = np.random.get_state()[1].copy()
    assert bootstrap(values, resamples=50, seed=3) == bootstrap(values, resamples=50, seed=3)
    assert (np.random.get_state()[1] == before).all()


def test_more_confidence_takes_a_wider_interval_and_more_samples_a_narrower_one():
    values = np.random.default_rng(0).normal(size=400)
    width = {level: np.ptp(bootstrap(values, level=level)[1:]) for level in (0.5, 0.9, 0.99)}
    assert width[0.5] < width[0.9] < width[0.99]
    assert width[0.9] < np.ptp(bootstrap(values[:50], level=0.9)[1:])


def test_a_function_can_be_the_statistic():
    values = np.random.default_rng(0).normal(size=100)
    named = bootstrap(values, "median", resamples=100)
    assert bootstrap(values, np.median, resamples=100) == named


def test_wilsons_interval_is_of_no_other_statistic():
    def errors(values, axis=-1):
        return 1 - np.mean(values, axis=axis)

    for found in (
        bootstrap([True] * 20, errors),
        bootstrap_difference([True] * 20, [True, False] * 10, errors),
    ):
        assert np.isnan(found.low)
        assert np.isnan(found.high)
    assert bootstrap([True] * 20, errors).value == 0


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 60])
def test_an_accuracy_of_one_or_nothing_has_wilsons_interval(correct, rows):
    found = bootstrap([correct] * rows)
    assert found[1:] == pytest.approx(wilson(rows * correct, rows), abs=1e-6)
    assert found.value == correct


def test_two_accuracies_without_spread_have_newcombes_interval():
    """What Wilson's intervals reach adds up as squares do (Newcombe 1998, method 10)."""
    _, low = bootstrap([True] * 20)[:2]
    _, _, high = bootstrap([False] * 30)
    found = bootstrap_difference([True] * 20, [False] * 30)
    assert found == pytest.approx((1.0, 1 - math.hypot(1 - low, high), 1.0))
    back = bootstrap_difference([False] * 30, [True] * 20)
    assert back == pytest.approx((-1.0, -1.0, -found.low))
    same = bootstrap_difference([True] * 20, [True] * 20)
    assert same == pytest.approx((0.0, low - 1, 1 - low))
    alike = bootstrap_difference([True] * 20, [False] * 20)
    assert alike.low == pytest.approx(0.772, abs=5e-4)


def of_small_sets(n, share, other, sets):
    random = np.random.default_rng(0)
    return [
        bootstrap_difference(
            random.random(n) < share, random.random(60) < other, resamples=300, seed=i
        )
        for i in range(sets)
    ]


def test_accuracies_of_few_rows_are_covered_also_where_all_of_them_are_right():
    """Of 12 clean rows at 0.95 more than half of the draws are all right: resampled alone, these
    say that the accuracy is 1 for sure.
    """
    found = of_small_sets(12, 0.95, 0.6, 300)
    assert coverage(found, 0.95 - 0.6) >= band(300)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "share"), [(10, 0.9), (20, 0.95), (50, 0.98)])
def test_differences_of_accuracies_are_covered(n, share):
    assert coverage(of_small_sets(n, share, 0.6, 2000), share - 0.6) >= band(2000)[0]


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.booleans(), st.integers(1, 9))
def test_a_set_without_spread_has_its_own_part_in_the_interval(values, correct, rows):
    for a, b in ((values, [correct] * rows), ([correct] * rows, values)):
        value, low, high = bootstrap_difference(a, b, resamples=20)
        assert low < value + 1e-12
        assert high > value - 1e-12
        assert high - low > 0.1


def test_a_single_loss_has_no_spread_that_its_difference_could_have():
    value, low, high = bootstrap_difference([1.0, 2.0, 3.0], [1.0])
    assert value == 1
    assert math.isnan(low)
    assert math.isnan(high)


def test_estimates_are_numbers_of_python():
    right = np.array([True] * 5)
    found = [bootstrap(right), bootstrap(np.ones(3)), bootstrap(np.arange(5)), t_interval([1, 2])]
    found += [bootstrap_difference(right, ~right), bootstrap_difference(np.arange(5), np.arange(4))]
    found.append(paired_t_test({1: np.float64(1), 2: np.float64(3)}, {1: 0.0, 2: 1.0}).difference)
    assert {type(number) for estimate in found for number in estimate} == {float}


def test_losses_without_spread_have_a_point_for_an_interval_and_one_alone_none():
    assert bootstrap([2.0] * 5) == (2.0, 2.0, 2.0)
    value, low, high = bootstrap([2.0])
    assert value == 2
    assert math.isnan(low)
    assert math.isnan(high)


def test_many_values_are_resampled_a_part_at_a_time():
    values = np.random.default_rng(0).normal(size=5000)
    value, low, high = bootstrap(values, resamples=1000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(5000), rel=0.15)
    assert low < value < high


@pytest.mark.parametrize(
    ("arguments", "words", "said"),
    [
        (([],), {}, "at least one"),
        (([[1.0, 2.0]],), {}, r"shape \[1, 2\]"),
        (([1.0, math.nan],), {}, "number 1 is nan"),
        (([1.0, 2.0], "mode"), {}, "'mode'"),
        (([1.0, 2.0],), {"level": 95}, "between 0 and 1, got 95"),
        (([1.0, 2.0],), {"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_what_cannot_be_bootstrapped_is_refused(arguments, words, said):
    with pytest.raises(ValueError, match=said):
        bootstrap(*arguments, **words)


# Seeds -----------------------------------------------------------------------------------------


def test_t_intervals_cover_the_mean_of_few_seeds():
    random, sets = np.random.default_rng(2), 2000
    found = [t_interval(random.normal(3, 2, size=4)) for _ in range(sets)]
    low, high = band(sets)
    assert low <= coverage(found, 3.0) <= high


def test_paired_comparisons_cover_and_reject_at_their_level():
    """Seeds have an effect of their own, larger than that of the method; pairs cancel it."""
    random, sets, covered, rejected = np.random.default_rng(3), 1000, [], 0
    for _ in range(sets):
        seeds = random.normal(0, 10, size=5)
        a, b = (dict(enumerate(seeds + random.normal(0, 1, size=5))) for _ in "ab")
        found = paired_t_test(a, b)
        covered.append(found.difference)
        rejected += found.p < 0.05
    low, high = band(sets)
    assert low <= coverage(covered, 0.0) <= high
    assert low <= 1 - rejected / sets <= high
    assert np.mean([x.high - x.low for x in covered]) < 5


@given(numbers, st.lists(st.integers(-50, 50).map(float), min_size=30, max_size=30))
def test_a_paired_test_is_that_of_scipy(values, others):
    others = others[: len(values)]
    assume(len({x - y for x, y in zip(values, others, strict=True)}) > 1)
    a = dict(enumerate(values)) | {100: 7.0}
    b = dict(enumerate(others)) | {200: 5.0}
    found = paired_t_test(a, b)
    assert found.seeds == tuple(range(len(values)))
    reference = stats.ttest_rel(values, others)
    assert found.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(0.95)
    assert found.difference[1:] == pytest.approx((interval.low, interval.high))
    swapped = paired_t_test(b, a)
    assert swapped.p == pytest.approx(found.p)
    assert swapped.difference.low == pytest.approx(-found.difference.high)


def test_one_seed_tells_no_interval_and_nor_do_equal_gains():
    one = paired_t_test({1: 0.5}, {1: 0.25, 2: 0.5})
    assert one.difference.value == 0.25
    assert math.isnan(one.p)
    assert math.isnan(one.difference.low)
    equal = paired_t_test({1: 1.5, 2: 2.5}, {1: 1.0, 2: 2.0})  # as by chance of a few rows
    assert equal.difference.value == 0.5
    assert math.isnan(equal.p)
    assert math.isnan(equal.difference.low)
    assert math.isnan(equal.difference.high)
    assert paired_t_test({1: 1.5, 2: 2.5}, {1: 1.5, 2: 2.5}).p == 1


@given(
    st.integers(2, 4000),
    st.lists(st.floats(0, 1), min_size=2, max_size=5),
    st.floats(0, 1),
    st.sampled_from([1, 100]),
)
def test_as_many_rows_more_for_every_seed_are_equal_gains_however_they_are_rounded(
    rows, shares, gain, scale
):
    """Of 872 rows, three more for each seed would be sure at p = 1e-28."""
    theirs = [int(share * rows) for share in shares]
    more = int(gain * (rows - max(theirs)))
    a = {seed: scale * ((of + more) / rows) for seed, of in enumerate(theirs)}
    b = {seed: scale * (of / rows) for seed, of in enumerate(theirs)}
    found = paired_t_test(a, b)
    if more:
        assert found.difference.value == pytest.approx(scale * more / rows)
        assert math.isnan(found.p)
        assert math.isnan(found.difference.low)
    else:
        assert (found.difference, found.p) == ((0, 0, 0), 1)


def test_methods_without_a_common_seed_are_not_compared():
    with pytest.raises(ValueError, match=r"\[1, 2\] and \[3\]"):
        paired_t_test({1: 0.5, 2: 0.5}, {3: 0.5})


# Several comparisons ---------------------------------------------------------------------------


@given(p_values)
def test_adjusted_p_values_lie_between_the_given_and_bonferronis(p):
    found = holm(p)
    for name, value in p.items():
        assert value <= found[name] <= min(1.0, value * len(p))
    order = sorted(p, key=p.__getitem__)
    assert [found[name] for name in order] == sorted(found.values())
    assert found[order[0]] == min(1.0, p[order[0]] * len(p))


@given(p_values, st.floats(0.001, 0.999))
def test_rejecting_adjusted_values_is_holms_procedure(p, level):
    """One after another from the smallest, each at level/(those left), until the first that fails.

    Products are rounded, so comparisons that hang on a last digit are left out.
    """
    rejected, left = set(), len(p)
    for name in sorted(p, key=p.__getitem__):
        if abs(p[name] * left - level) < 1e-12:
            return
        if p[name] > level / left:
            break
        rejected.add(name)
        left -= 1
    assert {name for name, value in holm(p).items() if value <= level} == rejected


def test_a_test_that_could_not_be_made_does_not_count():
    found = holm({"a": 0.02, "b": math.nan, "c": 0.03})
    assert found["a"] == 0.04
    assert found["c"] == 0.04
    assert math.isnan(found["b"])
    with pytest.raises(ValueError, match=r"p-value of a must be between 0 and 1, got 1\.5"):
        holm({"a": 1.5})
