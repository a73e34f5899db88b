"""What a tenant has used of its limits, and the decisions that follow from it: pure functions of numbers.

A minute slides: it has two counters, of the present minute and of the one before, and counts of the latter the part
that lies less than a minute back, as if its tokens had been used evenly. So it needs two numbers however much is used,
no tenant can use twice its limit around the turn of a minute, and a reservation that is given back is taken from the
counter that it was added to. A day is a calendar day in UTC. All times are in milliseconds.
"""

import math
from dataclasses import dataclass

from astra_serve.document.keys import TenantLimits
from astra_serve.errors import LimitExceeded

MINUTE, DAY = 60_000, 86_400_000
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Window:
    """The counters of a sliding minute, and the time until the present one becomes the one before."""

    previous: int
    current: int
    left: int

    def fits(self, amount: int, limit: int) -> bool:
        """Return whether `amount` more is within the limit, in whole numbers: a script of Redis decides the same."""
        return (self.current + amount - limit) * MINUTE + self.previous * self.left <= 0

    def remaining(self, limit: int) -> int:
        """Return the largest amount that fits."""
        return max(0, limit - self.current - -(-self.previous * self.left // MINUTE))

    def wait(self, amount: int, limit: int) -> int:
        """Return the time until `amount` fits if nothing else is used; it is not larger than the limit."""
        room = limit - self.current - amount
        if room >= 0:
            return max(0, self.left - room * MINUTE // self.previous) if self.previous else 0
        return self.left + Window(self.current, 0, MINUTE).wait(amount, limit)

    @property
    def reset(self) -> int:
        """Return the time until the whole limit remains if nothing else is used."""
        return self.left + MINUTE if self.current else self.left if self.previous else 0


EMPTY = Window(0, 0, 0)


@dataclass(frozen=True)
class Standing:
    """What a tenant has used at one moment."""

    tokens: Window  # of prompts and answers, with those that are reserved
    today: int  # tokens
    day_left: int  # the time until the day ends
    running: int  # requests
    requests: Window = EMPTY
    requests_fit: bool = True  # the request was within the limit of requests per minute

    def refusal(self, limits: TenantLimits, tokens: int) -> LimitExceeded | None:
        """Return why a request of so many tokens is refused, by the limit that it has to wait for longest."""
        found = [*self._of_requests(limits), *self._of_tokens(limits, tokens)]
        if not found:
            return None
        wait, kind, message = max(found)
        if math.isinf(wait):
            return LimitExceeded(f"{message}: send a shorter prompt, or ask for fewer tokens", None, kind)
        seconds = max(1, math.ceil(wait / 1000))
        return LimitExceeded(f"{message}: try again in {duration(seconds)}", seconds, kind)

    def _of_requests(self, limits: TenantLimits) -> list[tuple[float, str, str]]:
        """Return the time to wait, the kind and the message of each limit of requests that is reached."""
        found: list[tuple[float, str, str]] = []
        if (most := limits.requests_per_minute) is not None and not self.requests_fit:
            found.append((self.requests.wait(1, most), "requests", f"the limit of {most} requests per minute is used"))
        if (most := limits.requests_at_a_time) is not None and self.running >= most:
            found.append((1000, "requests", f"the limit is {most} requests at a time, and {self.running} run"))
        return found

    def _of_tokens(self, limits: TenantLimits, tokens: int) -> list[tuple[float, str, str]]:
        """Return the same of each limit of tokens; the time is infinite where the request never fits."""
        found: list[tuple[float, str, str]] = []
        most = limits.tokens_per_minute
        if most is not None and not self.tokens.fits(tokens, most):
            wait = self.tokens.wait(tokens, most) if tokens <= most else math.inf
            left = self.tokens.remaining(most)
            found.append((wait, "tokens", _used(f"{most} tokens per minute", left, tokens)))
        most = limits.tokens_per_day
        if most is not None and self.today + tokens > most:
            wait = self.day_left if tokens <= most else math.inf
            found.append((wait, "tokens", _used(f"{most} tokens a day (UTC)", max(0, most - self.today), tokens)))
        return found

    def headers(self, limits: TenantLimits) -> Headers:
        """Return OpenAI's headers for the limits that exist; of tokens, those per minute rather than those a day."""
        found: Headers = []
        if (most := limits.requests_per_minute) is not None:
            found += _headers("requests", most, self.requests.remaining(most), self.requests.reset)
        if (most := limits.tokens_per_minute) is not None:
            found += _headers("tokens", most, self.tokens.remaining(most), self.tokens.reset)
        elif (most := limits.tokens_per_day) is not None:
            reset = self.day_left if self.today else 0
            found += _headers("tokens", most, max(0, most - self.today), reset)
        return found


def are_limited(limits: TenantLimits) -> bool:
    """Return whether there is any limit."""
    return any(getattr(limits, name) is not None for name in TenantLimits.model_fields if name != "default_max_tokens")


def duration(seconds: int) -> str:
    """Return a duration as OpenAI writes it, such as 1s, 6m0s and 1h0m0s."""
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours}h" * (hours > 0) + f"{minutes % 60}m" * (minutes > 0) + f"{seconds % 60}s"


def _used(limit: str, left: int, tokens: int) -> str:
    return f"the limit is {limit}, {left} are left, and this request may use {tokens}"


def _headers(kind: str, limit: int, remaining: int, reset: int) -> Headers:
    values = {"limit": str(limit), "remaining": str(remaining), "reset": duration(math.ceil(reset / 1000))}
    return [(f"x-ratelimit-{what}-{kind}".encode(), value.encode()) for what, value in values.items()]
