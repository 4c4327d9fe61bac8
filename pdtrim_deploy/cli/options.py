"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from pdtrim_deploy.cache import Cache

path = click.Path(path_type=Path)
json_flag = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for machines.")
cache_dir = click.option(
    "--cache-dir",
    "cache",
    type=path,
    callback=lambda ctx, param, value: Cache.default() if value is None else Cache(value),
    help="Where models and text are kept.  [default: the user's cache folder]",
)
