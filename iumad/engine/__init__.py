"""Training, evaluation and prediction: everything between the data and the report."""
