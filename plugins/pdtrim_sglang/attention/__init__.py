"""Decode attention over first, last and generated tokens, one file per SGLang backend."""
