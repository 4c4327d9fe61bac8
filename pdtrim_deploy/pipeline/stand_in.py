"""A plan of the size that a recipe will give, before anything was measured: what previews and prices are made from."""

from __future__ import annotations

from collections.abc import Collection

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import (
    STAGES,
    Action,
    BlockExperts,
    Drop,
    ExpertShape,
    Keep,
    KeptExperts,
    KVOnly,
    KVSend,
    ModelShape,
    PDPlan,
    Stage,
    WithoutAttention,
    WithoutMLP,
)
from pdtrim_deploy.plan.wire import WIRE_DTYPES
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.kv import FIXED_KV, KVSection, cut_to


def stand_in(recipe: Recipe, shape: ModelShape, experts: ExpertShape | None = None) -> PDPlan:
    """With the last blocks removed, the first ones without sublayers, the first experts kept and the first layers cut.

    The first of those that are left whole are KV-only blocks, with a tail the last.

    Blocks with windows go before others, so that as many layers can be cut as any choice of blocks leaves.

    Raises:
        UserError: head size and KV pool allow no wire dtype of the recipe, no choice of blocks and options fits its
            byte budget, or it cuts more layers than attend to all tokens.

    """
    shape = shape.with_pool(recipe.kv.pool_dtype)
    _check_wire(recipe, shape)
    pruning, blocks = recipe.pruning, range(shape.num_blocks)
    leaving = sorted(blocks, key=lambda block: (shape.window(block) is None, -block))[: pruning.decode_blocks]
    staying = [block for block in blocks if block not in leaving]
    plan = PDPlan.uncut(
        shape,
        _without_sublayers(
            actions(len(blocks), leaving[: pruning.prefill_blocks]),
            staying[: pruning.prefill_attentions],
            staying[pruning.decode_attentions :][: pruning.prefill_mlps],
        ),
        _without_sublayers(
            actions(len(blocks), leaving),
            staying[: pruning.decode_attentions],
            staying[pruning.decode_attentions :][: pruning.decode_mlps],
        ),
    )
    if shape.states is None and recipe.healing.kv_only_blocks:
        plan = _with_kv_only(plan, recipe.healing)
    plan = plan.with_kv(_target_rules(recipe, plan) if recipe.target else _stand_in_rules(recipe.kv, plan))
    plan = plan.with_parts(experts=_first_experts(recipe, plan, experts))
    return plan.with_parts(unified=recipe.stages == "unified")


def _with_kv_only(plan: PDPlan, healing: HealingSection) -> PDPlan:
    """The first blocks that both stages run whole are run by prefill for K and V alone; with a tail prefill's last."""
    whole = [block for block in plan.model.kv_blocks if plan.prefill[block] == plan.decode[block] == Keep()]
    count, tail = healing.kv_only_blocks, healing.kv_only_tail
    alone = plan.last_whole_blocks[-count:] if tail else whole[:count]
    if not alone:
        return plan
    prefill = tuple(KVOnly() if block in alone else action for block, action in enumerate(plan.prefill))
    return plan.with_parts(prefill=prefill, kv_only_tail=tail)


def _without_sublayers(
    whole: tuple[Action, ...], attentions: Collection[int], mlps: Collection[int]
) -> tuple[Action, ...]:
    """`whole` with the blocks `attentions` without attention, and those of `mlps` without MLP."""
    return tuple(
        WithoutAttention() if block in attentions else WithoutMLP() if block in mlps else action
        for block, action in enumerate(whole)
    )


def _first_experts(recipe: Recipe, plan: PDPlan, shape: ExpertShape | None) -> KeptExperts | None:
    """As many as the recipe keeps, of each group of the router; None where both stages keep all."""
    if (section := recipe.pruning.experts) is None or shape is None:
        return None
    entries = dict[Stage, tuple[BlockExperts, ...]]()
    for stage in STAGES:
        if (keep := section.count(stage, shape.count)) < shape.count:
            group, each = shape.count // shape.groups, keep // shape.groups
            kept = tuple(group * at + number for at in range(shape.groups) for number in range(each))
            blocks = [block for block in plan.layers(stage) if block >= shape.first_block]
            entries[stage] = tuple(BlockExperts(block=block, kept=kept) for block in blocks)
    return KeptExperts(shape=shape, **entries) if entries else None


def _check_wire(recipe: Recipe, shape: ModelShape) -> None:
    kv = recipe.kv
    key, choices = ("wire_choices", kv.wire_choices) if kv.method == "budget" else ("wire_dtype", (kv.wire_dtype,))
    fit = [wire for wire in WIRE_DTYPES if shape.suits(KVSend(wire_dtype=wire))]
    latent = "" if shape.rope_dim is None else f", a latent's, and its rope key's {shape.rope_dim}"
    sizes = f"head size is {shape.head_dim}{latent}"
    sizes += "" if shape.pool_dtype == "native" else f" and the KV pool {shape.pool_dtype}"
    if not set(choices) & set(fit):
        raise UserError(
            f"recipe {recipe.name}: kv.{key} is {', '.join(choices)} but the model's {sizes}; "
            f"allowed with it: {', '.join(fit)}"
        )


