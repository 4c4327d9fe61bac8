"""What each step of a build takes, before a weight is read: memory, files and operations. No torch.

Memory is that of this process and of the builders that it starts; files that the operating system keeps in spare memory
are not counted, nor are those mapped files whose pages it may take back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pdtrim_deploy.bundle import ENGINES, engine_folder
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.body import body_config
from pdtrim_deploy.models.families import family_of, known_family
from pdtrim_deploy.models.families.latents import latent_sizes
from pdtrim_deploy.models.footprint import LOGITS, PROGRAM, Peak, read_ahead, read_bytes, weight_bytes
from pdtrim_deploy.models.weights import ModelSizes, one_expert, stored_bytes
from pdtrim_deploy.pipeline.continuation_costs import ContinuationCost, continuation_costs
from pdtrim_deploy.pipeline.engine_costs import engine_memory
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.pipeline.heal_costs import fit_bytes, heal_flops
from pdtrim_deploy.pipeline.joint_costs import joint_cost
from pdtrim_deploy.pipeline.step_cost import StepCost
from pdtrim_deploy.pipeline.training_costs import TrainingCost, holds_model, training_costs
from pdtrim_deploy.plan import STAGES, UNIFIED
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.pruning.cost import block_bytes, search_cost
from pdtrim_deploy.pruning.expert_cost import expert_cost
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.recipe.kv_cost import QUERIES_OF, STATES, kv_flops, selection_cost

_RANKED = 4  # sequences that candidates for KV alone are ranked on at a time
SHARD = 4e9  # of a stage, as `models.writer` cuts it
_TEACHER = 8 * 64 + 4  # bytes that KL keeps of the dense model's predictions at a position


def step_costs(recipe: Recipe, config: Mapping[str, Any], compute: Compute, workers: int = 0) -> dict[str, StepCost]:
    """By the names that `steps_of` gives steps; `compute` has the dtype that the recipe measures in.

    With `workers` of Ray's on this machine, each holds the search's memory once more.
    """
    return _Costs(recipe, config, compute, workers).all()


def limited_recipe(recipe: Recipe, compute: Compute) -> Recipe:
    """`recipe` with the limits of `compute` where they are lower than its own."""
    blocks = [count for count in (compute.blocks_in_memory, recipe.pruning.blocks_in_memory) if count is not None]
    megabytes = max(1, compute.states(recipe.pruning.memory_mb << 20) >> 20)
    pruning = {"blocks_in_memory": min(blocks, default=None), "memory_mb": megabytes}
    return recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update=pruning)})


class _Costs:
    def __init__(self, recipe: Recipe, config: Mapping[str, Any], compute: Compute, workers: int) -> None:
        self.recipe, self.workers = limited_recipe(recipe, compute), workers
        self.compute = compute.with_blocks(self.recipe.pruning.blocks_in_memory)
        self.config, self.sizes = config, ModelSizes.of(config)
        self.item = ITEM_BYTES[recipe.model.measured_in]
        self.loaded = 0.0  # a whole model that an earlier step of this process left in memory

    def all(self) -> dict[str, StepCost]:
        """In the order in which they run."""
        recipe, costs = self.recipe, {"source": self._source()}
        if recipe.calibration.continuations != "text":
            self._weights(whole=True)  # it writes the text that the next steps read
        if recipe.target is None:
            costs["prune"] = self._prune()
        else:
            costs["target"] = self._target()
        if recipe.pruning.experts is not None:
            costs["experts"] = self._experts()
        if needed(recipe):
            costs["heal"] = self._heal()
        costs["select-kv"] = self._select_kv()
        if recipe.healing.kv_steps:
            trainings = training_costs(recipe, self.config, behind_kv=True, streams=self._trains_streamed)
            costs["heal-kv"] = self._trained(trainings, self._healed())
        for step, spoken in continuation_costs(recipe, self.sizes, self.item).items():
            costs[step] = self._continued(costs[step], spoken)
        self.loaded = 0.0
        for stage in (UNIFIED,) if recipe.stages == "unified" else STAGES:
            lost = recipe.pruning.prefill_blocks if stage == "prefill" else recipe.pruning.decode_blocks
            size = self._stored(lost)
            peak = Peak.of(self.compute, 0.0, min(SHARD, size) + self._healed())
            if stage == "prefill" and recipe.healing.kv_only_tail:  # and the blocks that others run for K and V alone
                size += stored_bytes(body_config(self.config, recipe.healing.kv_only_blocks), recipe.model.dtype)
            costs[stage] = StepCost(peak, size, written=size)
        for target, section in recipe.targets.requested.items():
            for stage in STAGES:  # in a process of its own
                lost = recipe.pruning.decode_blocks  # prefill loses no more
                peak = Peak.of(self.compute, 0.0, engine_memory(section, self.sizes, recipe.model.dtype, lost))
                costs[engine_folder(target, stage)] = StepCost(peak, self.sizes.total * 4.0)
        files = sum(cost.disk for name, cost in costs.items() if cost.written or name.startswith(f"{ENGINES}/"))
        costs["seal"] = StepCost(Peak.of(self.compute, 0.0), hashed=files)
        return costs

    def _source(self) -> StepCost:
        """A converted model is written in shards, in float32; how long that and fetching it takes nobody knows."""
        if self.recipe.model.source.startswith("hf:"):
            return StepCost(Peak.of(self.compute, 0.0), hashed=self._stored(0))
        converted = self.sizes.total * 4.0
        return StepCost(Peak.of(self.compute, 0.0, min(SHARD, converted)), converted)

    def _prune(self) -> StepCost:
        recipe, sizes = self.recipe, self.sizes
        cost = self._searched()
        if cost is None:
            return self._step(0.0, flops=0.0)
        text = recipe.calibration
        kept = cost.memory - cost.weights
        teacher = _TEACHER * text.sequences * text.length if recipe.pruning.objective == "kl" else 0
        students = 4 * sizes.block * self.item if recipe.pruning.distil and self._streams else 0
        computing = self._weights() + kept + students + self._running(min(8, text.sequences), text.length)
        host = teacher + self.workers * (PROGRAM + cost.memory)
        candidate_blocks = 0 if recipe.pruning.distil else sizes.blocks  # run over the text first, for candidates.json
        flops = cost.flops + 2.0 * sizes.active * candidate_blocks * text.sequences * text.length
        return self._step(computing, host, cost.disk, flops, cost.reads + self._passes(candidate_blocks))

    def _target(self) -> StepCost:
        target, kv, sizes = self.recipe.target, self.recipe.kv, self.sizes
        assert target is not None
        cost = joint_cost(sizes, target, kv, self.item)
        return self._step(
            self._weights() + cost.memory, disk=cost.disk, flops=cost.flops, reads=self._passes(cost.block_reads)
        )

    def _experts(self) -> StepCost:
        cost = expert_cost(self.config, self.recipe.pruning, self.recipe.calibration)
        if cost is None:
            return self._step(0.0, flops=0.0)
        running = self._running(4, self.recipe.calibration.length)
        return self._step(self._weights() + self._kept_experts() + running, flops=cost.flops, reads=cost.reads)

    def _heal(self) -> StepCost:
        recipe, sizes, healing = self.recipe, self.sizes, self.recipe.healing
        fits = healing.compensation != "none" or healing.kv_only_blocks or recipe.pruning.distil
        states = 3 * healing.fitted * healing.length * sizes.hidden * self.item if fits else 0
        alone = sizes.kv + sizes.hidden * (sizes.hidden + sizes.inner)  # K and V, and zeros
        kept = healing.kv_only_blocks * alone * self.item
        maps = sizes.blocks * sizes.inner * sizes.hidden * self.item
        maps = maps if healing.compensation == "least-squares" else 0
        ranked, ranks = 0, healing.kv_only_blocks and not healing.kv_only_tail
        if ranks:  # a batch's states without each candidate (`pruning.kv_only.rank`)
            ranked = sizes.blocks * min(_RANKED, healing.fitted) * healing.length * sizes.hidden * self.item
        student = 16 * sizes.block if recipe.students.steps else 0
        running = self._running(min(8, healing.sequences), healing.length)
        disk = search.disk if (search := self._searched()) and recipe.pruning.distil else 0.0
        fitting = fit_bytes(recipe, sizes) + states + kept + ranked + student + running
        trainings = training_costs(recipe, self.config, streams=self._trains_streamed)
        return self._trained(trainings, kept + maps, fitting, disk, heal_flops(recipe, sizes))

    def _trained(
        self, trainings: list[TrainingCost], changed: float, fitting: float = 0.0, disk: float = 0.0, flops: float = 0.0
    ) -> StepCost:
        """A step that fits, then trains one stage after the other, beside `changed` bytes of changed weights."""
        peaks, files, saved = [fitting], [disk], 0.0
        for training in trainings:
            peaks.append(changed + training.memory)
            files.append(saved + 2 * training.files + training.kept)  # the old one and the new
            changed, saved = changed + training.left, saved + training.files + training.mapped
        # what was saved, or is mapped, goes after the cache has it
        files.append(saved + sum(training.left + training.mapped for training in trainings))
        step = self._step(
            self._weights(whole=bool(trainings) and not self._trains_streamed) + max(peaks),
            disk=max(files),
            flops=flops,
            reads=self._passes(4.0 * self.sizes.blocks + sum(t.block_reads for t in trainings) * self._missing)
            + sum(t.mapped_reads for t in trainings),
        )
        return replace(step, trainings=tuple(trainings), minutes=self.recipe.healing.minutes)

    def _select_kv(self) -> StepCost:
        kv = self.recipe.kv
        linear = known_family((self.config.get("architectures") or [""])[0]).linear_attention
        if kv.method in FIXED_KV and (not kv.measures_offsets or latent_sizes(self.config) or linear):
            return self._step(0.0, flops=0.0)
        if self.recipe.target is not None:  # rules are chosen already: where decode looks is all that is measured
            kv = kv.model_copy(update={"method": "attention-mass"})
        cost = selection_cost(self.config, self.sizes, kv, self.recipe.model.dtype, self.compute.states(STATES))
        running = self._running(1, kv.prompts[-1])
        if kv.measures_offsets:  # states of several sequences, and a layer's queries twice in float32
            running += kv.prompts[-1] * 4 * ((QUERIES_OF - 1) * self.sizes.hidden + 2 * self._query_width)
        computing = self._weights() + max(cost.memory, running) + self._kept_experts() + self._healed()
        flops, passes = kv_flops(kv, self.sizes, self.compute.states(STATES))
        return self._step(computing, disk=cost.disk, flops=flops, reads=self._passes(passes * self.sizes.blocks))

    def _continued(self, cost: StepCost, spoken: ContinuationCost) -> StepCost:
        """The step, with what the model writes before it: beside the whole model, which stays."""
        writing = Peak.of(self.compute, self.loaded + spoken.memory, 0.0, read_bytes(self.config))
        peak = Peak(max(cost.peak.host, writing.host), max(cost.peak.device, writing.device))
        flops = None if cost.flops is None else cost.flops + spoken.flops
        return replace(cost, peak=peak, disk=cost.disk + spoken.files, flops=flops)

    def _step(
        self, computing: float, host: float = 0.0, disk: float = 0.0, flops: float | None = None, reads: float = 0.0
    ) -> StepCost:
        ahead = read_ahead(self.config, self.compute)
        computing += ahead if self._streams else 0.0
        peak = Peak.of(self.compute, max(computing, self.loaded), host, read_bytes(self.config) + ahead)
        return StepCost(peak, disk, flops, reads if self._streams else 0.0)

    @property
    def _streams(self) -> bool:
        return self.compute.streams(self.sizes.blocks)

    @property
    def _trains_streamed(self) -> bool:
        return self._streams and not holds_model(self.recipe, self.sizes)

    def _weights(self, whole: bool = False) -> float:
        """Bytes of the model; a whole one stays in memory until the build ends."""
        bounded = None if whole else self.compute.blocks_in_memory
        weights = weight_bytes(self.config, self.recipe.model.measured_in, bounded)
        if whole or not self._streams:
            self.loaded = weights
        return weights if whole or not self._streams else weights + self.loaded

    def _running(self, sequences: int, tokens: int) -> float:
        """Bytes of one block's values while a batch goes through it, and of a slice of logits."""
        values = sequences * tokens * (6 * self.sizes.hidden + 3 * min(self.sizes.inner, self.sizes.expert_width * 8))
        return values * self.item + min(LOGITS, 3 * 4 * sequences * tokens * self.sizes.vocabulary)

    @property
    def _query_width(self) -> int:
        heads = int(self.config["num_attention_heads"])
        return heads * int(self.config.get("head_dim") or self.sizes.hidden // heads)

    @property
    def _missing(self) -> float:
        """Share of blocks that are read anew when the model runs once more, at most (`models.block_store`)."""
        blocks, held = self.sizes.blocks, self.compute.blocks_in_memory or self.sizes.blocks
        return min(1.0, (blocks - held + 2) / blocks)

    def _passes(self, block_reads: float) -> float:
        return block_reads * block_bytes(self.config)

    def _stored(self, lost: int) -> float:
        """Bytes of a stage's checkpoint."""
        return float(stored_bytes(self.config, self.recipe.model.dtype, lost))

    def _healed(self) -> float:
        """Bytes of the tensors that differ from the model's, of one stage.

        They lie in mapped files; where blocks come and go, those of one block count.
        """
        if not needed(self.recipe):
            return 0.0
        sizes = self.sizes
        if self._streams:
            return float(self.item * sizes.block)
        trained = sizes.block * sizes.blocks if self.recipe.healing.gradient_steps else 0
        refitted = sizes.inner * sizes.hidden * self.recipe.pruning.decode_blocks
        return float(self.item * max(trained, refitted))

    def _kept_experts(self) -> float:
        """Bytes of kept experts, of which each stage in memory has copies; streamed ones are cut when they come."""
        section = self.recipe.pruning.experts
        shape = family_of(dict(self.config), self.recipe.model.source).expert_shape(self.config)
        if section is None or shape is None or self._streams:
            return 0.0
        counts = [section.count(stage, shape.count) for stage in STAGES if getattr(section, stage) is not None]
        blocks, each = self.sizes.blocks, one_expert(self.config, self.sizes.blocks - 1)
        return float(self.item * sum(counts) * blocks * each)

    def _searched(self) -> Any:
        recipe = self.recipe
        return search_cost(self.config, recipe.pruning, recipe.calibration, recipe.healing)
