"""MLflow: the store, a run in it, and the process that sends the journal there."""
