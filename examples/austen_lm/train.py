"""Train the byte-level language model on Jane Austen and score it on a novel it has not seen.

python examples/austen_lm/train.py             # train, then score
python examples/austen_lm/train.py --steps 0   # score the checkpoint that is already there
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run as a script
from examples.training_speedups import use_fast_cells

HERE = Path(__file__).parent
SEED = 0
BATCH = 8
PEAK_LR, FINAL_LR, WARMUP_STEPS = 3e-3, 1e-4, 150
WEIGHT_DECAY, BETAS, CLIP_NORM = 0.05, (0.9, 0.99), 1.0
LOG_EVERY = 50
HIGHEST_NGRAM_ORDER = 5


def load_config(path: Path) -> xLSTMLMModelConfig:
    """Turn the nested mapping in `path` into the package's nested dataclasses."""
    fields = yaml.safe_load(path.read_text())
    mlstm = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(**fields.pop("mlstm_block")["mlstm"]))
    slstm_fields = fields.pop("slstm_block")
    slstm = sLSTMBlockConfig(
        slstm=sLSTMLayerConfig(**slstm_fields["slstm"]),
        feedforward=FeedForwardConfig(**slstm_fields["feedforward"]),
    )
    return xLSTMLMModelConfig(mlstm_block=mlstm, slstm_block=slstm, **fields)


def read_bytes(path: Path) -> torch.Tensor:
    """The file as token ids, one per byte."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8).astype(np.int64))


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to FINAL_LR at the last step."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: xLSTMLMModel, data: torch.Tensor, steps: int, compile_blocks: bool) -> None:
    """Run `steps` updates on random windows of `data`."""
    use_fast_cells(model)
    slstm_at = model.config.slstm_at
    if compile_blocks:
        for index, block in enumerate(model.xlstm_block_stack.blocks):
            if index not in slstm_at:  # the unrolled sLSTM loop would take minutes to compile
                block.compile(dynamic=False)
    decay, no_decay = model.get_weight_decay_optim_groups()
    # The groups are tuples made from sets; sorting them makes runs repeatable.
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {"params": sorted(decay, key=names.__getitem__), "weight_decay": WEIGHT_DECAY},
        {"params": sorted(no_decay, key=names.__getitem__), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS)
    generator = torch.Generator().manual_seed(SEED)
    window = torch.arange(model.config.context_length + 1)

    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        offsets = torch.randint(len(data) - len(window), (BATCH, 1), generator=generator)
        tokens = data[offsets + window]  # (B, S + 1)
        logits = model(tokens[:, :-1])  # (B, S, 256)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1:5d}  train {mean:.4f} bits/byte  grad norm {norm:.2f}  "
                f"lr {learning_rate(step, steps):.2e}  {seconds:6.0f} s",
                flush=True,
            )


@torch.no_grad()
def bits_per_byte(model: xLSTMLMModel, data: torch.Tensor, batch: int = 32) -> float:
    """Mean code length of data[1:], each byte after the first half window seen with >= S / 2 of context.

    Windows of S bytes overlap by half; only the second half of each (all of the first) is scored.
    """
    model.eval()
    size = model.config.context_length
    half = size // 2
    starts = list(range(0, len(data) - size, half))
    # A last window, aligned with the end, covers what is left.
    if starts[-1] + size + 1 < len(data):
        starts.append(len(data) - size - 1)
    bits, scored_to = 0.0, 0  # targets data[1 : scored_to + 1] are done
    for group in (starts[at : at + batch] for at in range(0, len(starts), batch)):
        tokens = torch.stack([data[start : start + size + 1] for start in group])
        logits = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # (B, S)
        for start, row in zip(group, losses, strict=True):
            bits += row[scored_to - start :].double().sum().item() / math.log(2)
            scored_to = start + size
    return bits / scored_to


def ngram_bits(train_data: np.ndarray, heldout: np.ndarray, highest_order: int) -> list[float]:
    """Bits per byte of interpolated Witten-Bell models with 0 to `highest_order` bytes of context.

    p_k(c | h) = (count(hc) + distinct(h) * p_{k-1}(c | shorter h)) / (count(h) + distinct(h)),
    where distinct(h) is how many different bytes follow h in the training text; p_{-1} = 1/256.
    """
    probability = np.full(len(heldout), 1 / 256)
    result = []
    for order in range(highest_order + 1):
        grams, counts = np.unique(pack(train_data, order), return_counts=True)
        contexts, first, distinct = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        queries = pack(heldout, order)
        gram_count = look_up(grams, counts, queries)
        seen, kinds = (look_up(contexts, column, queries >> 8) for column in (totals, distinct))
        known = seen > 0  # elsewhere the shorter context decides alone
        longer = (gram_count + kinds * probability[order:])[known] / (seen + kinds)[known]
        probability[order:][known] = longer
        result.append(float(-np.log2(probability[1:]).mean()))  # data[1:], as for the network
    return result


def pack(data: np.ndarray, order: int) -> np.ndarray:
    """Each byte with its `order` predecessors as one integer, the byte itself lowest."""
    grams = np.zeros(len(data) - order, dtype=np.int64)
    for shift in range(order + 1):
        grams = (grams << 8) | data[shift : len(data) - order + shift]
    return grams


def look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values[keys == query] for each query, 0 where the sorted `keys` lack it."""
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0)


def evaluate(folder: Path, train_data: torch.Tensor, heldout: torch.Tensor) -> None:
    """Load the checkpoint into a fresh, unmodified model and print its scores and the baselines."""
    model = xLSTMLMModel(load_config(HERE / "config.yaml"))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    print(f"held-out, xLSTM            {bits_per_byte(model, heldout):.4f} bits/byte", flush=True)
    for order, bits in enumerate(ngram_bits(train_data.numpy(), heldout.numpy(), HIGHEST_NGRAM_ORDER)):
        print(f"held-out, order-{order} n-gram   {bits:.4f} bits/byte")
    for name, parameter in model.named_parameters():
        if name.endswith("_recurrent_kernel_"):
            print(f"rms {parameter.detach().square().mean().sqrt():.4f}  {name}")
            torch.nn.init.zeros_(parameter)
    print(f"held-out, xLSTM with the recurrent kernels set to zero  {bits_per_byte(model, heldout):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model.safetensors")
    parser.add_argument("--steps", type=int, default=3200, help="0: only score the checkpoint")
    parser.add_argument("--compile", action="store_true", help="torch.compile the mLSTM blocks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train_data, heldout = read_bytes(HERE / "train.txt"), read_bytes(HERE / "heldout.txt")
    if args.steps:
        model = xLSTMLMModel(load_config(HERE / "config.yaml"))
        model.reset_parameters()
        size = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{size:,} parameters, {len(train_data):,} bytes to train on, {len(heldout):,} held out",
            flush=True,
        )
        train(model, train_data, args.steps, args.compile)
        args.out.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, args.out / "model.safetensors")
    evaluate(args.out, train_data, heldout)


if __name__ == "__main__":
    main()
