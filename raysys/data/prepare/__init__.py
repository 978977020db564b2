"""Public data sets as Parquet with a schema, one file a data set."""
