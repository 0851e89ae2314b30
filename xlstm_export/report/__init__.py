"""A run folder as a document for people: one HTML file that needs no network, Markdown, and JSON.

`sections.py` says what is in it, from the files of the run (`data.py`); `document.py` is the form in between;
`page.py` fills the templates of the HTML file, `markdown.py` writes Markdown.
"""
