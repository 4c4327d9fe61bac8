"""Judges of a plan: the PD oracle, perplexity, and the real text they use."""
