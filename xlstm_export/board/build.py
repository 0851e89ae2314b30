"""Build a TensorRT engine from ONNX and a plugin library, on the target. Not yet tested on hardware.

An engine belongs to one GPU and one TensorRT version. It is written to `engines/sm<SM>-trt<version>/`,
complete or not at all, with a manifest of its sources. The manifest is checked before the engine is loaded: a
stale engine is an error.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import sha256, staged, write_json
from ..errors import BuildError, InputError, SetupError
from ..options import BuildOptions
from ..plugins import build as plugin_builder
from ..plugins import locate
from ..runfolder import MANIFEST, MODEL, RunFolder
from ..sessions.cuda import Cuda
from ..sessions.tensorrt import Engine, TensorRt, import_tensorrt
from ..specs import IoSpec, TensorSpec
from . import integrity
from .kernels import BIN

ENGINE, LOG, TIMINGS = "model.engine", "build.log", "timing.cache"
ENGINES = "engines"
STRIPPED = "model.stripped.onnx"
SCHEMA = 1
OLDEST = (10, 3)
MIB = 1 << 20
OPTIMAL = 128  # positions that prefill is tuned for, where its maximum allows
KIND = "tensorrt"


@dataclass(frozen=True)
class Plan:
    """The description of a build.

    Attributes:
        model: ONNX file: for plugins, or with function bodies.
        plugin: the plugin library; None to build from function bodies.
        shapes: input name → (min, opt, max) of the decode and of the prefill profile.
        recurrences: how many layers must come from the plugin.
        workspace: bytes the builder may use.
        level: of the builder's optimization; None for its default.
    """

    model: Path
    plugin: Path | None
    shapes: Mapping[str, tuple[tuple[tuple[int, ...], ...], ...]]
    recurrences: int
    workspace: int
    level: int | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    def trtexec(self, major: int, engine: str = ENGINE) -> str:
        """The same build as a command line of trtexec, with one profile for each half of `shapes`."""
        words = ["trtexec", f"--onnx={self.model.name}", f"--saveEngine={engine}", "--skipInference"]
        if major < 11:
            words.append("--stronglyTyped")  # later versions have no other mode
        if self.plugin is not None:
            words.append(f"--dynamicPlugins={self.plugin.name}")
        words += [
            f"--memPoolSize=workspace:{self.workspace // MIB}",
            f"--timingCacheFile={TIMINGS}",
            "--noTF32",
        ]
        if self.level is not None:
            words.append(f"--builderOptimizationLevel={self.level}")
        for profile in (0, 1):
            words.append(f"--profile={profile}")
            for which, option in enumerate(("minShapes", "optShapes", "maxShapes")):
                sizes = (
                    f"{name}:{'x'.join(map(str, profiles[profile][which]))}"
                    for name, profiles in self.shapes.items()
                )
                words.append(f"--{option}={','.join(sizes)}")
        return shlex.join(words)


def plan_build(
    bundle: Path,
    version: tuple[int, ...],
    free_bytes: int,
    options: BuildOptions = BuildOptions(),
    plugin: Path | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Plan:
    """Plan the build of a bundle's engine.

    Args:
        bundle: its folder.
        version: of TensorRT.
        free_bytes: memory of the device that is free now; on a Jetson the CPU's memory too.
        options: how. Without the plugin an engine is slower, and nothing has to be compiled.
        plugin: library to use instead of the one that is found.
        say: called with a line of progress.

    Raises:
        SetupError: TensorRT is too old, or there is no plugin library.
        InputError: the bundle's manifest or io.json is damaged.
    """
    if version[:2] < OLDEST:
        raise SetupError(
            f"TensorRT {_dotted(version)} is too old: plugins need {_dotted(OLDEST)}",
            "JetPack 6.1 brings 10.3; or use --backend onnxruntime",
        )
    io = RunFolder.open(bundle).io
    manifest = integrity.read(bundle)
    function_bodies = options.function_bodies
    if not function_bodies and plugin is None:
        plugin = find_plugin(bundle, say)
    # Before 10.7 a function body in the file wins over a plugin of the same name; and plugins read integers
    # that bodies have to be given as floats.
    model = bundle / (MODEL if function_bodies else STRIPPED)
    return Plan(
        model,
        None if function_bodies else plugin,
        profile_shapes(io, options.max_length, options.max_batch),
        0 if function_bodies else int(manifest["recurrences"]),
        (options.workspace or max(64, free_bytes // 2 // MIB)) * MIB,
        options.optimization_level,
        {"model": manifest["files"][model.name]["sha256"], "plugin": manifest["plugin_abi"][KIND]},
    )


def profile_shapes(
    io: IoSpec, max_length: int, max_batch: int
) -> dict[str, tuple[tuple[tuple[int, ...], ...], ...]]:
    """(min, opt, max) of each input for one position, and for up to `max_length`."""

    tensors = [*io.inputs, *(TensorSpec(s.past, s.dtype, ("B", *s.shape)) for s in io.states)]
    corners = (
        ((1, 1), (1, 1), (max_batch, 1)),
        ((1, 1), (1, min(OPTIMAL, max_length)), (max_batch, max_length)),
    )
    return {
        x.name: tuple(tuple(x.sized(*corner) for corner in profile) for profile in corners) for x in tensors
    }


def find_plugin(bundle: Path, say: Callable[[str], None] = print) -> Path:
    """The plugin library: from the bundle if it fits this machine, else compiled once into the user's cache.

    Args:
        bundle: its folder.
        say: called with a line before it is compiled.

    Raises:
        SetupError: the bundle has none for this machine, and there is no CUDA compiler.
        BuildError: the compiler failed.
    """
    sources = locate.Sources(bundle / "plugins")
    found = sources.find(KIND)
    shipped = bundle / BIN / locate.machine() / locate.KINDS[KIND].library
    if found is not None:
        return found
    if shipped.is_file():
        return shipped
    say(f"compiling the {locate.KINDS[KIND].purpose} for this machine, once; this takes some minutes")
    (library,) = plugin_builder.build([KIND], sources=sources)
    return library.path


def build_engine(
    bundle: Path,
    options: BuildOptions = BuildOptions(),
    *,
    say: Callable[[str], None] = print,
    tensorrt: TensorRt = None,
    cuda: Cuda | None = None,
) -> Path:
    """Build the engine of a bundle for this machine.

    Args:
        bundle: its folder.
        options: how.
        say: called with a line of progress (phase and time).
        tensorrt, cuda: stand-ins for tests.

    Returns:
        Path of the engine.

    Raises:
        SetupError: TensorRT, CUDA or the plugin library is missing or does not fit.
        BuildError: TensorRT does not parse or build the graph; the message contains TensorRT's.
    """
    trt = tensorrt if tensorrt is not None else import_tensorrt()
    cuda = cuda or Cuda()
    version = version_of(trt)
    plan = plan_build(bundle, version, cuda.free_bytes(), options, say=say)
    folder = bundle / ENGINES / f"sm{cuda.sm()}-trt{_dotted(version)}"
    cache = folder.with_name(f"{folder.name}.{TIMINGS}")
    log = logger(trt)
    with staged(folder, marker=MANIFEST, force=True) as made:
        try:
            engine = serialize(trt, plan, log, cache=cache, say=say)
        finally:
            log.write(folder.with_name(f"{folder.name}.{LOG}"))
        (made / ENGINE).write_bytes(engine)
        write_json(
            made / MANIFEST,
            {
                "schema": SCHEMA,
                "tensorrt": _dotted(version),
                "sm": cuda.sm(),
                "processors": cuda.processors(),
                "origin": plan.origin,
                "plugin": None if plan.plugin is None else str(plan.plugin),
                "trtexec": plan.trtexec(version[0]),
                "engine_sha256": sha256(made / ENGINE),
            },
        )
    return folder / ENGINE


def serialize(
    trt: TensorRt, plan: Plan, log: TensorRt, *, cache: Path | None = None, say: Callable[[str], None] = print
) -> bytes:
    """Parse and build; returns TensorRT's plan as bytes.

    Args:
        trt: the tensorrt module.
        plan: what to build.
        log: of `logger`.
        cache: file of kernel timings, read where it is there and written again.
        say: called with a line of progress (phase and time).

    Raises:
        BuildError: see `build_engine`.
    """
    if plan.plugin is not None:
        trt.get_plugin_registry().load_library(str(plan.plugin))
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(plan.model)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError(
            f"TensorRT does not parse {plan.model.name}: {errors}", "is the plugin library loaded?"
        )
    _require_plugins(trt, network, plan)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if plan.level is not None:
        config.builder_optimization_level = plan.level
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:
        config.clear_flag(tf32)  # no TF32: sums of decays with 10 bits of mantissa are wrong
    for which in (0, 1):
        profile = builder.create_optimization_profile()
        for name, shapes in plan.shapes.items():
            profile.set_shape(name, *shapes[which])
        config.add_optimization_profile(profile)
    timings = config.create_timing_cache(cache.read_bytes() if cache is not None and cache.is_file() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    _watch(trt, config, say)
    try:
        built = builder.build_serialized_network(network, config)
    finally:
        # Also of a build that failed or was stopped: the next one does not measure these kernels again.
        if cache is not None:
            _keep(cache, bytes(config.get_timing_cache().serialize()))
    if built is None:
        raise _failure(log)
    return bytes(built)


def _flags(trt: TensorRt) -> int:
    """The network flags for strong typing; newer versions have no other mode."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _require_plugins(trt: TensorRt, network: Any, plan: Plan) -> None:
    """Raise BuildError where a recurrence fell back to its function body, which runs, but slowly."""
    if plan.plugin is None:
        return
    kinds = {getattr(trt.LayerType, name, None) for name in ("PLUGIN_V3", "PLUGIN_V2")} - {None}
    found = sum(network.get_layer(index).type in kinds for index in range(network.num_layers))
    if found != plan.recurrences:
        raise BuildError(
            f"{found} of {plan.recurrences} recurrences resolved to the plugin {plan.plugin}",
            "rebuild it: deploy.py doctor; or build without it: --function-bodies",
        )


