"""Plots as SVG, drawn with the standard library alone.

`figures.py` describes the content of a plot, `axes.py` computes positions, `lines.py` and `bars.py` draw.
`file.py` writes SVG files; the report puts the same drawings into its page. Colours are in `plot.css`.
"""
