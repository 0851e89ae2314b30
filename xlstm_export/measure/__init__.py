"""What is measured on data: task metrics, drift along a stream, memory of the gates."""
