"""Small measurements of what a sequence mixer remembers, smooths, expresses and learns in context."""
