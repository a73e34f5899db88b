"""Tenants: who sends a request, what is there for it, how much it may use, and when the engine computes it."""
