"""Authentication, hostile messages, and secrets."""
