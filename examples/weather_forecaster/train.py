"""Train the forecaster on January to September 2013 and score it on November and December.

python examples/weather_forecaster/train.py             # train, write the held-out arrays, score
python examples/weather_forecaster/train.py --steps 0   # score the checkpoint that is already there
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run as a script
from examples.training_speedups import use_fast_cells
from examples.weather_forecaster.model import FEATURES, HORIZON, WeatherForecaster

HERE = Path(__file__).parent
SEED = 0
DAY = 24
VALIDATION_FROM, HELDOUT_FROM = "2013-10-01T00:00Z", "2013-11-01T00:00Z"
BATCH, WINDOW = 12, 320  # hours; a multiple of the chunk of the fast mLSTM
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP_NORM = 1e-3, 50, 0.5, 1.0
SHIFT, NOISE = 4.0, 0.5  # augmentation: degrees Celsius; standard deviations
VALIDATE_EVERY = 25


def load_stations(path: Path) -> tuple[np.ndarray, list[str]]:
    """Features (stations, hours, F) and the time of each hour, from weather.csv."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    stations = sorted({row["station"] for row in rows})
    times = [row["time"] for row in rows if row["station"] == stations[0]]
    measured = [name for name in FEATURES if name in rows[0]]
    values = np.array([[float(row[name]) for name in measured] for row in rows])
    values = values.reshape(len(stations), len(times), len(measured))

    moments = np.array([time.rstrip("Z") for time in times], dtype="datetime64[m]")
    hours = (moments - np.datetime64("2013-01-01T00:00")) / np.timedelta64(1, "h")
    day_angle = 2 * np.pi * hours / DAY
    year_angle = 2 * np.pi * (hours / DAY + 10) / 365  # zero at the winter solstice
    clock = np.stack([np.sin(day_angle), np.cos(day_angle), -np.cos(year_angle)], axis=-1)
    clock = np.broadcast_to(clock, (len(stations), *clock.shape))
    return np.concatenate([values, clock], axis=-1).astype(np.float32), times


def next_day(series: np.ndarray) -> np.ndarray:
    """(N, S) -> (N, S, 24): the 24 values that follow each hour, NaN past the end."""
    padded = np.pad(series[:, 1:], ((0, 0), (0, HORIZON)), constant_values=np.nan)  # (N, S + 23)
    return np.lib.stride_tricks.sliding_window_view(padded, HORIZON, axis=1)


def same_hour_yesterday(series: np.ndarray) -> np.ndarray:
    """(N, S) -> (N, S, 24): the 24 values that end with each hour, NaN before the start."""
    padded = np.pad(series, ((0, 0), (HORIZON - 1, 0)), constant_values=np.nan)  # (N, S + 23)
    return np.lib.stride_tricks.sliding_window_view(padded, HORIZON, axis=1)


def mean_absolute_error(forecast: np.ndarray, target: np.ndarray) -> float:
    """Over all stations, hours and horizons that have a target."""
    return float(np.nanmean(np.abs(forecast.astype(np.float64) - target)))


@torch.no_grad()
def forecast(weights: dict[str, torch.Tensor], x: np.ndarray) -> np.ndarray:
    """Run a fresh, unmodified forecaster with these weights over whole sequences."""
    model = WeatherForecaster().eval()
    model.load_state_dict(weights, strict=True)
    return model(torch.from_numpy(x)).numpy()


