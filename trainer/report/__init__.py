"""The report's page: figures, curves, samples."""
