"""Several runs side by side: records, figures, tables, the report."""
