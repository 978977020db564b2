"""Indexes: the items of largest inner product with a query, exactly or approximately, behind one interface."""
