"""Moving scattered KV rows between two processes: packed into one buffer, or row by row -> results/transport.json.

`make bench-transport`. Every way begins and ends with the same rows at random places of two pools: packed ones gather,
send through our transport with header, checksum and reply, and scatter; scattered ones give each row to the library.
Beside them a plain TCP socket, and gather and scatter alone, in one process (`memcpy`). Rounds are interleaved. On a
CPU and loopback the bytes are exact and the seconds are not: compare rows of one run only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from __results import HERE, write

from pdtrim_deploy.serving import ServeEnvironment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--row-bytes", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve-python", type=Path, help="a Python with SGLang and the libraries of all transports")
    options = parser.parse_args()
    python = ServeEnvironment.find(options.serve_python).python
    sizes = [str(value) for value in (options.rows, options.row_bytes, options.rounds, options.seed)]
    command = [python, HERE / "__transport_ends.py", "send", *sizes]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        print(f"{row['way']:20s} {row['median_gb_s']:7.3f} GB/s  ({row['least_gb_s']:.3f} - {row['most_gb_s']:.3f})")
    options.serve_python = None  # a place of this machine
    write("transport", options, rows)


if __name__ == "__main__":
    main()
