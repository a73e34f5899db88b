"""The search for a method's learning rate: factors of two, until the best one is not at the edge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.methods.trial import Outcome, Results, Trial

SEEDS = (0, 1, 2)
_LOWEST, _HIGHEST = -12, 8  # powers of two around 1e-3: beyond them nothing is searched


def rate(power: int) -> float:
    """Return the learning rate 1e-3 x 2^power."""
    return float(f"{1e-3 * 2.0**power:.4g}")


def power_of(learning_rate: float) -> int:
    """Return the power that `rate` makes a learning rate of."""
    return round(math.log2(learning_rate / 1e-3))


@dataclass(frozen=True)
class Sweep:
    """The trials of one method that differ by their learning rate; the first ones are five from rate(first)."""

    of: Trial  # its learning rate does not count
    first: int

    def trials(self, results: Results) -> list[Trial]:
        """Return all that are known to be needed, from the lowest rate to the highest, run or not."""
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
        """Return the trial of the best rate by validation loss; None while some are missing."""
        found = self.trials(results)
        if any(trial not in results for trial in found):
            return None
        return min(found, key=lambda trial: results[trial].validation)

    def at(self, power: int) -> Trial:
        return replace(self.of, learning_rate=rate(power))


def with_seeds(sweep: Sweep, results: Results) -> list[Trial]:
    """Return the sweep and, once its best rate is known, that rate with every seed."""
    best = sweep.best(results)
    return sweep.trials(results) + ([replace(best, seed=seed) for seed in SEEDS] if best else [])


def at_rate(trial: Trial, results: Results) -> list[Outcome]:
    """Return the runs that there are of a trial with every seed."""
    return [found for seed in SEEDS if (found := results.get(replace(trial, seed=seed)))]


def at_best(sweep: Sweep, results: Results, seeds: Sequence[int] = SEEDS) -> list[tuple[Trial, Outcome]]:
    """Return the runs at the best rate that there are, one for each seed."""
    best = sweep.best(results)
    wanted = [replace(best, seed=seed) for seed in seeds] if best else []
    return [(trial, results[trial]) for trial in wanted if trial in results]
