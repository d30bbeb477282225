"""C code that the machine's own compiler builds, once, and what it does."""
