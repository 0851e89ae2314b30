"""A 24-hour temperature forecaster: an own module with an xLSTM block stack inside."""
