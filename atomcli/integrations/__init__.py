"""Where other libraries meet atom. These are leaves: delete one and nothing else breaks."""
