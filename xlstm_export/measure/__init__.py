"""Measurements on data: task metrics, drift along a stream, memory length of the gates."""
