"""Run an exported model: text from a language model, forecasts from a CSV file."""
