"""The commands of a bundle's deploy.py. Exit codes are those of xlstm-export.

python3 deploy.py doctor | build | verify | bench | run [--backend tensorrt | onnxruntime]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..atomic import of_the_system, write_json
from ..errors import ExportError, GateError, SetupError, UsageError
from ..options import Bounds, BuildOptions
from ..runfolder import RunFolder
from ..sessions import timing
from ..sessions.protocol import Session
from . import integrity, replay, signature
from . import run as runs
from .arguments import add_options, options_of, within

BACKENDS = ("tensorrt", "onnxruntime")
INTERRUPTED = 130
FROM_0, FROM_1 = (within(Bounds(least), int) for least in (0, 1))
RATE = within(Bounds(0, above=True), float)


def main(bundle: Path, arguments: Sequence[str] | None = None) -> int:
    """Run a command on the bundle in that folder; returns the exit code."""
    options = _parser().parse_args(arguments)
    options.bundle = bundle
    try:
        key = options.public_key or signature.recorded_key()
        if not options.unchecked:
            integrity.check(bundle, public_key=key)
        elif key is not None:
            raise UsageError(
                f"--unchecked would skip the signature that {key} is for", "leave out one of them"
            )
        options.command(options)
    except ExportError as error:
        return _failed(error)
    except OSError as error:
        if (found := of_the_system(error)) is None:
            raise
        return _failed(found)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _failed(error: ExportError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deploy.py", description="Build, verify, time and run a bundle.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = partial(_command, commands)
    add("doctor", _doctor, "show what is installed here, what is missing, and what to do")
    build = add("build", _build, "build the engine, or the fused operators for ONNX Runtime")
    add_options(build.add_argument_group("TensorRT"), BuildOptions)
    verify = add("verify", _verify, "make the recorded calls; exit code 1 where a result is off")
    verify.add_argument("--horizon", type=FROM_1, help="positions of the stream; default: all recorded ones")
    bench = add("bench", _bench, "latency of steps and prefill")
    bench.add_argument("--steps", type=FROM_1, default=1000, help="calls to time")
    bench.add_argument("--prefill", type=FROM_1, default=512, help="positions")
    bench.add_argument("--hz", type=RATE, help="also call at this rate, and measure how late the calls are")
    runs.add_arguments(add("run", _run, "run data through the model, or continue text"))
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.set_defaults(command=run)
    made.add_argument("--backend", choices=BACKENDS, help="default: tensorrt where it is installed")
    made.add_argument("--threads", type=FROM_0, default=0, help="of ONNX Runtime; all cores by default")
    made.add_argument(
        "--in-place", action="store_true", help="TensorRT: states in one buffer (half the memory)"
    )
    made.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    made.add_argument(
        "--public-key",
        type=Path,
        help=f"PEM file that the bundle must be signed for; default: ${signature.RECORDED}",
    )
    made.add_argument("--unchecked", action="store_true", help="do not compare files with the manifest")
    return made


def _doctor(options: Any) -> None:
    from .doctor import examine

    findings = examine(options.bundle)
    if options.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            action = f" → {finding.action}" if finding.action else ""
            print(f"{finding.status:9} {finding.name}: {finding.detail}{action}")
    if any(finding.status == "missing" for finding in findings):
        raise SetupError("this machine cannot run the bundle as it is", "see the lines marked missing")


def _build(options: Any) -> None:
    start = time.monotonic()
    if _backend(options) == "onnxruntime":
        from . import kernels

        path = kernels.build(options.bundle, _percent)
    else:
        from .build import build_engine

        chosen = options_of(BuildOptions, options)
        path = build_engine(options.bundle, chosen, say=lambda line: print(line, file=sys.stderr))
    _say(options, {"built": str(path), "seconds": time.monotonic() - start}, f"built {path}")


def _verify(options: Any) -> None:
    opened = partial(_session, options)
    checks = replay.replay(
        options.bundle, opened, _backend(options), horizon=options.horizon, progress=_progress(options)
    )
    passed = all(check.passed for check in checks)
    result = {"backend": _backend(options), "passed": passed, "checks": [c.to_json() for c in checks]}
    width = max(len(check.name) for check in checks)
    lines = [
        f"{mark}  {check.name:{width}} {check.value:9.2e}  limit {check.limit:.1e}"
        for check in checks
        for mark in ["pass" if check.passed else "FAIL"]
    ]
    _say(options, result, "\n".join([*lines, "equal to what was verified" if passed else "NOT equal"]))
    _keep(options, f"verify-{_backend(options)}.json", result)
    if not passed:
        failed = next(check.name for check in checks if not check.passed)
        raise GateError(f"{failed} is off", "deploy.py doctor; then try --backend onnxruntime for comparison")


def _bench(options: Any) -> None:
    goldens = replay.read_goldens(options.bundle, _backend(options))
    result: dict[str, Any] = {"backend": _backend(options)}
    with _session(options) as session:
        result |= timing.bench(
            session,
            goldens.inputs,
            steps=options.steps,
            prefill=options.prefill,
            hz=options.hz,
            progress=_progress(options),
        )
    step, prefill = result["step"], result["prefill"]
    text = [
        f"step     p50 {step['p50_ms']:.3f} ms  p99 {step['p99_ms']:.3f}  p99.9 {step['p99.9_ms']:.3f}",
        f"prefill  p50 {prefill['p50_ms']:.3f} ms for {result['prefill_length']} positions, "
        f"{prefill['positions_per_second']:.0f} per second",
    ]
    if "rate" in result:
        late = result["rate"]["start_late"]
        text.append(
            f"at {options.hz:g} Hz  begins p99 {late['p99_ms']:.3f} ms late, "
            f"{result['rate']['missed']} of {result['rate']['calls']} missed"
        )
    if "watts" in result:
        text.append(f"power    {result['watts']['mean']:.1f} W mean, {result['watts']['max']:.1f} W max")
    _say(options, result, "\n".join(text))
    _keep(options, f"bench-{_backend(options)}.json", result)


def _keep(options: Any, name: str, result: Any) -> None:
    """Write a result, which has been printed, into the bundle; one on a read-only disk goes without."""
    try:
        write_json(options.bundle / "results" / name, result)
    except SetupError as error:
        print(f"not kept: {error.message}; --json > FILE keeps it elsewhere", file=sys.stderr)


def _run(options: Any) -> None:
    runs.run(options, partial(_session, options))


def _backend(options: Any) -> str:
    if options.backend is None:
        options.backend = next((name for name in BACKENDS if find_spec(name) is not None), None)
    if options.backend is None:
        raise SetupError(
            "neither tensorrt nor onnxruntime is installed",
            "TensorRT comes with JetPack; else: pip install onnxruntime",
        )
    return str(options.backend)


def _session(options: Any, batch: int = 1) -> Session:
    if _backend(options) == "onnxruntime":
        from ..sessions.cpu_graph import PreparedGraphs
        from ..sessions.ort import GraphSession
        from . import kernels

        graphs = PreparedGraphs(RunFolder.open(options.bundle))
        return GraphSession(graphs, batch, options.threads, library=kernels.find(options.bundle))
    from ..sessions.cpu_graph import name_of, read_prepared, vocabulary
    from ..sessions.tensorrt import TensorRtSession
    from .build import find_engine

    run = RunFolder.open(options.bundle)
    engine = find_engine(options.bundle)
    if options.in_place and engine.plugin is not None and run.io.states:
        alone = read_prepared(options.bundle, name_of(decode=True, fused=True)).in_place
        engine = replace(engine, in_place=alone)
    return TensorRtSession(engine, run.io, batch, vocab_size=vocabulary(run.manifest))


def _progress(options: Any) -> Callable[[str], None]:
    if options.json or not sys.stderr.isatty():
        return lambda stage: None
    return lambda stage: print(f"… {stage}", file=sys.stderr)


def _percent(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiling {done} of {total}", end="" if done < total else "\n", file=sys.stderr)


def _say(options: Any, data: Any, text: str) -> None:
    print(json.dumps(data, indent=1) if options.json else text)
