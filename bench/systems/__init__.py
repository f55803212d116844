"""The systems that the benchmarks time. A system has a name and

    layer(problem) -> y                     the whole layer with its router
    experts(problem, ids, weights) -> y     the experts alone, where errors are measured
    profiled, replayed                      whether its busy time and its CUDA graphs are measured
    lacking                                 why the installed packages cannot be it, or None

and dense products have `products(problem)` in their place."""

from __future__ import annotations

from collections.abc import Callable

from bench.systems.cublas import Cublas
from bench.systems.grouped_mm import CompiledGroupedMM, GroupedMM
from bench.systems.official import OfficialSonicMoE
from bench.systems.sonicmoe import SonicMoE

SYSTEMS: dict[str, Callable] = {
    "sonicmoe": lambda: SonicMoE("sonicmoe", replayed=True),
    "sonicmoe-atomic": lambda: SonicMoE("sonicmoe-atomic", deterministic=False),
    OfficialSonicMoE.name: OfficialSonicMoE,
    GroupedMM.name: GroupedMM,
    CompiledGroupedMM.name: CompiledGroupedMM,
    Cublas.name: Cublas,
}


def systems_named(names: list[str] | None) -> list:
    """Those systems, else all of them; what the installed package lacks is left out with a note."""
    systems = []
    for name in names or SYSTEMS:
        system = SYSTEMS[name]()
        if lacking := getattr(system, "lacking", None):
            print(f"{name}: skipped, {lacking}", flush=True)
            continue
        systems.append(system)
    return systems
