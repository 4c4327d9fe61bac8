"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import click

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import CHOICES, Compute
from pdtrim_deploy.plan import NativeDtype
from pdtrim_deploy.recipe.bounds import MOST_CLIENTS, MOST_REQUESTS, MOST_SECONDS, MOST_TOKENS, MOST_WORKERS
from pdtrim_deploy.serving.engines import EXECUTORS, Executors
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_deploy.worker.transport import TransportOptions


class NewFile(click.Path):
    """A file that a command writes at its end; refused at the start if it cannot be written."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, if it is `writable`."""
        return writable(Path(value), param.opts[-1] if param else "the file")


def writable(file: Path, name: str = "the report") -> Path:
    """`file`; UserError when it is a folder, a device, or cannot be created or replaced."""
    if file.is_dir():
        raise UserError(f"{name} {file} is a folder; name a file in it")
    if file.exists() and not file.is_file():
        raise UserError(f"{name} {file} is a device or a pipe, which a file would replace; name another file")
    folder = next(place for place in file.absolute().parents if place.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"{name} {file} cannot be written: {folder} is not a folder that you can write to; name another file"
        )
    return file


class FiniteRange(click.FloatRange):
    """A range that also refuses nan, which no bound excludes, and infinity where a bound is open."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def is_url(target: str) -> bool:
    """Whether a target is a URL, not a bundle; UserError for `HOST:PORT`, unless there is a folder of that name."""
    if "://" not in target and re.fullmatch(r"[\w.-]+:\d{1,5}(/.*)?", target) and not Path(target).exists():
        raise UserError(f"{target} is no bundle here; if it is the address of a running pair, give http://{target}")
    return "://" in target


path = click.Path(path_type=Path)
new_file = NewFile()
seconds = FiniteRange(1, MOST_SECONDS)
some_workers = click.IntRange(1, MOST_WORKERS)
some_clients = click.IntRange(1, MOST_CLIENTS)
some_requests = click.IntRange(1, MOST_REQUESTS)
json_flag = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for machines.")
dry_run = click.option(
    "--dry-run", is_flag=True, help="Check the input and print what would be done; start and write nothing."
)
serve_python = click.option("--serve-python", type=path, help="Python with SGLang.  [default: .venv/serve]")
split_pool = click.option(
    "--split-decode-pool",
    "split_pool",
    metavar="ISL:OSL",
    callback=lambda ctx, param, value: None if value is None else SplitPool.parse(value),
    help="Size the pools of decode's cut layers for requests of ISL prompt and OSL answer tokens.  "
    "[default: 4096:256, or shorter ones if fewer than 16 of those fit]",
)
cache_dir = click.option(
    "--cache-dir",
    "cache",
    type=path,
    callback=lambda ctx, param, value: Cache.default() if value is None else Cache(value),
    help="Where models and text are kept.  [default: the user's cache folder]",
)


class Bytes(click.ParamType):
    """`24GB` or `512MB`, decimal, as bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, above 0."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(GB|MB)", value.strip(), re.IGNORECASE)
        size = round(float(match[1]) * (1e9 if match[2].upper() == "GB" else 1e6)) if match else 0
        if not size:
            self.fail(f"{value!r} is no size above 0 with its unit, such as 24GB or 512MB", param, ctx)
        return size


class TokenCounts(click.ParamType):
    """`4096,8192`: numbers of tokens, ascending, each once."""

    name = "TOKENS,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, from 1,024 to the most of a prompt."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        if not all(re.fullmatch(r"\d{1,9}", word) and 1024 <= int(word) <= MOST_TOKENS for word in words):
            self.fail(f"{value!r} are no numbers of tokens from 1024 to {MOST_TOKENS}, such as 4096,8192", param, ctx)
        return tuple(sorted({int(word) for word in words}))


def device(
    command: Callable[..., Any], absent: Callable[[Mapping[str, Any]], bool] = lambda _: False
) -> Callable[..., Any]:
    """Three options, passed on as one argument `compute`; its GPUs may be absent where the others say so."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        device, host, on_device = (options.pop(name) for name in ("device", "memory", "device_memory"))
        compute = Compute.parse(device, absent=absent(options)).within(host, on_device)
        return command(*args, compute=compute, **options)

    size = Bytes()
    wrapped = click.option(
        "--device-memory",
        type=size,
        help="Memory that the command may take on all GPUs of --device together.  [default: no limit]",
    )(wrapped)
    wrapped = click.option(
        "--memory",
        type=size,
        help="Host memory that the command may take, such as 24GB. If the model does not fit, its blocks are read from "
        "disk as they run. The results are the same.  [default: no limit]",
    )(wrapped)
    return click.option(
        "--device",
        metavar="DEVICE",
        default="auto",
        show_default=True,
        help=f"Where the model runs: {CHOICES}; blocks are spread over several GPUs.",
    )(wrapped)


# of a command that prices, always or in its dry run, what another machine may do
priced_device = functools.partial(device, absent=lambda options: options.get("dry_run", True))


def _compute_dtype(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--compute-dtype", type=click.Choice(get_args(NativeDtype)), help=text)


compute_dtype = _compute_dtype("Dtype in which the model computes; the KV pool's dtype stays.  [default: the recipe's]")
oracle_dtype = _compute_dtype(
    "Dtype in which the oracle computes: the bundle's, as the pair does, or float32, which rounds less and takes twice "
    "the memory. Use float32 if a 16-bit check does not detect a wrong plan.  [default: the bundle's, or float32 if "
    "this CPU only emulates the bundle's]"
)


transport_options = click.option(
    "--transport-option",
    "transport_options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=lambda ctx, param, value: TransportOptions.parse(value),
    help="Option of the transport, such as stall_seconds=10 or staging_bytes=67108864; repeatable.",
)


def words(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Callback of an option whose value is split into words as in a shell."""
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise UserError(f"{param.opts[0]} {value!r}: {str(error).lower()}; quote its words as in a shell") from None


def executors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Three options, passed on as one argument `executors`; None when none was given."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        both, prefill, decode = (options.pop(f"{stage}executor") for stage in ("", "prefill_", "decode_"))
        chosen = Executors(prefill or both or "torch", decode or both or "torch") if both or prefill or decode else None
        return command(*args, executors=chosen, **options)

    choice = click.Choice(EXECUTORS)
    for option, text in (
        ("--decode-executor", "What computes decode; overrides --executor."),
        ("--prefill-executor", "What computes prefill; overrides --executor."),
        ("--executor", "What computes both stages: SGLang's torch model, or the bundle's engine.  [default: torch]"),
    ):
        wrapped = click.option(option, type=choice, help=text)(wrapped)
    return wrapped


class Lengths(click.ParamType):
    """`320`, or `200-400` for lengths drawn evenly from 200 to 400."""

    name = "N|LOW-HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(low, high), 1 <= low <= high <= MOST_TOKENS."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", value)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= MOST_TOKENS:
            self.fail(
                f"{value!r} is neither a length such as 320 nor a range such as 200-400, of at most {MOST_TOKENS}",
                param,
                ctx,
            )
        return low, high


class Duration(click.ParamType):
    """`500ms` or `2s`, as seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds, above 0."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|s)", value.strip())
        seconds = float(match[1]) / (1000 if match[2] == "ms" else 1) if match else 0.0
        if not seconds:
            self.fail(
                f"{value!r} is no time above 0 with its unit, such as 500ms or 2s, in at most 9 digits", param, ctx
            )
        return seconds
