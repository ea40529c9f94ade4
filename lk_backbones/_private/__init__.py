"""What this package uses of other libraries without their having promised it: one file for each library.

Nothing else in the package reaches into a private part, so that a release that moves one is met in one place. What has
a substitute is replaced by it, at the cost of speed; what has none raises an `ImportError` that names the part.
"""
