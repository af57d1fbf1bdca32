"""Images as files, pixels and grids, and where they come from: folders, lists, shards, URLs.

This package does not know any model; `pixels` owns the conversions between pixel ranges.
"""
