"""Atari Pong, and its neighbours, on the core that trains language models."""

import os

# Read once, when torch loads. By default torch's threads spin for milliseconds between two operations, and wherever
# another program wants a core too (the emulator does) the whole update waits for them: ten times slower was seen.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
