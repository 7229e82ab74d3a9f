"""Faults on real brokers, with real processes. Every confirmed event must be handled, dead-lettered or still queued."""
