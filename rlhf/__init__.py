"""The core: estimators and losses as pure functions on tensors. Importing it loads torch and nothing else."""

from importlib.metadata import version

__version__ = version("rlhf-core")
