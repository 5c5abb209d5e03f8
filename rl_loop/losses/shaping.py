"""Reward shaping: DAPO's soft punishment of overlong responses (arXiv 2503.14476, equation 13)."""


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """The penalty to add to a response's reward: 0 up to max_tokens - buffer tokens, falling linearly to -1 at
    max_tokens.

    Example: with max_tokens 100 and buffer 20, 80 tokens give 0, 90 give -0.5, 100 give -1. With buffer 0 it is 0.
    """
    allowed = max_tokens - buffer
    return 0.0 if buffer == 0 or length <= allowed else (allowed - length) / buffer
