"""The report of a run folder: one self-contained HTML file, Markdown, and JSON.

`sections.py` makes its sections from the files of the run (`data.py`); `document.py` is the form in between;
`page.py` fills the templates of the HTML file, `markdown.py` writes Markdown.
"""
