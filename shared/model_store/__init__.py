"""Where models come from, and what their configuration files say. Never imports torch or transformers."""
