"""Atari Pong on the same core. Not built yet."""
