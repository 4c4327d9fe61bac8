"""Write the README's tables from benchmarks/results/*.json: between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

.venv/build/bin/python tools/readme_tables.py                                   # what `make readme` runs
.venv/build/bin/python tools/readme_tables.py --demo out/demo/report/metrics.json   # keep a demo's figures first
"""

import argparse
import json
import shutil
from pathlib import Path

from tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Rewrite the README in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("demo", "headline"):
        parser.add_argument(f"--{name}", type=Path, help=f"metrics.json to keep as benchmarks/results/{name}.json")
    for name, made in vars(parser.parse_args()).items():
        if made:
            shutil.copy(made, RESULTS / f"{name}.json")
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, render in TABLES.items():
        source = RESULTS / f"{name}.json"
        if source.exists() and f"<!-- {name}:begin -->" in text:
            before, _, rest = text.partition(f"<!-- {name}:begin -->\n")
            _, end, after = rest.partition(f"<!-- {name}:end -->")
            text = f"{before}<!-- {name}:begin -->\n{render(json.loads(source.read_text()))}\n{end}{after}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
