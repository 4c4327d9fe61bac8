"""Ready means: a request came back through router, prefill, KV transfer and decode. The second token needs all four."""

import json
import sys
import urllib.request

BODY = {"text": "Ready?", "sampling_params": {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}}
request = urllib.request.Request(sys.argv[1], json.dumps(BODY).encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=25) as answer:
    tokens = json.load(answer)["meta_info"]["completion_tokens"]
sys.exit(0 if tokens == 2 else f"{tokens} tokens came back, not 2")
