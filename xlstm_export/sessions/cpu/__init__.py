"""What ONNX Runtime is given on a CPU: graphs derived from an export, opened as sessions."""
