"""A package as a user of raysys would have one; tests copy it to a folder outside of the repository."""
