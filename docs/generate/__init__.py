"""The generator of the reference pages, of the picture of the rooms, and of the list of pages.

    PYTHONPATH=docs python -m generate      # part of `make docs`

Each page has a file here, whose first line says what the page shows. `site_hooks.py` has the hooks of the site.
"""
