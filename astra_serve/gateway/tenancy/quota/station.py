"""The first station of a request: its tenant's limits, before its adapter is loaded and before anything is computed."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.quota import estimate
from astra_serve.gateway.tenancy.quota.standing import are_limited
from astra_serve.gateway.tenancy.quota.store import Store


class Quota:
    """Admits requests within the limits of their tenants; those without a tenant, or limits, pass at once."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @asynccontextmanager
    async def station(self, request: Request, content: Mapping[str, Any]) -> AsyncIterator[None]:
        """Reserve what a request may use, and settle when it has ended; its answer has the headers of OpenAI's limits.

        The limits are those of the keys document at the request's arrival. Raises LimitExceeded.
        """
        tenant = request.caller.tenant
        if tenant is None or not are_limited(tenant.limits):
            yield
            return
        limits = tenant.limits
        tokens = estimate.tokens(request.path, content, limits.default_max_tokens)
        answer = await self._store.reserve(tenant.name, limits, tokens)
        request.answer_headers += answer.standing.headers(limits)
        if answer.reservation is None:
            refusal = answer.standing.refusal(limits, tokens)
            assert refusal is not None, "a script of Redis has decided otherwise than `Standing`"
            raise refusal
        try:
            yield
        finally:
            await self._store.settle(answer.reservation, request.prompt_tokens + request.output_tokens)
