"""The README that goes with a bundle."""

from __future__ import annotations

from ..specs import JsonMapping

_TEXT = """# {model}, {precision}

An xLSTM as a streaming ONNX graph, with what builds, verifies, times and runs it on a board{target}.

    python3 deploy.py build       # the engine, for exactly this GPU and TensorRT; minutes
    python3 deploy.py verify      # recorded streams again; the exit code is the verdict

TensorRT comes with JetPack (6.1 or later); Python needs NumPy. Without TensorRT the same commands run with
`--backend onnxruntime` (`pip install onnxruntime`), which is also the way to use a board without a GPU;
`build` is then optional, and makes it faster.

    python3 deploy.py doctor      # what is installed, what is missing, what to do
    python3 deploy.py bench --hz 100
    python3 deploy.py run --help
{text}{runner}
Exit codes: 0 pass, 1 a result is off, 2 usage, 3 the machine lacks something, 4 a file is damaged, 5 build
failed. Every command first compares every file with `manifest.json` and names what has changed.

| file | what it is |
|---|---|
| `model.onnx`, `model.onnx.data` | the graph and its weights |
| `io.json` | inputs, outputs and states |
| `model.stripped.onnx` | the graph as TensorRT's plugins take it: no function bodies, integers as integers |
| `plugins/` | the recurrences as kernels: sources, and in `bin/` what is built of them |
| `cpu/` | the graph as ONNX Runtime's CPU provider runs it |
| `goldens/` | a stream of {positions} positions ({inputs}): what this export gave, and {reference} |
| `deploy.py` | the commands; a zip of Python files (`python3 -m zipfile -l deploy.py`) |
| `manifest.json` | origin, versions, licence, SHA-256 of every file |

What `verify` holds a result to (relative L2): {limits}. `same` is against what this export gave on the
workstation, `reference` against {reference}.

Licence of the weights: {licence}.
"""


def readme(about: JsonMapping, goldens: JsonMapping, *, text: bool = False) -> str:
    """Markdown for a bundle.

    Args:
        about: what its manifest says.
        goldens: what its goldens.json says.
        text: it has a tokenizer.
    """
    limits = "; ".join(
        f"{backend}: " + ", ".join(f"`{name}` {limit:.1e}" for name, limit in sides.items())
        for backend, sides in goldens["limits"].items()
    )
    special = ", ".join(about["not_for_the_runner"])
    runner = (
        f"\nThe C++ runner in `plugins/runner` does not take this model: {special}; it takes tensors that\n"
        "are (B, S, ...), or have a batch and no positions. `deploy.py` takes it.\n"
    )
    return _TEXT.format(
        text="\n`run --text` reads `tokenizer.json`, for which it needs `pip install tokenizers`.\n" * text,
        runner=runner if special else "",
        model=about["model"],
        precision=about["precision"],
        target=f" ({about['target']})" if about["target"] else "",
        positions=sum(goldens["calls"]),
        inputs=goldens["inputs"],
        reference=goldens["reference"],
        limits=limits,
        licence=about["licence_of_weights"],
    )
