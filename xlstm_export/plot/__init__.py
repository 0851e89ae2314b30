"""Plots as SVG, drawn with the standard library alone.

`figures.py` says what a plot shows, `axes.py` where a value lies, `lines.py` and `bars.py` draw. `file.py`
makes an SVG file of it; the report puts the same drawings into its page. Colours are in `plot.css`.
"""
