"""Reading, transforming and batching of logs."""
