"""The same handler as a separate application, started with the command of the contestant."""
