"""The router, and everything offline: scoring, training, evaluation, pipelines."""
