"""What a search will cost, before a weight is read: from config.json and the recipe's numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.pruning.judging_cost import JudgingCost
from pdtrim_deploy.recipe import CalibrationSection
from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.pruning import PruningSection
from pdtrim_deploy.recipe.pruning_methods import METHODS, Work, WorkEstimate, sublayer_work

_FLOAT = 4  # the search computes in float32
_SAMPLE = 5000  # tokens: measured on SmolLM2-135M's and Qwen2.5's vocabulary, of 256 to 1024 positions


@dataclass(frozen=True)
class SearchCost:
    """Of both stages' searches.

    Attributes:
        weights: bytes of the dense model in float32 that are in memory at a time.
        states: bytes of hidden states kept in memory, at most; `states_wanted` is what one whole model's would take.
        screened: bytes of the last states of candidates whose exact losses may be wanted.
        disk: bytes of hidden states kept in files, at most, those that students are fitted to among them.
        prompt_kv: bytes of the calibration prompts' K and V that decode's search reads.
        fitted: bytes of normal equations and new maps, where students are made or finalists refitted.
        most: block-forwards at most (blocks run, times sequences): no candidate stopped early.
        likely: with candidates stopped early about as often as on SmolLM2-135M.
        heads: sequences that run the LM head, likely; by a sample of the vocabulary in parts.
        flops: of the likely work; a token is multiplied with the experts that it is sent to alone.
        reads: bytes of blocks read from the checkpoint at most, where not all are in memory.

    """

    weights: int
    states: int
    states_wanted: int
    screened: int
    disk: int
    prompt_kv: int
    fitted: int
    most: int
    likely: int
    heads: int
    flops: float
    reads: int

    @property
    def memory(self) -> int:
        """Bytes at most, besides the program and what runs at the moment."""
        return self.weights + self.states + self.screened + self.prompt_kv + self.fitted


def search_cost(
    config: Mapping[str, Any],
    pruning: PruningSection,
    text: CalibrationSection,
    healing: HealingSection | None = None,
    work: WorkEstimate | None = None,
) -> SearchCost | None:
    """`config` is config.json's; None when no block is to go. Finalists are judged on the text of `healing`.

    `work` prices a search that is none of the recipe's methods.
    """
    if not pruning.decode_loses:
        return None
    sizes, method = ModelSizes.of(config), METHODS[pruning.method]
    blocks, count, length = sizes.blocks, text.sequences, text.length
    first, last = pruning.prefill_blocks, pruning.decode_blocks
    halves = pruning.prefill_sublayers, pruning.decode_sublayers - pruning.prefill_sublayers
    prefill_searched, decode_searched = pruning.searches
    most = likely = losses = flops = passes = 0.0
    batches = batch_count(count)
    if pruning.objective == "kl":  # the dense model's predictions
        judged, tokens = (healing.judged, healing.length) if healing and pruning.finalists else (0, 0)
        passes += 1 + bool(judged)
        most += blocks * (count + judged)
        likely += blocks * (count + judged)
        flops += 2 * sizes.active * blocks * (count * length + judged * tokens)
    stages = ((0, first, length, 0), (first, last, length - text.prompt, blocks - first))
    for (before, after, tokens, prompt), sublayers, searched in zip(stages, halves, pruning.searches, strict=True):
        if not searched:
            continue
        search = (work or method.work)(blocks, before, after, pruning.steps) + sublayer_work(blocks - after, sublayers)
        search = _with_heads(search, pruning, sizes.vocabulary)
        passes += method.passes(after - before + sublayers, pruning.steps, batches) + bool(prompt)
        most, likely = most + (search.most + prompt) * count, likely + (search.likely + prompt) * count
        losses += search.losses * count
        flops += count * tokens * 2 * (search.likely * sizes.active + search.losses * sizes.vocabulary * sizes.hidden)
        flops += count * (length - tokens) * 2 * prompt * sizes.active
    refits = False
    if healing is not None and pruning.finalists:
        judging, refits = JudgingCost.of(blocks, pruning, count, healing), healing.compensation == "least-squares"
        more = judging.judged + judging.windows + judging.ranking
        most, likely = most + more, likely + more
        passes += (
            judging.judged / (blocks * healing.judged) + judging.windows / blocks + judging.ranking / blocks / count
        )
        flops += 2 * sizes.active * (judging.judged * healing.length + (judging.windows + judging.ranking) * length)
        flops += sizes.fit_flops * judging.refitted_tokens
        # Decode is searched once more where finalists gave prefill another answer: seldom, so it is not likely work.
        if prefill_searched and decode_searched and pruning.judged > 1:
            again = method.work(blocks, first, last, pruning.steps) + sublayer_work(blocks - last, halves[1])
            most += (again.most + blocks - first) * count
            most += judging.judged_again
    if pruning.distil:  # redundancy and states by one pass each; each pair's student begins as the better of two
        taught, tokens = _student_text(pruning, text, healing)
        making, pairs = (count + 2 * taught) * blocks, blocks // 2
        most, likely = most + making, likely + making
        passes += making / blocks
        flops += 2 * sizes.active * blocks * (count * length + 2 * taught * tokens)
        flops += 2 * pairs * sizes.fit_flops * taught * tokens
    state = count * length * sizes.hidden * _FLOAT  # between two layers
    if method.evaluated:  # every state that is made is kept, as long as there is room
        states = min(pruning.memory_mb << 20, round(most / count) * state)
        disk = min(pruning.disk_mb << 20, round(most / count) * state - states)
    else:
        states, disk = (last + 1 if method.window else 2) * state, 0
    return SearchCost(
        weights=(min(blocks, pruning.blocks_in_memory or blocks) * sizes.block + sizes.ends) * _FLOAT,
        states=states + _window_states(pruning) * state,
        states_wanted=blocks * state,
        screened=round(_screened(pruning, sizes, count) * state / count),
        disk=disk + (_hidden_files(sizes, *_student_text(pruning, text, healing)) if pruning.distil else 0),
        prompt_kv=2 * blocks * count * text.prompt * sizes.kv_width * _FLOAT,
        fitted=fitted_bytes(sizes, pruning, refits) if refits or pruning.distil else 0,
        most=round(most),
        likely=round(likely),
        heads=round(losses),
        flops=flops,
        reads=round(passes) * blocks * block_bytes(config) if streamed(pruning, blocks) else 0,
    )


def _with_heads(work: Work, pruning: PruningSection, vocabulary: int) -> Work:
    """The same with screened losses among `losses`, each as its share of the vocabulary; without racing, all exact."""
    if not pruning.racing:
        return work.unraced
    share = 1.0 if pruning.objective == "kl" else min(1.0, _SAMPLE / vocabulary)
    return Work(work.most, work.likely, work.losses + share * work.screened)


def _screened(pruning: PruningSection, sizes: ModelSizes, sequences: int) -> int:
    """Sequences whose last states are kept: the number halves as the text doubles, down to the best two and the start.

    None where all losses are exact.
    """
    exact = pruning.objective == "kl" or not pruning.racing or sizes.vocabulary < 2 * _SAMPLE
    return 0 if exact or not METHODS[pruning.method].evaluated else max(sizes.blocks + 1, 3 * sequences)


def _window_states(pruning: PruningSection) -> int:
    """States between layers that a baseline compares, while the search's own are kept."""
    return pruning.decode_blocks + 1 if any(METHODS[name].window for name in pruning.baselines) else 0


