"""llama.cpp's server as a process, from the package xllamacpp.

python -m benchmarks.llamacpp_server --model FILE --port PORT --slots N --length TOKENS [--lora FILE ...]
"""

import argparse
import os
import signal
from pathlib import Path


def main() -> None:
    """Serve until SIGTERM. A request chooses adapters by llama.cpp's field `lora`; without it none is applied."""
    import xllamacpp  # optional, see `benchmarks.llamacpp`

    parser = argparse.ArgumentParser(prog="python -m benchmarks.llamacpp_server")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="simultaneous requests")
    parser.add_argument("--length", type=int, required=True, help="tokens of a request")
    parser.add_argument("--lora", type=Path, action="append", default=[])
    args = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = str(args.model), args.port
    settings.n_parallel, settings.n_ctx = args.slots, args.slots * args.length
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    settings.lora_init_without_apply = True
    adapters = []
    for file in args.lora:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(file), 1.0
        adapters.append(adapter)
    settings.lora_adapters = adapters
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # the server's threads do not end otherwise


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # for `sigwait`, in all threads
    main()
