"""One vLLM engine, one copy of the base, hundreds of adapters: the request's `model` picks one."""
