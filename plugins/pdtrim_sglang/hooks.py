"""Every private interface of SGLang that this plugin touches, in one place. Read against SGLang 0.5.23.

`install` registers the hooks, SGLang applies them (and only logs a failure), so `check` is called when a worker
builds its KV manager and refuses to start when one did not take.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtrim_sglang.signature import Signature

READ_AGAINST = "0.5.23"
DISAGGREGATION = "sglang.srt.disaggregation"
GET_KV_CLASS = f"{DISAGGREGATION}.utils.get_kv_class"
CREATE_SENDER = f"{DISAGGREGATION}.prefill.PrefillBootstrapQueue.create_sender"
PREFILL_MANAGER = f"{DISAGGREGATION}.prefill.PrefillBootstrapQueue._init_kv_manager"
DECODE_MANAGER = f"{DISAGGREGATION}.decode.DecodePreallocQueue._init_kv_manager"
PRE_ALLOC = f"{DISAGGREGATION}.decode.DecodePreallocQueue._pre_alloc"
ADMISSION = f"{DISAGGREGATION}.decode.DecodePreallocQueue._required_admission_tokens"
SEND_METADATA = f"{DISAGGREGATION}.decode.DecodePreallocQueue._send_kv_metadata"
TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
KV_POOL, ALLOCATOR = f"{CONFIGURATOR}._build_mha_kv_pool", f"{CONFIGURATOR}._build_token_to_kv_pool_allocator"
CELL_SIZE = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
# SGLang's own factories by the name of `--attention-backend`, and what stands in their place once they are wanted.
ATTENTION = {"triton": "SparseTritonBackend", "flashinfer": "SparseFlashInferBackend"}
VALIDATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
VALIDATE_COMPLETION = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request"
TARGETS = (
    GET_KV_CLASS, CREATE_SENDER, PREFILL_MANAGER, DECODE_MANAGER, PRE_ALLOC, ADMISSION, SEND_METADATA, TORCH_NATIVE,
    KV_POOL, ALLOCATOR, CELL_SIZE, VALIDATE, VALIDATE_COMPLETION,
)  # fmt: skip


def install() -> None:
    """Register the transfer backends `pdtrim_<transport>` and all hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from pdtrim_sglang.attention.torch_native import SparseTorchNativeBackend

    _add_transfer_backends()
    _replace_attention_backends()
    HookRegistry.register(GET_KV_CLASS, _kv_class, HookType.AROUND)
    HookRegistry.register(CREATE_SENDER, _name_prompt_of_sender, HookType.AROUND)
    HookRegistry.register(PREFILL_MANAGER, _attach_pool, HookType.AFTER)
    HookRegistry.register(DECODE_MANAGER, _attach_pool, HookType.AFTER)
    HookRegistry.register(PRE_ALLOC, _note_prompt_length, HookType.AROUND)
    HookRegistry.register(ADMISSION, _ask_sparse_layers, HookType.AROUND)
    HookRegistry.register(KV_POOL, _split_pool, HookType.AROUND)
    HookRegistry.register(ALLOCATOR, _split_allocator, HookType.AROUND)
    HookRegistry.register(CELL_SIZE, _split_cell_size, HookType.AROUND)
    HookRegistry.register(SEND_METADATA, _name_prompt_of_receiver, HookType.AROUND)
    HookRegistry.register(TORCH_NATIVE, SparseTorchNativeBackend, HookType.REPLACE)
    HookRegistry.register(VALIDATE, _refuse_request, HookType.AROUND)
    HookRegistry.register(VALIDATE_COMPLETION, _refuse_completion, HookType.AROUND)


def check() -> None:
    """Raise RuntimeError, naming the targets, unless every hook was applied."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.version import __version__

    untaken = {
        f"ATTENTION_BACKENDS[{name}]"
        for name in ATTENTION
        if not isinstance(ATTENTION_BACKENDS.get(name), SparseFactory)
    }
    if missing := sorted(set(TARGETS) - HookRegistry._patched | untaken):
        raise RuntimeError(
            f"pdtrim: SGLang {__version__} did not take the hooks {', '.join(missing)}; this plugin was written for "
            f"SGLang {READ_AGAINST}: install that version"
        )


def end_worker() -> None:
    """Called in a scheduler's process: as SGLang ends a worker whose scheduler has failed, all processes of it."""
    os.kill(os.getppid(), signal.SIGQUIT)


