"""Which prompts are long enough to repeat a passage of their middle (`kvchoice/recall.py`). Pure: no torch."""

CUE = 16  # tokens of the passage that the prompt ends with
MIXED_VERSION = 1  # of which sequences of a mixture repeat a passage: steps of builds that read them are made again


def fits(prompt_tokens: int, continuation_tokens: int) -> bool:
    """Whether a cue and its continuation fit into the part of the prompt that passages are taken from."""
    return last_start(prompt_tokens, continuation_tokens) > prompt_tokens // 8


def last_start(prompt_tokens: int, continuation_tokens: int) -> int:
    """The last position at which a passage (a cue of `CUE` tokens and its continuation) may begin."""
    return prompt_tokens - prompt_tokens // 4 - CUE - continuation_tokens
