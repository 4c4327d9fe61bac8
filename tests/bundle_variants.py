"""Bundles that differ from a built one only in their KV rules, made in seconds instead of by a build."""

import json
import os
import shutil

from pdtrim_deploy.bundle import PLAN, RECIPE, Bundle, entries, seal
from pdtrim_deploy.plan import STAGES, KVSend
from pdtrim_deploy.plan.wire import WIRE_DTYPES


def variant(bundle, kv, folder):
    """A sealed bundle in `folder` with the stage models of `bundle` (hard links) and the rules `kv`."""
    plan = bundle.plan.with_kv(tuple(kv))
    data = plan.model_dump(mode="json")
    for stage in STAGES:
        for file in (path for path in bundle.stage_dir(stage).rglob("*") if path.is_file()):
            copied = folder / file.relative_to(bundle.path)
            copied.parent.mkdir(parents=True, exist_ok=True)
            if file.name == "config.json":
                copied.write_text(json.dumps(json.loads(file.read_text()) | {"pdtrim": data}))
            else:
                os.link(file, copied)
    (folder / PLAN).write_text(json.dumps(data))
    shutil.copy(bundle.path / RECIPE, folder / RECIPE)
    seal(folder, bundle.manifest.model_copy(update={"plan_digest": plan.digest, "files": entries(folder)}))
    return Bundle.open(folder)


def all_in(wire, bundle):
    """The rules of `bundle`, all in one wire dtype."""
    return tuple(send.model_copy(update={"wire_dtype": wire}) for send in bundle.plan.kv)


def mixed(bundle):
    """Rules whose rows (some a share of the prompt) and wire dtypes differ from layer to layer, and full layers."""
    sizes = [(4, 64, 0), (1, 96, 0), (8, 24, 160), (16, 128, 0), (0, 20, 320)]  # the last number: share of the prompt
    return tuple(
        KVSend(wire_dtype=WIRE_DTYPES[(layer + layer // 6) % 6])
        if layer % 6 == 5
        else KVSend(
            mode="sparse",
            n_first=sizes[layer % 5][0],
            n_last=sizes[layer % 5][1],
            share=sizes[layer % 5][2],
            wire_dtype=WIRE_DTYPES[(layer + layer // 6) % 6],
        )
        for layer in range(len(bundle.plan.kv))
    )


if (
    __name__ == "__main__"
):  # python tests/bundle_variants.py BUNDLE OUT: every one of them, for `pdtrim-deploy fidelity`
    import sys
    from pathlib import Path

    source, out = Bundle.open(Path(sys.argv[1])), Path(sys.argv[2])
    for name in WIRE_DTYPES:
        variant(source, all_in(name, source), out / name)
    variant(source, mixed(source), out / "mixed")
