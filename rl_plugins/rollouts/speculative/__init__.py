"""Speculative decoding: heads draft several tokens, and the model verifies them in one forward pass."""
