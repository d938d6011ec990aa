"""The report: what runs and their caches have written down, as one page, a table or a picture.

    story.py    a run's folder -> its curves, cost and notes        tables.py   runs -> columns and rows
    caches.py   a cache's folder -> what it holds and what it cost  figures.py  columns and rows -> what is drawn
    page.py     all of it -> HTML                                   formats.py  -> CSV, PNG

Invariant: every number is one that a run or a cache has recorded, or a sum or a quotient of such; nothing of the data's
text is read. Needs no torch; drawing needs the extra `report`.
"""