def streamed(pruning: PruningSection, blocks: int) -> bool:
    """Whether blocks come from the checkpoint as they run."""
    return pruning.blocks_in_memory is not None and pruning.blocks_in_memory < blocks


def block_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the largest block in the checkpoint: of its dtype, or of a quantised one's codes."""
    item = ITEM_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), _FLOAT)
    return ModelSizes.of(config).block * (1 if config.get("quantization_config") else item)


def batch_count(sequences: int) -> int:
    """Parts of the calibration text: of 1, 1, 2, 4, 8, 8, ... sequences (`pruning.objective`)."""
    batches = done = 0
    while done < sequences:
        done += min(max(1, done), 8)
        batches += 1
    return batches


def fitted_bytes(sizes: ModelSizes, pruning: PruningSection, refits: bool) -> int:
    """Bytes of one block's normal equations, and of the maps that a stage's refit gives.

    Of the latter there is at most one a block, of each of the finalists that are compensated side by side; in front of
    decode's finalists, prefill's from either half of the text too.
    """
    held = max(1, pruning.judged) if pruning.blocks_in_memory is None else 1
    if pruning.finalists and all(pruning.searches):
        held += 2
    maps = held * sizes.blocks * sizes.inner * sizes.hidden if refits else 0
    return sizes.fit_bytes + _FLOAT * maps


def _student_text(pruning: PruningSection, text: CalibrationSection, healing: HealingSection | None) -> tuple[int, int]:
    """Sequences that students learn from, and their length (`pipeline.texts.taught`)."""
    if healing is None or not healing.enabled:
        return text.sequences, text.length
    return healing.taught(pruning.finalists), healing.length


def _hidden_files(sizes: ModelSizes, sequences: int, length: int) -> int:
    """Bytes of what students are fitted to (`students.states`)."""
    return (sizes.blocks + 1) * sequences * length * sizes.hidden * _FLOAT
