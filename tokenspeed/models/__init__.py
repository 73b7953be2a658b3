"""Models shipped with the package, as data: one directory each."""
