"""What every training program needs, tokens or pixels: run folder, metrics, checkpoints, live view, plots."""

from rlhf.run.checkpoint import latest_checkpoint, save_checkpoint
from rlhf.run.folder import RunExistsError, RunFolder, RunNotFoundError, check_creatable
from rlhf.run.metrics import JsonLines, MetricsLog, check_tracker, read_json_lines, truncate_after, without_timings
from rlhf.run.plots import Panel, plot_metrics
from rlhf.run.resume import check_resumable
from rlhf.run.rng import rng_state, set_rng_state
from rlhf.run.seeding import draw_seeds, generator_for
from rlhf.run.state import CheckpointError, load_state, save_state
from rlhf.run.view import LiveView, reporting_errors

__all__ = [
    "CheckpointError",
    "JsonLines",
    "LiveView",
    "MetricsLog",
    "Panel",
    "RunExistsError",
    "RunFolder",
    "RunNotFoundError",
    "check_creatable",
    "check_resumable",
    "check_tracker",
    "draw_seeds",
    "generator_for",
    "latest_checkpoint",
    "load_state",
    "plot_metrics",
    "read_json_lines",
    "reporting_errors",
    "rng_state",
    "save_checkpoint",
    "save_state",
    "set_rng_state",
    "truncate_after",
    "without_timings",
]