def _watch(trt: TensorRt, config: Any, say: Callable[[str], None]) -> None:
    """Report the builder's phases with the time so far, where this version of TensorRT supports it."""
    base = getattr(trt, "IProgressMonitor", None)
    if base is None or not hasattr(config, "progress_monitor"):
        return
    start = time.monotonic()

    class Monitor(base):  # type: ignore[misc, valid-type]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                say(f"{time.monotonic() - start:6.0f} s  {phase_name}")

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

    config.progress_monitor = Monitor()


def _failure(log: TensorRt) -> BuildError:
    """The error of a builder that returned no engine, from its messages."""
    text = "; ".join(log.errors[-3:]) or "no message"
    if any(word in text.lower() for word in ("out of memory", "outofmemory", "insufficient memory")):
        return BuildError(
            f"TensorRT ran out of memory: {text}",
            "stop the desktop (sudo systemctl isolate multi-user), add swap, --workspace 512, "
            "--optimization-level 2",
        )
    return BuildError(f"TensorRT could not build the engine: {text}", "the log is beside the engine")


def logger(trt: TensorRt) -> TensorRt:
    """A logger that keeps everything for the build log and shows errors in exceptions."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: TensorRt, msg: str) -> None:
            if severity <= trt.ILogger.INFO:
                self.lines.append(f"{severity} {msg}")
            if severity <= trt.ILogger.ERROR:
                self.errors.append(msg)

        def write(self, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    return Log()


def _keep(cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}")
    temporary.write_bytes(content)
    temporary.replace(cache)


# --- Finding it again -------------------------------------------------------------------------------


def find_engine(bundle: Path, *, tensorrt: TensorRt = None, cuda: Cuda | None = None) -> Engine:
    """The engine for this machine, and the plugin library it was built with.

    Raises:
        SetupError: there is none, with those for other machines named; or TensorRT or CUDA is missing.
        InputError: it is damaged, or was built from another graph or other plugins.
    """
    version = version_of(tensorrt if tensorrt is not None else import_tensorrt())
    folder = bundle / ENGINES / f"sm{(cuda or Cuda()).sm()}-trt{_dotted(version)}"
    if not (folder / MANIFEST).is_file():
        others = sorted(path.parent.name for path in (bundle / ENGINES).glob(f"*/{ENGINE}"))
        found = f"; there are {', '.join(others)}, which do not run here" if others else ""
        raise SetupError(f"there is no engine for {folder.name}{found}", "python3 deploy.py build")
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        origin, digest, plugin = about["origin"], about["engine_sha256"], about["plugin"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged: {error!r}", "python3 deploy.py build") from error
    if sha256(folder / ENGINE) != digest:
        raise InputError(f"{folder / ENGINE} has changed since it was built", "python3 deploy.py build")
    manifest = integrity.read(bundle)
    models = {manifest["files"].get(name, {}).get("sha256") for name in (MODEL, STRIPPED)}
    if origin["model"] not in models or origin["plugin"] != manifest["plugin_abi"][KIND]:
        raise InputError(f"{folder.name} was built from another bundle", "python3 deploy.py build")
    if plugin is not None and not Path(plugin).is_file():
        raise SetupError(f"the plugin library {plugin} is gone", "python3 deploy.py build")
    return Engine(folder / ENGINE, None if plugin is None else Path(plugin))


def version_of(trt: TensorRt) -> tuple[int, ...]:
    """TensorRT's version as numbers."""
    return tuple(int(part) for part in str(trt.__version__).split(".")[:3] if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
