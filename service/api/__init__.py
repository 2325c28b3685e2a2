"""The HTTP surface: one file per group of endpoints, and the table of problems."""
