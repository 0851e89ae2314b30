"""The forecaster: an own module around `xlstm.xLSTMBlockStack`."""

import torch
from torch import nn
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)

# name: (mean, standard deviation) over January to September, all three stations
FEATURES = {
    "temp": (14.26, 10.23),  # degrees Celsius
    "dewp": (6.52, 11.05),  # dew point, degrees Celsius
    "humid": (62.7, 19.6),  # relative humidity, percent
    "wind_east": (1.35, 3.48),  # m/s
    "wind_north": (-0.17, 3.79),  # m/s
    "pressure": (1016.8, 7.1),  # hPa
    "visib": (9.27, 2.03),  # visibility, miles, at most 10
    "hour_sin": (0.0, 0.71),  # hour of the day in UTC, as an angle
    "hour_cos": (0.0, 0.71),
    "season": (0.0, 0.71),  # -1 at the winter solstice, +1 at the summer solstice
}
HORIZON = 24  # hours


class WeatherForecaster(nn.Module):
    """At every hour, forecast the temperature of the next 24 hours from all hours so far."""

    def __init__(self, embedding_dim: int = 64, num_blocks: int = 4, slstm_at: tuple[int, ...] = (1, 3)):
        super().__init__()
        mean, std = torch.tensor(list(FEATURES.values())).unbind(-1)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.embed = nn.Linear(len(FEATURES), embedding_dim)
        self.stack = xLSTMBlockStack(
            xLSTMBlockStackConfig(
                mlstm_block=mLSTMBlockConfig(
                    mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
                ),
                slstm_block=sLSTMBlockConfig(
                    slstm=sLSTMLayerConfig(
                        backend="vanilla", num_heads=4, conv1d_kernel_size=4, recurrent_weight_init="standard"
                    ),
                    feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
                ),
                context_length=2048,  # the longest sequence of the parallel form; bounds no state
                num_blocks=num_blocks,
                embedding_dim=embedding_dim,
                slstm_at=list(slstm_at),
            )
        )
        self.head = nn.Linear(embedding_dim, HORIZON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, S, F) in the units of FEATURES -> degrees Celsius (B, S, 24), 1 to 24 hours ahead."""
        standard = (x - self.mean) / self.std
        change = self.head(self.stack(self.embed(standard)))  # from the current temperature
        return x[..., :1] + change * self.std[0]


def build() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module with untrained weights, in eval mode, and example inputs in realistic units."""
    model = WeatherForecaster().eval()
    noise = torch.randn(2, 48, len(FEATURES), generator=torch.Generator().manual_seed(0))
    return model, {"x": model.mean + noise * model.std}