def caveat(section: KVSection, plan: PDPlan) -> str:
    """How far the stand-in's KV rules can be trusted."""
    if section.reduction is not None:
        sizes = " and ".join(f"{plan.reduction(at):.2f}x at {at} prompt tokens" for at in section.prompts)
        return f"the layers' KV as small as {sizes}, in a mix that may differ"
    if section.max_loss is not None or section.threshold is not None:
        return "how much KV is cut is known only once it is built: whole KV is shown, the most there can be"
    sparse = sum(send.mode == "sparse" for send in plan.kv)
    return f"{sparse} of {len(plan.kv)} decode layers are sparse; which ones changes no figure here"


def actions(blocks: int, removed: Collection[int]) -> tuple[Action, ...]:
    """Keep all but `removed`."""
    return tuple(Drop() if block in removed else Keep() for block in range(blocks))


def fixed_rules(section: KVSection, layers: int) -> tuple[KVSend, ...]:
    """The rules of a method that looks at no model; `PDPlan.with_kv` says what they mean for blocks with windows."""
    return ((_sparse if section.method == "all" else _full)(section),) * layers


def _target_rules(recipe: Recipe, plan: PDPlan) -> tuple[KVSend, ...]:
    """As small as the target has it, where all blocks stay; their least where it asks for more."""
    section, target = recipe.kv, recipe.target
    if section.method in FIXED_KV or target is None:
        return fixed_rules(section, len(plan.kv))
    if target.kv is None:
        return (KVSend(),) * len(plan.kv)
    try:
        return _within(section, target.kv, plan)
    except UserError:  # the target is lowered, or decode's attentions go: known once effects are measured
        shape, tokens = plan.model, section.prompt_tokens
        least = min(filter(shape.suits, section.options()), key=lambda send: _bytes(shape, send, tokens))
        return (least,) * len(plan.kv)


def _full(section: KVSection) -> KVSend:
    return KVSend(wire_dtype=section.wire_dtype)


def _sparse(section: KVSection) -> KVSend:
    return cut_to(section.n_first, section.n_last, section.share, wire_dtype=section.wire_dtype)


def _stand_in_rules(section: KVSection, plan: PDPlan) -> tuple[KVSend, ...]:
    """The rules of a fixed method; for one that chooses, as many of each kind as it will give, in any order.

    How many a threshold or a largest loss will cut is not known: nothing is cut, an upper bound. A byte budget is
    filled with two neighbours of: whole in the widest dtype, whole in the narrowest, least rows in the narrowest. Of
    layers with windows all rows travel, and others are cut before them.

    Raises:
        UserError: no choice of blocks and options fits the byte budget, or more layers are to be cut than attend to all
            tokens, whatever blocks go.

    """
    if section.method in FIXED_KV:
        return fixed_rules(section, len(plan.kv))
    if section.reduction is not None:
        return _within(section, section.reduction, plan)
    if section.method == "budget":
        return (KVSend(),) * len(plan.kv)
    shape = plan.model
    cuttable = min(sum(shape.window(block) is None for block in range(shape.num_blocks)), len(plan.kv))
    if section.sparse_layers > cuttable:
        raise UserError(
            f"kv.sparse_layers is {section.sparse_layers} but at most {cuttable} of decode's layers attend to all "
            f"tokens, and a window's rows cannot be cut; allowed: {cuttable} at most"
        )
    return _mixed(plan, section.sparse_layers, _sparse(section), _full(section))


def _mixed(plan: PDPlan, count: int, less: KVSend, more: KVSend) -> tuple[KVSend, ...]:
    """`less` in `count` layers, those without windows before those with, and `more` in the others."""
    windowed = [plan.model.window(block) is not None for block in plan.decode_kv_blocks]
    first = set(sorted(range(len(windowed)), key=windowed.__getitem__)[:count])
    return tuple(less if layer in first else more for layer in range(len(windowed)))


def _within(section: KVSection, reduction: float, plan: PDPlan) -> tuple[KVSend, ...]:
    """The largest mix that fits the byte budget; the smallest where other blocks than the stand-in's would fit it.

    Raises:
        UserError: no choice of as many blocks fits it.

    """
    shape, tokens = plan.model, section.prompt_tokens
    dense = plan.dense_bytes(tokens)

    def size(send: KVSend) -> int:
        """As `PDPlan.layer_cost`."""
        return max(-(-_bytes(shape, send, n) * dense // plan.dense_bytes(n)) for n in section.prompts)

    options = [option for option in section.options() if shape.suits(option)]
    wide, narrow = max(options, key=size), min((o for o in options if o.mode == "full"), key=size)
    least = min(options, key=size)
    smallest = sorted(min(size(shape.rule(b, option)) for option in options) for b in range(shape.num_blocks))
    if (most := dense / sum(smallest[: len(plan.kv)])) < reduction:
        raise UserError(
            f"kv.reduction is {reduction:g} but the smallest options give at most {most:.2f}x at "
            f"{tokens} prompt tokens; lower it, or add smaller sparse_choices or wire_choices"
        )
    for more, less in ((wide, narrow), (narrow, least)):
        for count in range(len(plan.kv) + 1):
            rules = _mixed(plan, count, less, more)
            mixed = plan.with_kv(rules)
            if all(mixed.payload_bytes(n) <= plan.dense_bytes(n) / reduction for n in section.prompts):
                return rules
    return rules


def _bytes(shape: ModelShape, send: KVSend, tokens: int) -> int:
    rows, first = send.rows(tokens), send.row_ranges(tokens)[0][0] == 0
    return shape.packed_bytes(send.wire_dtype, rows, first)
