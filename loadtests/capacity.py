"""How many replicas, and how much memory, for so many tenants: arithmetic from measured figures.

    python loadtests/capacity.py --tenants 10,1000,100000

Each tenant has one adapter; tenants ask by a power law. A replica of ``--slots`` adapters holds the
most recently used ones of its share of the tenants (with affinity 1/R of them, else all). How often
a request finds its adapter resident is Che's approximation of an LRU cache (Che, Tung and Wang,
"Hierarchical Web caching systems", 2002): with T such that sum_i (1 - exp(-p_i T)) = slots, the
adapter of popularity p_i is there with probability 1 - exp(-p_i T).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from workload import popularity


@dataclass(frozen=True, slots=True)
class Assumptions:
    """``tokens_s``: output tokens a second of one replica with mixed adapters, measured.

    ``busy``: the share of it to plan with. Memory in megabytes: ``base_mb``, of a server that has
    answered nothing yet; ``kv_mb``, its KV cache, which fills up whatever the traffic is (the
    prefix cache keeps what it can); ``adapter_mb``, one adapter's bytes, on disk, host and device
    alike.
    """

    request_s: float = 0.01
    output_tokens: int = 128
    alpha: float = 1.0
    tokens_s: float = 224.0
    busy: float = 0.7
    slots: int = 64
    base_mb: float = 1000.0
    kv_mb: float = 1074.0
    adapter_mb: float = 9.8


@dataclass(frozen=True, slots=True)
class Plan:
    """What so many tenants need. ``hit`` and ``hit_random``: the share of requests whose adapter is
    resident, with affinity and without; ``loads_s``: loads a second of one replica.
    """

    tenants: int
    rate: float
    replicas: int
    hit: float
    hit_random: float
    loads_s: float
    replica_mb: float
    disk_mb: float


def lru_hit(shares: Sequence[float], slots: int) -> float:
    """The share of requests that find their adapter among ``slots``; ``shares`` sum to 1."""
    if slots >= len(shares):
        return 1.0
    low, high = 0.0, 1.0
    while _filled(shares, high) < slots:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _filled(shares, middle) < slots else (low, middle)
    return sum(p * -math.expm1(-p * high) for p in shares)


def plan(tenants: int, given: Assumptions) -> Plan:
    """The arithmetic. With affinity a replica has every R-th tenant by popularity."""
    rate = tenants * given.request_s
    tokens = rate * given.output_tokens
    replicas = max(1, math.ceil(tokens / (given.busy * given.tokens_s)))
    shares = popularity(tenants, given.alpha)
    own = shares[::replicas] if replicas < tenants else shares[:1]
    total = sum(own)
    hit = lru_hit([p / total for p in own], given.slots)
    held = min(given.slots, len(own))
    return Plan(
        tenants=tenants,
        rate=rate,
        replicas=replicas,
        hit=hit,
        hit_random=lru_hit(shares, given.slots),
        loads_s=(1 - hit) * rate / replicas,
        # Resident adapters are on the device and on the host.
        replica_mb=given.base_mb + given.kv_mb + 2 * held * given.adapter_mb,
        disk_mb=tenants * given.adapter_mb,
    )


def _filled(shares: Sequence[float], time: float) -> float:
    return sum(-math.expm1(-p * time) for p in shares)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    default = Assumptions()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tenants", default="10,1000,100000", help="comma-separated")
    for name in Assumptions.__dataclass_fields__:
        value = getattr(default, name)
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(p.parse_args(argv))
    tenants = [int(n) for n in args.pop("tenants").split(",")]
    titles = ("tenants", "requests/s", "replicas", "resident (affinity / random)")
    titles += ("loads/s a replica", "memory a replica", "disk")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for made in (plan(n, Assumptions(**args)) for n in tenants):
        print(
            f"| {made.tenants:,} | {made.rate:g} | {made.replicas:,} | {made.hit:.0%} / "
            f"{made.hit_random:.0%} | {made.loads_s:.2f} | {made.replica_mb / 1e3:.1f} GB | "
            f"{made.disk_mb / 1e3:,.1f} GB |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
