"""`POST /route` measured side by side: the engine alone, our service, and what else one could run."""
