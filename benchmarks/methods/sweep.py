"""The search for a method's learning rate, in factors of two, until the best rate is not at the edge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.methods.trial import Outcome, Results, Trial

SEEDS = (0, 1, 2)
_LOWEST, _HIGHEST = -12, 8  # limits of the search, as powers of two around 1e-3


def rate(power: int) -> float:
    """Return the learning rate 1e-3 x 2^power."""
    return float(f"{1e-3 * 2.0**power:.4g}")


def power_of(learning_rate: float) -> int:
    """Return the inverse of `rate`."""
    return round(math.log2(learning_rate / 1e-3))


@dataclass(frozen=True)
class Sweep:
    """Trials of one method that differ only in the learning rate; the search begins with five from rate(first)."""

    of: Trial  # all settings but the learning rate
    first: int

    def trials(self, results: Results) -> list[Trial]:
        """Return all trials that are needed so far, from the lowest rate to the highest, finished or not."""
        low, high = self.first, self.first + 4
        while True:
            found = [self.at(power) for power in range(low, high + 1)]
            if any(trial not in results for trial in found):
                return found
            best = min(range(len(found)), key=lambda i: results[found[i]].validation)
            if best == 0 and low > _LOWEST:
                low -= 1
            elif best == len(found) - 1 and high < _HIGHEST:
                high += 1
            else:
                return found

    def best(self, results: Results) -> Trial | None:
        """Return the trial with the lowest validation loss, or None if some trials are not finished."""
        found = self.trials(results)
        if any(trial not in results for trial in found):
            return None
        return min(found, key=lambda trial: results[trial].validation)

    def at(self, power: int) -> Trial:
        """Return the trial with the learning rate 1e-3 x 2^power."""
        return replace(self.of, learning_rate=rate(power))


def with_seeds(sweep: Sweep, results: Results) -> list[Trial]:
    """Return the trials of the sweep and, once its best rate is known, the trials at that rate with every seed."""
    best = sweep.best(results)
    return sweep.trials(results) + ([replace(best, seed=seed) for seed in SEEDS] if best else [])


def at_rate(trial: Trial, results: Results) -> list[Outcome]:
    """Return the finished runs of a trial, one for each seed."""
    return [found for seed in SEEDS if (found := results.get(replace(trial, seed=seed)))]


def at_best(sweep: Sweep, results: Results, seeds: Sequence[int] = SEEDS) -> list[tuple[Trial, Outcome]]:
    """Return the finished runs at the best rate, one for each seed."""
    best = sweep.best(results)
    wanted = [replace(best, seed=seed) for seed in seeds] if best else []
    return [(trial, results[trial]) for trial in wanted if trial in results]
