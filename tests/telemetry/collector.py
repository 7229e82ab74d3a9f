"""A receiver of OTLP over HTTP, as a collector is one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.patience import LIMIT


@attrs.frozen
class Received:
    """A span as a collector gets it."""

    service: str
    scope: str
    schema: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]


@attrs.define
class Collector:
    """What `/v1/traces` and `/v1/metrics` have received."""

    url: str
    spans: list[Received] = attrs.field(factory=list)
    metrics: set[str] = attrs.field(factory=set)

    @property
    def environment(self) -> dict[str, str]:
        """For a program that sends what it has when it ends, and nothing before."""
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        }

    def receive(self, path: str, body: bytes) -> None:
        if path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.metrics |= {one.name for scope in resource.scope_metrics for one in scope.metrics}
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = read(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [
                    Received(
                        service,
                        scope.scope.name,
                        scope.schema_url,
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        read(span.attributes),
                    )
                    for span in scope.spans
                ]


def read(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    class View(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.receive(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), View)
    found = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join(LIMIT)
