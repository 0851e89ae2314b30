"""Terms of the report in a sentence each, for headings under a pointer and for the last section."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .document import Section, Table

TERMS = {
    "relative L2": "Length of the difference over length of the expected values: 0.01 is 1% off.",
    "cosine": "1 where two tensors point in the same direction; it does not see a wrong scale.",
    "norm ratio": "Length of the export's tensor over that of the reference: 1 is right, 2 twice as large.",
    "headroom ×": "Limit over value: 1 is exactly at the limit, 10 is far from it.",
    "largest error": "Largest absolute difference of single values; `at` is its index.",
    "teacher-forced": "Both models read the same data, each with its own state.",
    "free-running": "Both models read the tokens that the export draws itself.",
    "state-forced": "Error that starts from the reference's state: without what has added up before.",
    "horizon": "Position of the stream at which an error is taken.",
    "growth": "Error at the last horizon over that at position 1,000: does the error add up?",
    "drift": "How the error changes along one stream whose state is carried on.",
    "KL": "Distance of two distributions (Kullback-Leibler) in nats per position; 0 is equal.",
    "stabilizer": "The running maximum m of an xLSTM cell, which keeps its exponential gates in range.",
    "normalizer": "What an mLSTM divides its output by; near zero, it makes errors larger.",
    "half-life": "Positions after which the forget gates have halved a memory.",
    "range": "Largest magnitude that an activation had in the calibration data; it sets the INT8 scale.",
    "last ÷ first": "Range at the last positions over that at the first; far above 1: long streams matter.",
    "p50": "The median; p99 is the time that 1 of 100 calls exceeds.",
    "roof": "Time that reading weights and state once takes at the memory bandwidth measured beside it.",
    "function bodies": "The recurrences as standard ONNX operators, without the fused kernels.",
    "int8-wo": "Weights are INT8, activations are not (weight-only); int4-wo alike.",
    "bits per byte": "Mean cost of a byte of held-out text in bits; lower is better.",
    "MASE": "Mean absolute error over that of a naive seasonal forecast; below 1 is better than naive.",
}
COLUMNS = {"p50 ms": "p50", "of the roof": "roof", "half-life, FP32": "half-life", "error": "relative L2"} | {
    "smallest m": "stabilizer",
    "largest m": "stabilizer",
    "smallest normalizer": "normalizer",
    "value": "relative L2",
}


def about(column: str) -> str:
    """What the heading of a column means; empty if it needs no explanation."""
    return TERMS.get(COLUMNS.get(column, column), "")


def glossary(sections: Sequence[Section]) -> Section:
    """The terms that the sections use."""
    words = "\n".join(_words(sections))
    used = tuple(
        (term, meaning)
        for term, meaning in TERMS.items()
        if re.search(rf"(?<!\w){re.escape(term)}(?!\w)", words, re.IGNORECASE)
    )
    return Section("Glossary", tables=(Table("Terms", ("term", "meaning"), used),))


def _words(sections: Sequence[Section]) -> list[str]:
    found: list[str] = []
    for section in sections:
        found += section.text
        for plot in section.plots:
            found += [plot.title, plot.description, plot.reading]
        for table in section.tables:
            found += [table.caption, *table.columns, *(str(value) for row in table.rows for value in row)]
    return found
