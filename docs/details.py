"""Writes the table of docs/rlhf.md, each detail with the line that does it: python docs/details.py"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).parent / "rlhf.md"
BEGIN, END = "<!-- table: written by docs/details.py -->\n", "<!-- end of table -->\n"
N_PLUS, SECRETS, SECRETS_2 = "arXiv:2403.17031", "arXiv:2307.04964", "arXiv:2401.06080"
ZIEGLER, STIENNON, CENTRE = "arXiv:1909.08593", "arXiv:2009.01325", "arXiv:2312.09244"


class Detail(NamedTuple):
    stage: str
    what: str
    option: str  # "" where there is nothing to choose
    file: str
    line: str  # found once in the file
    source: str


DETAILS = (
    Detail("SFT", "Only the answers' tokens are learned, the end-of-sequence token among them", "", "rlhf/lm/sft.py",
           "Sequences(torch.cat([ids, completions]", STIENNON),
    Detail("SFT", "Rows laid end to end instead of padded", "--pack", "rlhf/lm/sft.py", "def packed_objective", ""),
    Detail("SFT", "Overlong rows are left out and counted, not cut", "--max-tokens", "rlhf/lm/data.py",
           "raise Unusable(f\"longer", N_PLUS),
    Detail("all", "No dropout, in any stage", "", "rlhf/lm/supervised.py", "accelerator.device).eval()", N_PLUS),
    Detail("reward model", "Head of std 1 / sqrt(width + 1) on the trunk of the fine-tuned model", "--model",
           "rlhf/lm/models.py", "nn.init.normal_(head.weight", STIENNON),
    Detail("reward model", "The score is read at a text's last token", "", "rlhf/lm/reward_modeling.py",
           "def scores(", N_PLUS),
    Detail("reward model", "A lead is demanded where a row says how much better the answer is", "--use-margins",
           "rlhf/preference_losses.py", "lead = chosen - rejected if margin is None", "arXiv:2307.09288, " + SECRETS_2),
    Detail("reward model", "Labels may be wrong with a known probability", "--label-smoothing",
           "rlhf/lm/reward_modeling.py", "other_way = ", SECRETS_2),
    Detail("reward model", "Scores are held around 0", "--center-coef", "rlhf/preference_losses.py",
           "return fill_masked(-logsigmoid(lead) + center_coef", CENTRE),
    Detail("reward model", "Accuracy and calibration on held-out pairs", "--eval-every", "rlhf/lm/reward_modeling.py",
           "def reliability(", "arXiv:1706.04599"),
    Detail("PPO", "The learned score is the reward of the last token alone", "", "rlhf/rewards.py",
           "def rewards_at_last_action", ZIEGLER),
    Detail("PPO", "Minus the coefficient times log-ratio to the reference at every token", "--kl-reward-coef",
           "rlhf/lm/experience.py", "def kl_rewards", ZIEGLER),
    Detail("PPO", "The coefficient follows a target for the KL of a completion", "--kl-target, --kl-horizon",
           "rlhf/kl.py", "def adapt_kl_coef_proportionally", ZIEGLER),
    Detail("PPO", "Scores shifted and scaled by the run's own mean and std", "--normalize-scores", "rlhf/rewards.py",
           "scores = (scores - moments.mean)", SECRETS),
    Detail("PPO", "Scores clipped", "--score-clip", "rlhf/rewards.py", "scores = scores.clamp(", SECRETS),
    Detail("PPO", "A completion that does not end loses a fixed amount (in the source its score becomes -1)",
           "--missing-eos-penalty", "rlhf/rewards.py", "scores - missing_eos_penalty)", N_PLUS),
    Detail("PPO", "Per-token rewards scaled to variance 1, mean kept", "--whiten-rewards", "rlhf/objective.py",
           "rewards = masked_whiten(", N_PLUS),
    Detail("PPO", "Advantages shifted and scaled to mean 0, variance 1", "--whiten-advantages", "rlhf/objective.py",
           "advantages = masked_whiten(", N_PLUS),
    Detail("PPO", "Generalised advantages: gamma 1, lambda 0.95", "--gamma, --gae-lambda", "rlhf/advantages.py",
           "def gae(", N_PLUS),
    Detail("PPO", "A critic with a trunk of its own that starts as the reward model", "--critic-from",
           "rlhf/lm/critic.py", "def from_pretrained(cls, model", N_PLUS + ", " + SECRETS),
    Detail("PPO", "Or rounds at the start in which the critic alone learns", "--critic-warmup-steps",
           "rlhf/lm/optimizer.py", "def hold_back", SECRETS),
    Detail("PPO", "The ratio clipped", "--clip-low, --clip-high", "rlhf/losses.py", "def clipped_surrogate_loss",
           N_PLUS),
    Detail("PPO", "The value's step clipped", "--value-clip", "rlhf/losses.py", "def value_loss", N_PLUS),
    Detail("PPO", "Value loss weighed against the policy's", "--value-coef", "rlhf/lm/update.py",
           "loss = loss + algorithm.value_coef", N_PLUS),
    Detail("PPO", "The logits divided by the sampling temperature in training too", "--temperature",
           "rlhf/lm/logprobs.py", "temperature: logits are divided", N_PLUS),
    Detail("PPO", "Adam's epsilon 1e-5; linear decay of the learning rate", "--adam-epsilon, --lr-schedule",
           "rlhf/lm/optimizer.py", '"eps": optimization.adam_epsilon', N_PLUS),
    Detail("PPO", "Gradients clipped, actor and critic each by itself", "--max-grad-norm", "rlhf/lm/update.py",
           "norms = [nn.utils.clip_grad_norm_", SECRETS),
)  # fmt: skip


def link(detail: Detail) -> str:
    """The detail's file, linked to its line."""
    lines = (ROOT / detail.file).read_text().splitlines()
    found = [number for number, line in enumerate(lines, start=1) if detail.line in line]
    if not found:
        raise SystemExit(f"docs/details.py: {detail.line!r} is not in {detail.file} any more")
    return f"[{Path(detail.file).name}](../{detail.file}#L{found[0]})"


def table() -> str:
    head = "| stage | detail | option | line | source |\n" + "|---" * 5 + "|\n"
    rows = []
    for detail in DETAILS:
        papers = re.sub(r"arXiv:([\d.]+\d)", r"[\1](https://arxiv.org/abs/\1)", detail.source)
        option = f"`{detail.option}`" if detail.option else ""
        rows.append(f"| {detail.stage} | {detail.what} | {option} | {link(detail)} | {papers} |\n")
    return head + "".join(rows)


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
