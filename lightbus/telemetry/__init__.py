"""What an operator sees of running apps, in the formats of other tools: Prometheus and OpenTelemetry.

Built on `app.observe`, `on_publish`, `wrap_handlers` and the health of a worker. Each part needs its own extra, and no
other part. Imports: the worker and what is above it in the list of modules. Nothing above imports this package.
"""
