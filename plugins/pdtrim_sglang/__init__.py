"""SGLang plugin: sparse prompt KV between prefill and decode workers, and decode attention that expects it.

Registered under the entry-point group `sglang.srt.plugins`; SGLang calls `register` in the launcher and in every
scheduler process before it reads its arguments.
"""


def register() -> None:
    """Add the transfer backends and the hooks. Nothing else of SGLang is touched."""
    from pdtrim_sglang.patches import install

    install()
