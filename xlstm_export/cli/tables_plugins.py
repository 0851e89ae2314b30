"""Built plugin libraries, and the results of their tests, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..plugins.build import Library
    from ..plugins.inventory import Entry
    from ..plugins.selftest import Check

STATUS = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "skipped": "[yellow]skipped[/]"}


def show_built(console: Console, libraries: Sequence[Library]) -> None:
    """Path of each library, and warnings about machines it does not run on."""
    for library in libraries:
        how = "built" if library.fresh else "already built"
        gpus = f" for sm {', '.join(map(str, library.sms))}" if library.sms else ""
        console.print(f"[bold]{library.kind}[/] {how}{gpus}: {escape(str(library.path))}", soft_wrap=True)
    for warning in dict.fromkeys(note for library in libraries for note in library.warnings):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def show_inventory(console: Console, entries: Sequence[Entry]) -> None:
    """One row per library in the cache."""
    if not entries:
        console.print("nothing is built; run xlstm-export plugins build")
        return
    table = Table("kind", "for", "made with", "sources", "loads here")
    for entry in entries:
        manifest = entry.built.manifest
        words = manifest["compiler"].split()
        tools = [f"{words[0]} {words[-1]}"]
        tools += [f"CUDA {manifest['cuda']}"] if "cuda" in manifest else []
        tools += [f"TensorRT {manifest['tensorrt']}"] if "tensorrt" in manifest else []
        gpus = "".join(f", sm_{sm}" for sm in manifest.get("sms", []))
        table.add_row(
            entry.built.kind,
            manifest["machine"] + gpus,
            escape(", ".join(tools)),
            "[green]current[/]" if entry.built.current else "[yellow]other[/]",
            f"[yellow]no: {escape(entry.problem)}[/]" if entry.problem else "[green]yes[/]",
        )
    console.print(table)
    console.print(f"in {escape(str(entries[0].built.path.parent.parent))}", soft_wrap=True)


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """Every check with its error; the numbers of passed, failed and skipped checks last."""
    table = Table("library", "check", "rel. L2", "limit", "", "", box=None, padding=(0, 1, 0, 0))
    for check in checks:
        error = "" if check.error is None else f"{check.error:.1e}"
        limit = "" if check.limit is None else f"{check.limit:.1e}"
        detail = check.detail if check.status != "pass" else ""
        table.add_row(check.kind, check.name, error, limit, STATUS[check.status], escape(detail))
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    passed = sum(check.status == "pass" for check in checks)
    verdict = "[bold red]failed[/]" if failed else "[green]passed[/]"
    console.print(f"{verdict}: {passed} passed, {failed} failed, {len(checks) - passed - failed} skipped")
