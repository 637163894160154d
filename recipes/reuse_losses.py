"""Somebody else's training loop with the core's clipped surrogate: plain torch, no trainer, six functions.

    python recipes/reuse_losses.py

A small recurrent network reads three digits and learns to write them backwards, from a reward for each right digit.
"""

import torch
from torch import Tensor, nn

from rlhf.advantages import gae
from rlhf.losses import categorical_entropy, clipped_surrogate_loss, value_loss
from rlhf.reduce import count, token_mean

DIGITS, LENGTH, BATCH, STEPS, EPOCHS = 10, 3, 256, 200, 4


class Policy(nn.Module):
    """Reads the digits, then writes as many; a second head says what reward is still to come."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS + 1, width)  # the last one starts the answer
        self.encoder, self.decoder = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.actor, self.critic = nn.Linear(width, DIGITS), nn.Linear(width, 1)

    def forward(self, question: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, 10] and values [B, T] before each digit of the answer."""
        _, state = self.encoder(self.embed(question))
        start = torch.full_like(answer[:, :1], DIGITS)
        hidden, _ = self.decoder(self.embed(torch.cat([start, answer[:, :-1]], 1)), state)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    @torch.no_grad()
    def sample(self, question: Tensor) -> Tensor:
        answer = torch.zeros_like(question)
        for t in range(LENGTH):
            logits, _ = self(question, answer)
            answer[:, t] = torch.distributions.Categorical(logits=logits[:, t]).sample()
        return answer


def log_probs_of(logits: Tensor, answer: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)


def main() -> float:
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(1, STEPS + 1):
        question = torch.randint(DIGITS, (BATCH, LENGTH))
        answer = policy.sample(question)
        rewards = (answer == question.flip(-1)).float()
        action_mask = torch.ones_like(rewards, dtype=torch.bool)
        with torch.no_grad():
            logits, old_values = policy(question, answer)
            old_log_probs = log_probs_of(logits, answer)
        # A digit's reward comes at once: with gamma = 0 each is judged by itself.
        estimate = gae(rewards, old_values, action_mask, gamma=0.0, gae_lambda=0.95)

        for _ in range(EPOCHS):
            logits, values = policy(question, answer)
            surrogate = clipped_surrogate_loss(
                log_probs_of(logits, answer),
                old_log_probs,
                estimate.advantages,
                action_mask,
                clip_low=0.2,
                clip_high=0.2,
            )
            critic = value_loss(values, estimate.returns, action_mask)
            per_token = surrogate.loss + 0.5 * critic.loss - 0.01 * categorical_entropy(logits, action_mask)
            loss = token_mean(per_token, action_mask, denominator=count(action_mask, how="token_mean"))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {rewards.mean():.1%} of the digits right")
    return rewards.mean().item()


if __name__ == "__main__":
    main()
