"""What a run reports: the journal of its metrics, its files, its cost, and MLflow."""
