"""The kernels on a GPU: built, checked against the recurrence in float64, timed."""
