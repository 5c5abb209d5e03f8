"""The generator of the reference pages, of the picture of the rooms, and of the list of pages.

    PYTHONPATH=docs python -m generate      # part of `make docs`

Each page is a file here, and says in its first line what the page shows. `site_hooks.py` is the site's part.
"""
