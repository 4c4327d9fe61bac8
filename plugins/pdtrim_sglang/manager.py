"""The KV manager of one worker, on CommonKVManager of SGLang 0.5.23: checks the setup, then is prefill or decode."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from sglang.srt.disaggregation.common.conn import CommonKVManager, CommonKVReceiver
from sglang.srt.disaggregation.utils import DisaggregationMode

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.pack import prepare
from pdtrim_deploy.plan import PDPlan, Stage
from pdtrim_deploy.plan.heads import held_heads
from pdtrim_deploy.worker.config import WorkerConfig
from pdtrim_sglang import hook_targets, identity, sglang_host
from pdtrim_sglang.control import protect
from pdtrim_sglang.decode import DecodeSide
from pdtrim_sglang.draft import DraftRows
from pdtrim_sglang.pairing import unlike_draft_ranks, unlike_ranks, unlike_state_ranks
from pdtrim_sglang.plan_source import check_fits, check_padding, dense_plan, read_offsets, read_plan
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.prefill import PrefillSide
from pdtrim_sglang.requirements import (
    attention_backend,
    check_draft_ranks,
    check_options,
    check_staging,
    check_state_pool,
    check_window,
    check_windows,
    layers_unheard,
    loaded_windows,
)
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import TransportConfig, transport_named
from pdtrim_sglang.transports.handshake import Credentials

logger = logging.getLogger("sglang.srt.pdtrim.manager")


class PDTrimKVManager(CommonKVManager):
    """Owns the worker's side of all transfers. Complete after `attach`, which a hook calls with the KV pool."""

    kv_status_msg_tag = b"PDTRIM-STATUS"
    kv_status_msg_carries_reason = True
    reports_transfer_latency = True

    plan: PDPlan
    _offsets: KeyOffsets | None = None
    _sends_draft = False
    prefill_side: PrefillSide
    decode_side: DecodeSide

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False) -> None:
        hook_targets.check()
        self._given_plan = read_plan(server_args.model_path)
        self._offsets = read_offsets(server_args.model_path, self._given_plan)
        check_options(server_args, args, self._given_plan, is_mla_backend)
        self.prompts_announced: dict[int, int] = {}
        signature = identity.signature_of(server_args)
        identity.sign_requests(signature)  # prefill registers in the next line
        # Not MLA for SGLang: ranks that each hold a latent pair as ranks that hold copies of one head do.
        super().__init__(args, disaggregation_mode, server_args, False)
        self._secret = signature.credentials.secret
        protect(self.server_socket, (self._zmq_ctx, CommonKVReceiver._ctx), self._secret)

    @property
    def prefill_rank(self) -> int:
        """Rank of this prefill process, as decode counts responses."""
        return self._prefill_unique_rank()

    @property
    def worker_rank(self) -> int:
        """Rank of this process in its worker, over all of its data-parallel groups."""
        group = max(self.attn_dp_rank, self.system_dp_rank)  # equal under DP attention, else one is 0
        return int(group * self.attn_tp_size + self.attn_tp_rank)

    @property
    def serves_plan(self) -> bool:
        """Whether the worker's checkpoint is a stage of a plan; else it is a model that both workers serve."""
        return self._given_plan is not None

    def attach(self, pool: Any, model: Any, draft_pool: Any = None) -> None:
        """Start the worker's side on SGLang's KV pool; an engine as `model` packs what it computes for prefill.

        `draft_pool` is the pool of a draft model, where one runs.

        Raises:
            RuntimeError: the pool is not what the plan says, or of a kind that cannot be sent, or the staging buffer is
                too small for it, or texts may be longer than the model's sliding window.

        """
        view = PoolView.of(pool)
        stage: Stage = "prefill" if self.disaggregation_mode == DisaggregationMode.PREFILL else "decode"
        ranks = self.attn_tp_size, self.attn_tp_rank
        self.plan = self._given_plan or dense_plan(
            len(view.keys), view.buffers, model.config.num_key_value_heads, latents=view.latents
        )
        if self._given_plan is None and view.windowed is not None:
            self.plan = self.plan.with_windows(loaded_windows(model, len(view.keys)))
        check_fits(self.plan, stage, view.buffers, self.attn_tp_size)
        check_padding(self.plan, model.config)
        check_state_pool(self.plan, view.states, self.attn_tp_size)
        heads = held_heads(self.plan.model.num_kv_heads, *ranks)
        offsets = None if self._offsets is None else self._offsets.heads(heads)
        draft = None
        if draft_pool is not None:
            check_draft_ranks(self.plan, self.attn_tp_size)
            draft_view = PoolView.of(draft_pool)
            draft = DraftRows.of(
                draft_pool, draft_view.keys, draft_view.values, view.tokens, latents=draft_view.latents
            )
        view = replace(view, offsets=offsets, first_head=heads.start, draft=draft)
        if self.plan.model.windows or view.windowed is not None:
            check_windows(self.plan, stage, model, view, attention_backend(self.server_args, stage))
        elif self._given_plan:
            check_window(model.config, self.server_args.context_length)
        prepare(self.plan, view.keys[0], view.offsets, view.values[0])
        if draft is not None:
            draft.prepare()
            self._sends_draft = True
        aux = AuxRows(tuple(self.kv_args.aux_data_ptrs), tuple(self.kv_args.aux_item_lens))
        credentials = Credentials(bytes.fromhex(view.digest(self.plan)), self._secret)
        config = WorkerConfig.parse(self.server_args.json_model_override_args)
        transport = self.server_args.disaggregation_transfer_backend.removeprefix("pdtrim_")
        devices = sglang_host.ib_devices(self.kv_args)
        settings = TransportConfig.of(config.transport, credentials, devices, self.worker_rank)
        self.transport_config = transport_named(transport).slots_near(view.keys[0].device, settings)
        check_staging(self.plan, view, self.transport_config.staging_bytes)
        side = (self, self.plan, view, aux, transport, self.transport_config)
        if stage == "prefill":
            self.prefill_side = PrefillSide(*side)
            if getattr(model, "packs_rows", False) and self.transport_config.device is None:
                model.staging = self.prefill_side.stage_in_engine()
            if config.send_by_layer:
                self._send_by_layer(model)
        else:
            self.decode_side = DecodeSide(*side)
            self._start_heartbeat_checker_thread()

    def _send_by_layer(self, model: Any) -> None:
        if reason := layers_unheard(self.server_args, model, self.plan):
            logger.warning("pdtrim: rows leave when their forward pass has ended, not layer by layer: %s", reason)
        else:
            layerwise = self.prefill_side.send_by_layer()
            logger.info("pdtrim: rows of finished layers leave in parts of %d bytes or more", layerwise.least_bytes)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Called in decode until its first pairing with a prefill worker succeeds.

        Raises:
            RuntimeError: they cannot be paired, whatever the request. It ends this worker, as SGLang's own comparison
                of page sizes and dtypes does: every later request would fail alike.

        """
        known = bootstrap_addr in self.prefill_info_table
        answered: bool = super().try_ensure_parallel_info(bootstrap_addr)
        if answered and not known:
            info = self.prefill_info_table[bootstrap_addr]
            ranks = info.attn_tp_size, self.attn_tp_size
            reason = unlike_ranks(*ranks) or (unlike_draft_ranks(*ranks) if self._sends_draft else "")
            reason = reason or (unlike_state_ranks(*ranks) if self.plan.model.states else "")
            if reason:
                raise RuntimeError(f"pdtrim: cannot decode for the prefill worker at {bootstrap_addr}: {reason}")
            # SGLang has each rank of prefill send its copy of a head; here the first of them does.
            info.required_prefill_response_num = self.decode_side.pair(info.attn_tp_size)
        return answered

    def build_receiver_registration_message(self) -> list[bytes]:
        return self.decode_side.register_message()

    def build_receiver_metadata_message(
        self, *, bootstrap_room: int, required_dst_info_num: int, decode_prefix_len: int | None, **_: Any
    ) -> list[bytes]:
        prompt_tokens = self.prompts_announced[bootstrap_room]
        return self.decode_side.room_message(
            bootstrap_room, prompt_tokens, decode_prefix_len or 0, required_dst_info_num
        )
