"""Actor and critic on one trunk of convolutions."""

import math

import torch
from torch import Tensor, nn

from pong.config import NetworkConfig
from rlhf.checks import InputError, brief


class ActorCritic(nn.Module):
    """Frames to action logits and a value, by the classic Atari trunk: convolutions, one hidden layer, two heads.

    Args:
        config: widths.
        stack: frames of an observation.
        frame_shape: (rows, columns).
        actions: how many the agent chooses from.
        pixel_unit: grey levels that are seen as 1.
        precision: of the trunk, while collecting and while learning alike; the heads are float32.
    Raises:
        InputError: the frame is too small for the convolutions.
    """

    background: Tensor  # f32 [rows, columns], grey levels, the same for every frame of the stack

    def __init__(
        self,
        config: NetworkConfig,
        *,
        stack: int,
        frame_shape: tuple[int, int],
        actions: int,
        pixel_unit: float = 255.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.pixel_unit, self.precision = pixel_unit, precision
        rows, columns = frame_shape
        layers: list[nn.Module] = []
        channels = stack
        for width, kernel, stride in zip(config.channels, config.kernels, config.strides, strict=True):
            rows, columns = (rows - kernel[0]) // stride[0] + 1, (columns - kernel[1]) // stride[1] + 1
            if rows < 1 or columns < 1:
                raise InputError(
                    f"frames of {frame_shape} are too small for kernels {config.kernels} with strides "
                    f"{config.strides}: use larger frames or fewer convolutions"
                )
            layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
            channels = width
        layers += [_Flatten(), nn.Linear(channels * rows * columns, config.hidden), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.policy = nn.Linear(config.hidden, actions)
        self.value = nn.Linear(config.hidden, 1)
        gains: dict[nn.Module, float] = {self.policy: 0.01, self.value: 1.0}
        for layer in (*self.trunk, self.policy, self.value):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.register_buffer("background", torch.zeros(frame_shape))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take these weights, as `state_dict` gave them.

        Raises:
            InputError: they are of another network.
        """
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(
                f"these weights are of another network than the run's config describes ({brief(error)}): another "
                "version of this program wrote them; train anew with this one, or go back to that"
            ) from error

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames as the trunk reads them: without the background, in its unit and precision.

        Args:
            frames: u8 [..., rows, columns]. What is learned from several times is worth preparing once.
        """
        return frames.float().sub_(self.background).div_(self.pixel_unit).to(self.precision)

    def forward(self, stacks: Tensor) -> tuple[Tensor, Tensor]:
        """stacks: [B, stack, rows, columns], newest last, u8 or as `prepare` leaves them.

        Returns logits f32 [B, actions], values f32 [B]."""
        if stacks.dtype == torch.uint8:
            stacks = self.prepare(stacks)
        with torch.autocast(stacks.device.type, self.precision, enabled=self.precision != torch.float32):
            hidden = self.trunk(stacks.contiguous(memory_format=torch.channels_last)).float()
        # The heads in float32: an advantage is a difference of values that are closer than bfloat16's steps.
        return self.policy(hidden), self.value(hidden).squeeze(-1)


class _Flatten(nn.Module):
    """[B, channels, rows, columns] to [B, rows * columns * channels]: the order in memory, so nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)
