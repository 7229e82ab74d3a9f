"""All logs through structlog. Try it: lightbus worker own_structlog:app --no-configure-logging"""

import logging

import structlog
from charging import app as app

from lightbus.logs import current_fields


def add_lightbus(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # Under one name, because "event" is structlog's name for the text of a line.
    if fields := current_fields():
        line.setdefault("lightbus", fields)
    return line


SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    add_lightbus,
]

structlog.configure(
    processors=[*SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    logger_factory=structlog.stdlib.LoggerFactory(),
)

handler = logging.StreamHandler()
handler.setFormatter(
    structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=SHARED,  # for loggers of the standard library, such as Lightbus's
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
)
logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
logging.getLogger("amqp").setLevel(logging.WARNING)
