"""The adapters of one server: their versions on disk, in the engine's memory, and the names that point at them.

version      the immutable files of one adapter, named by the digest of their bytes
alias        a public name; it points at the current version, and at a canary if there is one
lease        a request uses a version: from its admission to its last byte
hold         a publication uses a version: it prepares it, or serves it for the first time (`control`)
residence    a version's state in the engine's memory, with its leases and holds
proof        the engine's answers to a version's probe, which no version is served without
pinned       never evicted while an alias serves it
"""
