"""Commands beside training, evaluation and prediction: data sets, weights, export, scores, MLflow."""