def server_arguments() -> Any:
    """What this process of a worker was started with."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def signature_of(server_args: Any) -> Signature:
    """What a worker signs with: its secret, and the digest of its checkpoint's plan (zeros where there is none)."""
    from sglang.srt.utils.network import get_local_ip_auto

    from pdtrim_sglang.plan_source import read_plan
    from pdtrim_sglang.secret import read_secret
    from pdtrim_sglang.signature import Signature
    from pdtrim_sglang.transports.handshake import Credentials

    plan = read_plan(server_args.model_path)
    # KV comes in at the one, SGLang's bootstrap server listens at the other
    secret = read_secret(server_args.json_model_override_args, get_local_ip_auto(), server_args.host)
    return Signature(Credentials(bytes.fromhex(plan.digest) if plan else bytes(32), secret))


def sign_requests(signature: Signature) -> None:
    """From now on whatever SGLang's KV managers, senders and receivers ask over HTTP is signed."""
    from sglang.srt.disaggregation.common import conn

    from pdtrim_sglang.signature import SignedRequests

    conn.requests = SignedRequests(signature)


def backend_name(transport: str) -> str:
    """Value of `--disaggregation-transfer-backend` for a transport."""
    return f"pdtrim_{transport}"


def _add_transfer_backends() -> None:
    from sglang.srt.arg_groups.choices import add_disagg_transfer_backend_choices
    from sglang.srt.disaggregation.utils import TransferBackend

    from pdtrim_sglang.transports import TRANSPORTS

    names = [backend_name(name) for name in TRANSPORTS]
    add_disagg_transfer_backend_choices(names)
    for value in names:  # an Enum cannot be subclassed once it has members: add to its tables
        if value not in TransferBackend._value2member_map_:
            member: Any = object.__new__(TransferBackend)
            member._name_, member._value_ = value.upper(), value
            member._sort_order_ = len(TransferBackend._member_names_)
            TransferBackend._member_names_.append(member._name_)
            TransferBackend._member_map_[member._name_] = member
            TransferBackend._value2member_map_[value] = member


@dataclass(frozen=True)
class SparseFactory:
    """Makes our backend where SGLang's registry would make its own; imports neither before that."""

    name: str
    original: Callable[[Any], Any]

    def __call__(self, runner: Any) -> Any:
        """The backend of one model runner: SGLang's own where no layer of its plan is cut."""
        from pdtrim_sglang.attention.sparse_layers import sparse_windows

        if not sparse_windows(runner):
            return self.original(runner)
        module = importlib.import_module(f"pdtrim_sglang.attention.{self.name}")
        options = {"init_new_workspace": runner.init_new_workspace} if self.name == "flashinfer" else {}
        return getattr(module, ATTENTION[self.name])(runner, **options)


def _replace_attention_backends() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for name in ATTENTION:
        if not isinstance(ATTENTION_BACKENDS[name], SparseFactory):
            ATTENTION_BACKENDS[name] = SparseFactory(name, ATTENTION_BACKENDS[name])


def _kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    from sglang.srt.disaggregation.utils import KVClassType

    if not str(transfer_backend.value).startswith("pdtrim_") or class_type == KVClassType.KVARGS:
        return original(transfer_backend, class_type)
    from pdtrim_sglang.bootstrap import PDTrimBootstrapServer
    from pdtrim_sglang.manager import PDTrimKVManager
    from pdtrim_sglang.receiver import PDTrimKVReceiver
    from pdtrim_sglang.sender import PDTrimKVSender

    return {
        KVClassType.MANAGER: PDTrimKVManager,
        KVClassType.SENDER: PDTrimKVSender,
        KVClassType.RECEIVER: PDTrimKVReceiver,
        KVClassType.BOOTSTRAP_SERVER: PDTrimBootstrapServer,
    }[class_type]


def _attach_pool(manager: Any, queue: Any) -> Any:
    attach = getattr(manager, "attach", None)
    if attach is not None:
        model = queue.scheduler.tp_worker.model_runner.model
        attach(queue.token_to_kv_pool, model)
    return manager


def _name_prompt_of_sender(original: Callable[..., bool], queue: Any, req: Any, *args: Any, **kwargs: Any) -> bool:
    made = original(queue, req, *args, **kwargs)
    named = getattr(req.disagg_kv_sender, "named", None) if made else None  # SGLang's own warm-up has a fake sender
    if named is not None:
        named(req.rid, len(req.origin_input_ids))
    return made


