"""Images as files, pixels and grids, and where they come from: folders, lists, shards, URLs.

Nothing here knows what a model is; `pixels` owns the conversions between pixel ranges."""
