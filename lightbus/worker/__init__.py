"""The worker: one process (`worker`, `process`), several (`supervisor`), and its health (`health`).

Imports: the app and what is below it. `serve` and `Worker` are public.
"""

from lightbus.worker.worker import Worker as Worker
from lightbus.worker.worker import serve as serve
