"""One hypothesis profile for all tests: the same examples on every run, no wall-clock deadlines on shared machines."""

from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("default")
