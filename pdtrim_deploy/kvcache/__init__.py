"""Which prompt KV travels, and how its bytes lie on the wire."""