def _prompt_tokens(req: Any) -> int:
    """Tokens whose KV prefill computes: on a re-bootstrap after retraction the tokens emitted so far belong to it.

    They still do when the request is retracted once more and comes back from its backup.
    """
    if getattr(req, "pd_rebootstrap_in_progress", False):
        req.pdtrim_prompt_tokens = len(req.origin_input_ids) + len(req.output_ids)
    return int(getattr(req, "pdtrim_prompt_tokens", len(req.origin_input_ids)))


def _name_prompt_of_receiver(original: Callable[..., None], queue: Any, decode_req: Any, *args: Any, **kw: Any) -> None:
    receiver, scheduler = decode_req.kv_receiver, queue.scheduler
    receiver.prompt_tokens = _prompt_tokens(decode_req.req)
    # Overlapped, a request that has ended has one more forward pass under way, which writes into slots given out again.
    overlapped = scheduler.enable_overlap and scheduler.device != "cpu"
    receiver.forward_done = scheduler.forward_stream.record_event() if overlapped else None
    original(queue, decode_req, *args, **kw)


def _note_prompt_length(original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    prompt, allocator = _prompt_tokens(req), queue.token_to_kv_pool_allocator
    with getattr(allocator, "prompt", contextlib.nullcontext)(prompt):
        allocated = original(queue, req, *args, **kwargs)
    lengths = getattr(queue.req_to_token_pool, "pdtrim_prompt_tokens", None)
    if lengths is not None:
        lengths[req.kv.req_pool_idx] = prompt
    return allocated


def _ask_sparse_layers(original: Callable[..., int], queue: Any, req: Any, *args: Any, **kwargs: Any) -> int:
    """What admission must find free in the full layers: more than there is while the sparse ones have no room.

    No more than the pool has: SGLang wants 512 tokens beside the prompt, and a longer prompt would wait for ever.
    """
    allocator = queue.token_to_kv_pool_allocator
    tokens = min(original(queue, req, *args, **kwargs), allocator.size)
    if not hasattr(allocator, "prompt"):
        return tokens
    from pdtrim_sglang.split_pool.admission import has_room

    room = has_room(queue, req, _prompt_tokens(req))
    return tokens if room else allocator.size + allocator.page_size + 1


def _split_pool(original: Callable[..., Any], configurator: Any, *, mha_pool_class: Any, **given: Any) -> Any:
    from pdtrim_sglang.split_pool.build import pool_class

    return original(configurator, mha_pool_class=pool_class(configurator, mha_pool_class, **given), **given)


def _split_allocator(original: Callable[..., Any], configurator: Any, *, token_to_kv_pool: Any, **given: Any) -> Any:
    from pdtrim_sglang.split_pool.allocator import split_allocator
    from pdtrim_sglang.split_pool.pool import SplitKVPool

    made = original(configurator, token_to_kv_pool=token_to_kv_pool, **given)
    return split_allocator(made) if isinstance(token_to_kv_pool, SplitKVPool) else made


def _split_cell_size(original: Callable[..., int], sizer: Any, configurator: Any, *args: Any, **kwargs: Any) -> int:
    from pdtrim_sglang.split_pool.build import token_bytes

    return token_bytes(configurator, original(sizer, configurator, *args, **kwargs))


def _refuse_request(original: Callable[..., None], manager: Any, request: Any, input_ids: Any) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from pdtrim_sglang.clients import bad_logprobs, bad_prompt, bad_stop_regex

    original(manager, request, input_ids)
    if server_arguments().disaggregation_mode == "null":
        return
    vocabulary = manager.model_config.vocab_size
    if input_ids is None:  # the two stages would not agree on the prompt, and wait for each other
        raise ValueError("prompts of embeddings are not supported here; give text or token ids")
    problem = bad_prompt(input_ids, vocabulary)
    if isinstance(request, GenerateReqInput):
        problem = problem or bad_logprobs(request.logprob_start_len, request.top_logprobs_num, vocabulary)
        problem = problem or bad_stop_regex(request.sampling_params.get("stop_regex"))
    if problem:
        raise ValueError(problem)  # SGLang answers 400


def _refuse_completion(original: Callable[..., str | None], serving: Any, request: Any) -> str | None:
    from pdtrim_sglang.clients import scored_echo

    problem = original(serving, request)
    if problem or server_arguments().disaggregation_mode == "null":
        return problem
    return scored_echo(request.echo, request.logprobs)
