"""Gate files: the user's limits in place of built-in ones, by names of checks.

    limits:
      "MASE on held-out data": 0.002      # relative change
      "teacher-forced: block * states: level": 0.05
      "memory length: *": 0.1

Names are those in `verify/report.json`; `*`, `?` and `[…]` are wildcards as in a shell. If several patterns
fit, the last one counts. Replaced limits are reported beside the new ones.
"""

from __future__ import annotations

import fnmatch
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import Check, Verdict
from ..errors import InputError
from ..load.mapping import read_mapping

EXAMPLE = 'limits: {"memory length: *": 0.1}'


@dataclass(frozen=True)
class Gate:
    """Limits by pattern of names, and the file they come from."""

    source: str
    sha256: str
    limits: Mapping[str, float]

    def apply(self, verdict: Verdict) -> Verdict:
        """The verdict with these limits.

        Raises:
            InputError: a pattern fits no check.
        """
        names = [check.name for check in verdict.checks]
        for pattern in self.limits:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"{self.source}: no check matches {pattern!r}", f"there are {', '.join(names)}"
                )
        checks = tuple(self._judged(check) for check in verdict.checks)
        about = {"file": self.source, "sha256": self.sha256, "limits": dict(self.limits)}
        return replace(verdict, checks=checks, gate=about)

    def _judged(self, check: Check) -> Check:
        limit = check.limit
        for pattern, own in self.limits.items():
            if fnmatch.fnmatchcase(check.name, pattern):
                limit = own
        if limit == check.limit:
            return check
        return replace(check, limit=limit, detail={**check.detail, "built_in_limit": check.limit})


def read_gate(path: Path) -> Gate:
    """Read a gate file.

    Raises:
        InputError: it cannot be read, or has another form.
    """
    try:
        data: Any = read_mapping(path)  # which bounds the size
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", f"a gate file looks like this: {EXAMPLE}"
        ) from error
    if not isinstance(data, dict) or set(data) != {"limits"} or not isinstance(data["limits"], dict):
        raise InputError(
            f"{path} must hold `limits` and nothing else", f"a gate file looks like this: {EXAMPLE}"
        )
    limits = {}
    for pattern, limit in data["limits"].items():
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not isinstance(pattern, str) or not number or not 0 <= limit <= sys.float_info.max:
            raise InputError(f"{path}: the limit of {pattern!r} is {limit!r}", "a number, at least 0")
        limits[pattern] = float(limit)
    return Gate(str(path), hashlib.sha256(content).hexdigest(), limits)
