"""Our export beside those of transformers.exporters and torch.onnx.export: the same xLSTM, the same inputs.

    python benchmarks/peer_exporters.py --venv FOLDER [--out benchmarks/results/peer_exporters.json]

The versions that transformers.exporters is tested with are installed into a virtual environment, and the
script runs there. An `xLSTMForCausalLM` with random weights is exported by each for any batch size and
length; the others trace it with 2 rows of 128 positions. Then each export gets sequences below, at and past
that length, in one call, and as a prefill with steps after it. The error is relative L2 of the logits from
PyTorch in float64. All run in ONNX Runtime on a CPU, ours without its kernels.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("torch==2.12.0", "onnx==1.21.0", "onnxscript==0.7.0", "transformers==5.24.0", "onnxruntime==1.32.0")
OURS, PEER, PLAIN = "xlstm-export", "transformers.exporters", "torch.onnx.export"
TRACED = (2, 128)  # rows and positions
LENGTHS = (16, 64, 65, 128, 129, 192, 256)
ROWS, STEPS = (1, 2), 4
HEADS, VOCABULARY = 4, 4096
Call = Callable[[np.ndarray], np.ndarray]  # tokens (B, S) → logits


@dataclass
class Export:
    """What a tool wrote, and how it is run.

    Attributes:
        folder: all files that it wrote.
        one_call: logits (B, S, V) of all positions.
        streamed: logits (B, 1 + STEPS, V) of the last position of a prefill and of the steps after it; None
            where the tool exports no state.
        seconds: until the files were written, without imports.
    """

    folder: Path
    one_call: Call
    streamed: Call | None
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, help="make this virtual environment, or use it, and run in it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.width % 128:  # the model itself gives no states with keys of a size that is no multiple of 16
        parser.error("--width must be a multiple of 128")
    if options.venv:
        run_in(options.venv, options)
        return
    text = json.dumps(measure(options.width, options.blocks, options.threads), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def run_in(folder: Path, options: argparse.Namespace) -> None:
    """Install the versions into a virtual environment, and run this script there."""
    python = folder.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PINNED, "-e", ROOT], check=True)
    given = ["--threads", options.threads, "--width", options.width, "--blocks", options.blocks]
    given += ["--out", options.out.resolve()] if options.out else []
    subprocess.run([python, __file__, *map(str, given)], check=True)


def measure(width: int, blocks: int, threads: int) -> dict[str, Any]:
    """Errors, sizes and times of every tool."""
    import torch

    from xlstm_export.bench.environment import environment

    torch.set_num_threads(threads)
    model = make(width, blocks)
    tools: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, export in {OURS: ours, PEER: peer, PLAIN: plain}.items():
            folder = Path(scratch) / name
            folder.mkdir()
            try:
                exported = export(copy.deepcopy(model), folder, threads)
            except Exception as error:  # whatever the tool raises is what a user of it gets
                tools[name] = {"refused": _short(error)}
                continue
            tools[name] = figures(exported, model)
    return {
        "environment": environment(threads),
        "versions": versions(),
        "model": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "width": width,
            "blocks": blocks,
            "traced": list(TRACED),
            "steps": STEPS,
        },
        "pytorch": errors(lambda x: logits(model, x), None, model)["one call"],
        "tools": tools,
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in (pin.split("==")[0] for pin in PINNED)}


def make(width: int, blocks: int) -> nn.Module:
    """An xLSTM of Hugging Face with random weights: its own first weights leave gates constant."""
    import torch
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        embedding_dim=width,
        num_hidden_layers=blocks,
        num_blocks=blocks,
        num_heads=HEADS,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
    )
    model = xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def figures(export: Export, model: nn.Module) -> dict[str, Any]:
    """What is reported of one tool."""
    files = [file for file in export.folder.rglob("*") if file.is_file()]
    return {
        "seconds": export.seconds,
        "graphs": sum(file.suffix == ".onnx" for file in files),
        "bytes": sum(file.stat().st_size for file in files),
        **errors(export.one_call, export.streamed, model),
    }


def errors(one_call: Call, streamed: Call | None, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Errors by length, of each number of rows in turn; a text where a call fails."""
    from xlstm_export.distance import difference

    exact_model = copy.deepcopy(model).double()
    random = np.random.default_rng(0)
    found: dict[str, dict[str, Any]] = {"one call": {}, "streamed": {}}
    for length in LENGTHS:
        for rows in ROWS:
            tokens = random.integers(0, VOCABULARY, (rows, length + STEPS))
            exact = logits(exact_model, tokens)
            cases = {
                "one call": (one_call, tokens[:, :length], exact[:, :length]),
                "streamed": (streamed, tokens, exact[:, length - 1 :]),
            }
            for way, (call, given, right) in cases.items():
                if call is None:
                    continue
                try:
                    figure: Any = difference(call(given), right).relative_l2
                except Exception as error:  # whatever a runtime raises
                    figure = _short(error)
                found[way].setdefault(str(length), []).append(figure)
    return {way: x for way, x in found.items() if x}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def logits(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """All logits, by the model itself."""
    import torch

    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    return found


def table(found: dict[str, Any]) -> str:
    """What the exporters of one model write, and how far it is from PyTorch."""
    environment, model, tools = found["environment"], found["model"], found["tools"]
    ways = [(tool, way) for tool, x in tools.items() for way in ("one call", "streamed") if way in x]

    def file(tool: str) -> str:
        x = tools[tool]
        count = f"{x['graphs']} graph{'' if x['graphs'] == 1 else 's'}"
        return f"{x['seconds']:.0f} s, {count}, {x['bytes'] / 1e6:.0f} MB"

    names = {"one call": "one call", "streamed": "then steps"}
    heads = [f"`{tool}`, {names[way]}" for tool, way in ways]
    export = [file(tool) if way == "one call" else "" for tool, way in ways]
    rows, length = model["traced"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    busy = environment["busy_cores"] or 0.0
    lines = [
        f"| positions | {' | '.join(heads)} |",
        f"|{'---|' * (1 + len(heads))}",
        f"| export | {' | '.join(export)} |",
    ]
    for positions in found["pytorch"]:
        cells = [_deviation(tools[tool][way][positions]) for tool, way in ways]
        lines.append(f"| {positions} | {' | '.join(cells)} |")
    own = max(error for errors in found["pytorch"].values() for error in errors)
    lines += [
        "",
        f"`xLSTMForCausalLM` with {model['parameters'] / 1e6:.1f}M random weights, dynamic batch and length, "
        f"traced by the others with {rows} × {length} tokens (`benchmarks/peer_exporters.py`). Relative L2 "
        f"of the logits from PyTorch in float64, the worse of batch 1 and 2; PyTorch in float32 is {own:.1e} "
        f"from it. *Then steps*: the last position of such a prefill and {model['steps']} steps after it. "
        f"*Fails*: an error of ONNX Runtime. {versions}; {environment['threads']} threads of an "
        f"{environment['cpu']}{', which had other work: its seconds are rough' if busy > 0.5 else ''}.",
    ]
    refused = [
        f"`{tool}` could not export it: {x['refused']}." for tool, x in tools.items() if "refused" in x
    ]
    return "\n".join([*lines, *refused])


def _deviation(errors: list[float | str]) -> str:
    """The worst of the errors of some calls; those that failed are texts."""
    if any(isinstance(error, str) for error in errors):
        return "fails"
    worst = max(float(error) for error in errors)
    return f"{worst:.1e}" if worst < 1e-3 else f"**off by {worst:.0%}**"


# --- The tools ----------------------------------------------------------------------------------------------


def ours(model: nn.Module, folder: Path, threads: int) -> Export:
    """From a checkpoint, reading it included: one graph for both ways of calling."""
    import xlstm_export as xe
    from xlstm_export.runfolder import RunFolder
    from xlstm_export.sessions import OrtSession

    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)  # type: ignore[operator]
        begin = time.perf_counter()
        xe.export(checkpoint, out=folder / "run", threads=threads)
        seconds = time.perf_counter() - begin
    run = RunFolder.open(folder / "run")

    def session(tokens: np.ndarray) -> OrtSession:
        return OrtSession(run, len(tokens), threads, fused=False)

    def one_call(tokens: np.ndarray) -> np.ndarray:
        with session(tokens) as opened:
            return opened.prefill({"tokens": tokens})["logits"].copy()

    def streamed(tokens: np.ndarray) -> np.ndarray:
        with session(tokens) as opened:
            parts = [opened.prefill({"tokens": tokens[:, :-STEPS]})["logits"][:, -1:].copy()]
            for t in range(tokens.shape[1] - STEPS, tokens.shape[1]):
                parts.append(opened.step({"tokens": tokens[:, t : t + 1]})["logits"].copy())
        return np.concatenate(parts, 1)

    return Export(folder, one_call, streamed, seconds)


def peer(model: nn.Module, folder: Path, threads: int) -> Export:
    """transformers.exporters as documented for generation: a graph of prefill, one of a step."""
    import onnxruntime
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    begin = time.perf_counter()
    config = OnnxConfig(dynamic=True)
    exported = OnnxExporter().export_for_generation(model, {"input_ids": example()}, config)
    exported.save_pretrained(folder)
    seconds = time.perf_counter() - begin
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    exported.to("cpu", session_options=session_options)

    def prefill(tokens: np.ndarray) -> Any:
        return exported.runners["prefill"](input_ids=torch.from_numpy(tokens), use_cache=True)

    def one_call(tokens: np.ndarray) -> np.ndarray:
        found: np.ndarray = prefill(tokens).logits.numpy()
        return found

    def streamed(tokens: np.ndarray) -> np.ndarray:
        result = prefill(tokens[:, :-STEPS])
        parts = [result.logits[:, -1:].numpy()]
        for t in range(tokens.shape[1] - STEPS, tokens.shape[1]):
            one = torch.from_numpy(tokens[:, t : t + 1])
            result = exported.runners["decode"](input_ids=one, cache=result.cache, use_cache=True)
            parts.append(result.logits.numpy())
        return np.concatenate(parts, 1)

    return Export(folder, one_call, streamed, seconds)


def plain(model: nn.Module, folder: Path, threads: int) -> Export:
    """torch.onnx.export of the logits; states are no tensors that it could name."""
    import onnxruntime
    import torch
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return found

    begin = time.perf_counter()
    auto = torch.export.Dim.AUTO
    path = folder / "model.onnx"
    program = torch.onnx.export(
        Logits().eval(), (example(),), dynamo=True, dynamic_shapes={"input_ids": {0: auto, 1: auto}}
    )
    assert program is not None
    program.save(path, external_data=True)
    seconds = time.perf_counter() - begin
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])

    def one_call(tokens: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(None, {"input_ids": tokens})[0]
        return found

    return Export(folder, one_call, None, seconds)


def example() -> torch.Tensor:
    import torch

    return torch.randint(0, VOCABULARY, TRACED, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    main()
