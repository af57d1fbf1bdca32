"""The web page: a form, the images drawn from it, and their settings as a link or an API call.

It draws through `clipgen.pipeline` and knows nothing of the command line, of Cog or of training.
"""
