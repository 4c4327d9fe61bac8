"""Conversations of agents with decode's radix cache and without it -> results/agentic.json. `make bench-agentic`.

As `bench-conversation`, with the first turns of scenarios/agentic.yaml, and Qwen2.5-Coder-0.5B. Both pairs are up at
once: 16 GB of memory. A turn costs prefill and decode more the longer the conversation has grown.
"""

from __future__ import annotations

import argparse

from __results import write
from conversation import ROOT, measure, uniform

from pdtrim_deploy.loadtest import Scenario
from pdtrim_deploy.loadtest.scenario import Arrivals

POOL_TOKENS = 49_152
TURNS = 8  # of the scenario's 16, to prompts of 16k tokens; the model's context of 32,768 tokens holds 14 of any seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="conversations")
    parser.add_argument(
        "--turns", type=int, default=TURNS, choices=range(1, 15), metavar="N", help="turns of each (14 at most)"
    )
    parser.add_argument("--link", default="100Mbps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scenario = Scenario.load(ROOT / "scenarios" / "agentic.yaml")
    assert scenario.conversations is not None
    conversations = scenario.conversations.model_copy(update={"turns": options.turns})
    scenario = scenario.changed(
        arrivals=Arrivals(clients=1), conversations=conversations, requests=options.turns, warmup=0
    )
    bundle = uniform("qwen2.5-coder-0.5b", ROOT / "out" / "bench-agentic")
    print(write("agentic", options, measure(bundle, scenario, POOL_TOKENS, options)))


if __name__ == "__main__":
    main()
