"""Write what is installed in `.venv/NAME` back to constraints/NAME.txt: how a lock file is renewed.

Change a pin by hand with `.venv/NAME/bin/python -m uv pip install ...`, run the tests, then `make lock`.
Local version labels (`+cpu`) are dropped: the same release from any build satisfies a pin.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for name in sys.argv[1:]:
    python = ROOT / ".venv" / name / "bin" / "python"
    freeze = [python, "-m", "uv", "pip", "freeze", "--quiet", "--exclude-editable", "--python", python]
    listing = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    pins = [re.sub(r"\+.*", "", line) for line in listing.splitlines() if not line.startswith("pip==")]
    (ROOT / "constraints" / f"{name}.txt").write_text("\n".join(pins) + "\n")
    print(f"constraints/{name}.txt: {len(pins)} packages")