def sample_batch(values: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random augmented windows (B, S, F) of random stations, and their targets (B, S, 24)."""
    stations = torch.randint(len(values), (BATCH, 1), generator=generator)
    starts = torch.randint(values.shape[1] - WINDOW - HORIZON, (BATCH, 1), generator=generator)
    windows = values[stations, starts + torch.arange(WINDOW + HORIZON)]  # (B, S + 24, F)
    # A warmer or colder copy of the same weather: temperature and dew point move together.
    windows[:, :, :2] += SHIFT * torch.randn(BATCH, 1, 1, generator=generator)
    target = windows[:, 1:, 0].unfold(1, HORIZON, 1)  # (B, S, 24)
    # The temperature itself stays exact: the forecast is a change from it.
    noise_scale = NOISE * torch.tensor([std for _, std in FEATURES.values()])
    noise_scale[0] = 0.0
    x = windows[:, :WINDOW]
    return x + noise_scale * torch.randn(x.shape, generator=generator), target


def train(values: np.ndarray, validation: np.ndarray, steps: int) -> dict[str, torch.Tensor]:
    """Return the weights with the lowest error on the validation month."""
    model = WeatherForecaster()
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    use_fast_cells(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(SEED)
    data, temperature = torch.from_numpy(values), values[:, :, 0]
    # Errors grow with the horizon; relative to those of persistence, the first hours count as well.
    typical = torch.from_numpy(
        np.nanmean(np.abs(next_day(temperature) - temperature[:, :, None]), axis=(0, 1))
    )
    validation_target = next_day(validation[:, :, 0])
    best, best_mae, losses = {}, math.inf, []
    start = time.perf_counter()
    for step in range(steps):
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, target = sample_batch(data, generator)
        error = (model(x) - target).abs()  # (B, S, 24)
        optimizer.zero_grad()
        (error / typical).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(error.mean().item())
        if (step + 1) % VALIDATE_EVERY == 0 or step + 1 == steps:
            weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            mae = mean_absolute_error(forecast(weights, validation), validation_target)
            if mae < best_mae:
                best, best_mae = weights, mae
            recent = np.mean(losses[-VALIDATE_EVERY:])
            print(
                f"step {step + 1:4d}  train MAE {recent:.3f}  validation MAE {mae:.3f}"
                f"  {time.perf_counter() - start:4.0f} s",
                flush=True,
            )
    return best


def write_heldout(path: Path, values: np.ndarray, first: int, train_hours: int) -> None:
    """Save inputs, targets, seasonal-naive forecasts and the MASE scale of the held-out hours."""
    temperature = values[:, :, 0]
    history = temperature[:, :train_hours].astype(np.float64)
    scale = np.abs(history[:, DAY:] - history[:, :-DAY]).mean()
    np.savez_compressed(
        path,
        x=values[:, first:],
        target=next_day(temperature)[:, first:],
        naive=same_hour_yesterday(temperature)[:, first:],
        mase_scale=np.float64(scale),
    )


def evaluate(weights: dict[str, torch.Tensor], heldout: Path) -> None:
    """Print the errors of the checkpoint and of two baselines on the held-out part."""
    arrays = np.load(heldout)
    x, target, scale = arrays["x"], arrays["target"], float(arrays["mase_scale"])
    persistence = np.repeat(x[:, :, :1], HORIZON, axis=2)
    kernels = {name: tensor for name, tensor in weights.items() if name.endswith("_recurrent_kernel_")}
    for name, kernel in kernels.items():
        print(f"rms {kernel.square().mean().sqrt():.4f}  {name}")
    silenced = weights | {name: torch.zeros_like(kernel) for name, kernel in kernels.items()}
    print(f"held-out: {x.shape[0]} stations, {x.shape[1]} hours; MASE scale {scale:.4f} degrees Celsius")
    rows = {
        "xLSTM": forecast(weights, x),
        "seasonal naive (same hour yesterday)": arrays["naive"],
        "persistence (stays as it is now)": persistence,
        "xLSTM, recurrent kernels set to zero": forecast(silenced, x),
    }
    for name, values in rows.items():
        mae = mean_absolute_error(values, target)
        ahead = {
            hour: mean_absolute_error(values[..., hour - 1], target[..., hour - 1]) for hour in (1, 6, 12, 24)
        }
        detail = "  ".join(f"+{hour} h {error:.2f}" for hour, error in ahead.items())
        print(f"{name:38s} MAE {mae:.3f}  MASE {mae / scale:.3f}  {detail}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model.safetensors and heldout.npz")
    parser.add_argument("--steps", type=int, default=240, help="0: only score the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    if args.steps:
        values, times = load_stations(HERE / "weather.csv")
        validation_at, heldout_at = times.index(VALIDATION_FROM), times.index(HELDOUT_FROM)
        args.out.mkdir(parents=True, exist_ok=True)
        write_heldout(args.out / "heldout.npz", values, heldout_at, validation_at)
        weights = train(values[:, :validation_at], values[:, validation_at:heldout_at], args.steps)
        save_file(weights, args.out / "model.safetensors")
    evaluate(load_file(args.out / "model.safetensors"), args.out / "heldout.npz")


if __name__ == "__main__":
    main()
