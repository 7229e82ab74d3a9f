"""Faults on real brokers, with real processes, and an account: confirmed is handled, dead or still queued."""
