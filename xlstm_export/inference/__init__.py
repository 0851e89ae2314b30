"""Run what was exported: text from a language model, forecasts from a CSV file."""
