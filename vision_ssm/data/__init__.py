"""Reading pictures; what the three tasks share about data."""
