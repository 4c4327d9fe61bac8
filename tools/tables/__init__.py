"""The tables of README and docs by name, with the benchmarks/results/*.json that each reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tables import (
    build,
    demo,
    equalbytes,
    front,
    generated,
    gpu,
    heal,
    kv,
    kvdistil,
    kvdistil_brown,
    latents,
    mixture,
    objective,
    pruning,
    quality,
    racing,
    requestrows,
    searchtime,
    serving,
    shares,
    sublayers,
    tail,
    width,
)


@dataclass(frozen=True)
class Table:
    """`render` takes the content of each of `sources`, in their order; a source is a file's stem.

    Of a source that is `optional` and not there it takes None.
    """

    sources: tuple[str, ...]
    render: Callable[..., str]
    optional: bool = False


TABLES = {
    "switches": Table(
        (
            "kv",
            "wire",
            "kvdistil",
            "prefilltime",
            "heal",
            "claims",
            "generated",
            "equalbytes",
            "tail",
            "quality",
            "ttft",
        ),
        front.switches,
    ),
    "proof": Table(("served", "faults"), front.proof),
    "gpu": Table(("gpu-check",), gpu.gpu, optional=True),
    "gpuparts": Table(("gpu-check",), gpu.gpuparts, optional=True),
    "gpucolumn": Table(("gpu-check",), gpu.gpucolumn, optional=True),
    "demo": Table(("demo",), demo.demo),
    "demolimited": Table(("demolimited",), demo.demolimited, optional=True),
    "headline": Table(("headline",), demo.headline, optional=True),
    "claims": Table(("claims",), demo.demo),
    "kv": Table(("kv",), kv.kv),
    "kvlengths": Table(("kv",), kv.kvlengths),
    "equalbytes": Table(("equalbytes",), equalbytes.equalbytes, optional=True),
    "shares": Table(("shares",), shares.shares, optional=True),
    "requestrows": Table(("requestrows",), requestrows.requestrows, optional=True),
    "generated": Table(("generated",), generated.generated, optional=True),
    "wire": Table(("wire",), kv.wire),
    "pack": Table(("pack",), kv.pack),
    "latents": Table(("latents",), latents.latents),
    "launches": Table(("launches",), kv.launches),
    "choice": Table(("choice",), kv.choice),
    "pruning": Table(("pruning",), pruning.pruning),
    "downstream": Table(("pruning",), pruning.downstream),
    "searchcost": Table(("pruning",), pruning.searchcost),
    "objective": Table(("objective",), objective.objective),
    "mixture": Table(("mixture",), mixture.mixture, optional=True),
    "racing": Table(("racing",), racing.racing, optional=True),
    "sublayers": Table(("sublayers",), sublayers.sublayers, optional=True),
    "width": Table(("width",), width.width, optional=True),
    "heal": Table(("heal",), heal.heal, optional=True),
    "build": Table(("build",), build.build, optional=True),
    "searchtime": Table(("searchtime",), searchtime.searchtime, optional=True),
    "steptime": Table(("steptime",), pruning.steptime),
    "kvonly": Table(("kvonly",), pruning.kvonly),
    "kvdistil": Table(("kvdistil",), kvdistil.kvdistil, optional=True),
    "kvdistilbrown": Table(("kvdistilbrown",), kvdistil_brown.kvdistilbrown),
    "kvdistilchoice": Table(("kvdistil",), kvdistil.kvdistilchoice, optional=True),
    "tail": Table(("tail",), tail.tail, optional=True),
    "ttft": Table(("ttft",), tail.ttft, optional=True),
    "prefilltime": Table(("prefilltime",), pruning.prefilltime),
    "quality": Table(("quality",), quality.quality),
    "served": Table(("served",), serving.served),
    "engines": Table(("engines",), serving.engines),
    "compare": Table(("compare",), serving.compare),
    "transport": Table(("transport",), serving.transport),
    "faults": Table(("faults",), serving.faults),
    "overlap": Table(("overlap",), serving.overlap),
    "conversation": Table(("conversation",), serving.conversation),
    "agentic": Table(("agentic",), serving.agentic),
    "bylayer": Table(("bylayer",), serving.bylayer, optional=True),
    "smallchunks": Table(("overlap",), serving.smallchunks),
    "simulation": Table(("simulation",), serving.simulation),
}
