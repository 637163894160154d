"""The core: estimators and losses as pure functions on tensors. Importing it loads torch and nothing else."""
