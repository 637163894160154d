"""The token-level trainer: actor, critic, reference and reward on top of the core."""
