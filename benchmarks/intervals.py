"""How often 95 % intervals of a mean, and of the chance of the copy test, hold what they should.

    python benchmarks/intervals.py           # two minutes of processor time
    python benchmarks/intervals.py --save    # the same, put into benchmarks/results

Sets of 5, 16 and 50 simulated values, whose true mean is known. *Outer* is `microgen.core.mean_interval`: at each end
the outer one of Student's and of Hall's interval. The others are bootstraps with 999 resamples
(Efron and Tibshirani 1993). Widths are medians over the sets, over the width of Student's interval.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from results import write
from scipy.special import ndtr, ndtri, stdtrit
from scipy.stats import norm

from microgen.core import mean_interval
from microgen.metrics.sets import copy_test

SIZES = (5, 16, 50)  # values of a set
RESAMPLES = 999
AT_ONCE = 250  # sets
DISTRIBUTIONS = {  # name to (values of a shape, true mean)
    "normal": (lambda rng, shape: rng.standard_normal(shape), 0),
    "exponential": (lambda rng, shape: rng.standard_exponential(shape), 1),
    "log-normal, σ = 0.5": (lambda rng, shape: rng.lognormal(0, 0.5, shape), np.exp(0.125)),
    "log-normal, σ = 1": (lambda rng, shape: rng.lognormal(0, 1, shape), np.exp(0.5)),
    "Student, 3 degrees of freedom": (lambda rng, shape: rng.standard_t(3, shape), 0),
    "Student, 2 degrees of freedom": (lambda rng, shape: rng.standard_t(2, shape), 0),
}
CHANCES = (0.5, 0.8, 0.95)  # that a generated image is further from the training set


def student(values, resampled):
    "Student's interval."
    n = values.shape[1]
    half = stdtrit(n - 1, 0.975) * values.std(1, ddof=1) / np.sqrt(n)
    return values.mean(1) - half, values.mean(1) + half


def outer(values, resampled):
    "The interval of the package."
    return mean_interval(values)


def percentile(values, resampled):
    "Percentiles of the resampled means: what the package had before."
    return np.quantile(resampled.mean(2), (0.025, 0.975), axis=1)


def bca(values, resampled):
    "Bias-corrected and accelerated percentiles."
    mean, means = values.mean(1), resampled.mean(2)
    below = ((means < mean[:, None]).mean(1) + (means <= mean[:, None]).mean(1)) / 2
    bias = ndtri(below.clip(1e-3, 1 - 1e-3))
    deviation = values - mean[:, None]
    acceleration = (deviation**3).sum(1) / (6 * (deviation**2).sum(1) ** 1.5)
    ends = []
    for z in ndtri([0.025, 0.975]):
        levels = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append(np.array([np.quantile(m, level) for m, level in zip(means, levels)]))
    return ends


def bootstrap_t(values, resampled):
    "Resampled values of Student's t in place of its quantiles."
    n = values.shape[1]
    mean = values.mean(1, keepdims=True)
    error = values.std(1, ddof=1) / np.sqrt(n)
    own_error = np.maximum(resampled.std(2, ddof=1) / np.sqrt(n), 1e-9 * error[:, None])
    t = (resampled.mean(2) - mean) / own_error
    low, high = np.quantile(t, (0.025, 0.975), axis=1)
    return mean[:, 0] - high * error, mean[:, 0] - low * error


METHODS = {
    "percentiles": percentile,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
    "Student": student,
    "outer": outer,
}


def of_means(repeats, seed=0):
    "(distribution, method, n) to coverage and width over Student's."
    rng = np.random.default_rng(seed)
    found = {}
    for name, (values_of, true) in DISTRIBUTIONS.items():
        for n in SIZES:
            held = dict.fromkeys(METHODS, 0)
            widths = {method: [] for method in METHODS}
            for _ in range(repeats // AT_ONCE):
                values = values_of(rng, (AT_ONCE, n))
                which = rng.integers(n, size=(AT_ONCE, RESAMPLES, n))
                resampled = np.take_along_axis(values[:, None, :], which, 2)
                for method, interval in METHODS.items():
                    low, high = interval(values, resampled)
                    held[method] += int(((low <= true) & (true <= high)).sum())
                    widths[method] += list(high - low)
            for method in METHODS:
                width = np.median(widths[method]) / np.median(widths["Student"])
                found[name, method, n] = held[method] / repeats, width
    return found


def of_chances(repeats, seed=0):
    "(chance, n) to coverage of the copy test's interval, n generated and n unseen images."
    rng = np.random.default_rng(seed)
    train = np.zeros((2, 1))  # distances to it are the absolute values of the features
    found = {}
    for chance in CHANCES:
        shift = np.sqrt(2) * norm.ppf(chance)
        for n in SIZES:
            held = 0
            for _ in range(repeats):
                unseen, fake = 100 + rng.standard_normal((2, n, 1))
                estimate, _ = copy_test(train, unseen, fake + shift)
                held += estimate.low <= chance <= estimate.high
            found[chance, n] = held / repeats
    return found


def saved(means, chances, repeats):
    "What the page shows."
    rows = []
    for (name, method, n), (coverage, width) in means.items():
        case = f"{name}: {method}"
        about = {"case": case, "unit": "1", "n": repeats}
        rows.append({"what": f"coverage, n = {n}", "value": coverage, **about})
        rows.append({"what": f"width over Student's, n = {n}", "value": width, **about})
    for (chance, n), coverage in chances.items():
        row = {"what": f"coverage, n = {n}", "case": f"copy test, chance {chance}"}
        rows.append({**row, "value": coverage, "unit": "1", "n": repeats})
    return rows


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--repeats", type=int, default=2000, help="simulated sets of each kind")
    args.add_argument("--save", action="store_true", help="put the numbers into benchmarks/results")
    args = args.parse_args()
    means, chances = of_means(args.repeats), of_chances(args.repeats)
    for (name, method, n), (coverage, width) in means.items():
        print(f"{name:30} {method:12} n = {n:<3} {coverage:6.3f}  width {width:.2f}")
    for (chance, n), coverage in chances.items():
        print(f"copy test, chance {chance:<13} score        n = {n:<3} {coverage:6.3f}")
    if args.save:
        write("intervals", saved(means, chances, args.repeats))
