"""The last tokens of a prompt, which KV-only layers of prefill run whole."""
