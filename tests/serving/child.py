"""A program for the supervisor to run: `child.py MODE`, plain Python, no imports of ours."""

import signal
import subprocess
import sys
import time

mode = sys.argv[1]
print(f"{mode} started", flush=True)
if mode == "dies":
    raise ValueError("no such layer: 7")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("parent", "orphan-maker"):
    # A child in a process group of its own, deaf to SIGTERM: only the session tells that it belongs here.
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    subprocess.Popen([sys.executable, "-c", deaf], process_group=0)
if mode == "orphan-maker":
    time.sleep(0.5)
    sys.exit(3)
print("ready", flush=True)
time.sleep(600)
