"""Stands where the serve environment's Python would: answers HTTP like a worker or the router, or misbehaves.

The supervisor runs it as `PYTHON -m sglang.launch_server --port N ...`, the router as `PYTHON -c ... --port N`.
What is wrong with a worker of stage S says the line `S: fault` of faults.txt in its model folder; with the router,
--fault.
"""

import http.server
import json
import socket
import sys
import time
from pathlib import Path

args = sys.argv[3:]
program = sys.argv[2]


def option(name, default=None):
    return args[args.index(name) + 1] if name in args else default


if "sglang_router" in program:
    fault = option("--fault", "")
else:
    lines = (Path(option("--model-path")) / "faults.txt").read_text().splitlines()
    faults = dict(line.split(": ") for line in lines)
    fault = faults.get(option("--disaggregation-mode"), "")

requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(503 if fault == "never-healthy" else 200, {})

    def do_POST(self):
        global requests  # noqa: PLW0603
        requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", json.dumps(body, sort_keys=True), flush=True)
        if fault == "hangs":
            time.sleep(600)
        if fault == "dies-when-asked":
            print("RuntimeError: layer count 4 is not 6", flush=True)
            import os

            self.connection.shutdown(socket.SHUT_RDWR)  # first; the process ends a while after
            time.sleep(1)
            os._exit(7)
        if fault == "refuses" or (fault == "late" and requests < 3):
            self.answer(503, {"error": "no plan in common"})
        else:
            self.answer(200, {"text": "x", "meta_info": {"completion_tokens": 2}})

    def answer(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


if fault == "dies":
    raise ValueError("weights of block 3 are missing")
http.server.ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
