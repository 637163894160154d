"""Atari Pong, and its neighbours, on the core that trains language models."""
