"""What is written: receipts inside image files, names of files, and shards of many prompts.

This package does not load or run models; the pipeline uses it.
"""
