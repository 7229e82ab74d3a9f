"""The same handler as an application of its own, started with the contestant's own command."""
