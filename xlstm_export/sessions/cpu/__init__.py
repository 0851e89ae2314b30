"""Graphs derived from an export for ONNX Runtime on a CPU, opened as sessions."""
