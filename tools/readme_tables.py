"""Write the tables of README and docs from benchmarks/results/*.json.

Tables are between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Between `<!-- ran: SUBJECT -->` and `<!-- end -->`
stands whether a subject of gpu-check.json ran.

.venv/build/bin/python tools/readme_tables.py                                   # what `make readme` runs
.venv/build/bin/python tools/readme_tables.py --demo out/demo/report/metrics.json   # keep a demo's figures first

Pictures of benchmarks are copied to docs/benchmarks, since mkdocs takes files from below docs/ alone.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from tables import TABLES
from tables.gpu import SUBJECTS, ran

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RAN = re.compile(r"(<!-- ran: (.+?) -->).*?(<!-- end -->)", re.DOTALL)
PICTURES = ("kv.svg", "pruning.svg")


def pages(root: Path = ROOT) -> list[Path]:
    """README and the hand-written pages of docs/."""
    return [
        root / "README.md",
        *(page for page in sorted((root / "docs").rglob("*.md")) if "reference" not in page.parts),
    ]


def names(text: str) -> list[str]:
    """Names of the tables in a page."""
    return re.findall(r"<!-- ([a-z]+):begin -->", text)


def written(text: str, results: Path = RESULTS) -> str:
    """The page with every table made anew.

    Raises:
        SystemExit: a marker without an end, an unknown table or subject, or missing results.

    """
    for name in names(text):
        if name not in TABLES:
            raise SystemExit(f"{name} is no table; choose from {', '.join(TABLES)}")
        before, _, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not end:
            raise SystemExit(f"<!-- {name}:begin --> has no <!-- {name}:end -->")
        sources = [results / f"{source}.json" for source in TABLES[name].sources]
        missing = [path for path in sources if not path.exists()]
        if missing and not TABLES[name].optional:
            raise SystemExit(f"{missing[0]} is not there; run: make bench-{missing[0].stem}")
        body = TABLES[name].render(*(None if path in missing else json.loads(path.read_text()) for path in sources))
        text = f"{before}<!-- {name}:begin -->\n{body}\n{end}{after}"
    if unknown := {marker[2] for marker in RAN.finditer(text)} - set(SUBJECTS):
        raise SystemExit(f"{min(unknown)} is no subject of gpu-check.json; choose from {', '.join(SUBJECTS)}")
    file = results / "gpu-check.json"
    check = json.loads(file.read_text()) if file.exists() else None
    return RAN.sub(lambda marker: f"{marker[1]}{ran(check, marker[2])}{marker[3]}", text)


def main() -> None:
    """Rewrite README and docs in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("demo", "demolimited", "headline", "claims"):
        parser.add_argument(f"--{name}", type=Path, help=f"metrics.json to keep as benchmarks/results/{name}.json")
    for name, metrics in vars(parser.parse_args()).items():
        if metrics:
            shutil.copy(metrics, RESULTS / f"{name}.json")
    for page in pages():
        text = page.read_text()
        if names(text) or RAN.search(text):
            page.write_text(written(text))
    for picture in PICTURES:
        shutil.copy(RESULTS / picture, ROOT / "docs" / "benchmarks" / picture)


if __name__ == "__main__":
    main()
