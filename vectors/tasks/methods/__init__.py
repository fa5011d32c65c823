"""The merge methods, one a file; `vectors.tasks.registry` lists them."""
