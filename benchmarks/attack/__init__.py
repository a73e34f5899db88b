"""Does one bad adapter, document, request or source harm anybody else? `python -m benchmarks.attack --out FILE.json`.

    target      the server that is attacked, its good neighbours, and what counts as harm
    requests    hand-made requests to both ports
    sockets     what HTTP clients do not send: endless headers, half requests, many idle connections
    publishing  hostile adapters, sources that fail or hang, hostile documents
    pressure    more adapters than fit into a batch, with a cache that is too small
    storm       swaps, disconnects and hostile publications at once, while every answer is compared
    fuzz        schemathesis on the OpenAPI documents of both ports

Each try has a name, and a fault or none. After every stage the neighbours are asked again.
"""
