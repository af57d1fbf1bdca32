"""What is written: metadata inside image files, and shards of many prompts."""
