"""Who gets in, what a stranger can do, and what is kept secret."""
