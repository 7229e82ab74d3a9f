"""The bus as a page, for `lightbus web`: apps, events, dead letters, and live events. Needs the extra `[web]`.

Imports: `catalog`, `dead_letters`, `tail` and what is above them in the list of modules, no command. Only this package
imports Starlette, uvicorn and Jinja2.
"""
