"""Write deploy/: what `pdtrim-deploy deploy render` gives for a plan of SmolLM2 with sparse layers, as a base to read.

.venv/build/bin/python tools/deploy_base.py      # what `make deploy` runs; a test checks that deploy/ is up to date
"""

import json
import sys
from pathlib import Path

from pdtrim_deploy.manifests import BundleAt, Options, Served, compose, kubernetes, yaml_text
from pdtrim_deploy.manifests.dashboard import dashboard

ROOT = Path(__file__).resolve().parent.parent / "deploy"
HEAD = (
    "# Written by `make deploy`. For your bundle: pdtrim-deploy deploy render BUNDLE --prefill 2 --decode 6 --out DIR\n"
)
# The digest is a stand-in: `deploy render` puts the bundle's there.
SERVED = Served("my-model", "0" * 64, "bfloat16", sparse=True)


def files() -> dict[str, str]:
    """Contents of deploy/, by path."""
    documents_of = {
        f"base/{name}": documents for name, documents in kubernetes(SERVED, Options(prefill=2, decode=6)).items()
    }
    documents_of["compose.yaml"] = [compose(SERVED, Options(bundle=BundleAt("host", "/srv/bundle")))]
    texts = {name: HEAD + yaml_text(docs) for name, docs in documents_of.items()}
    return texts | {"grafana/pdtrim-kv.json": json.dumps(dashboard(), indent=2) + "\n"}


def main(root: Path = ROOT) -> None:
    """Write all files."""
    for name, text in files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
