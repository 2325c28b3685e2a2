"""The offline stages: a thin loop around one pure function each."""
