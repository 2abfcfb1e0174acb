"""Captions from a vision-language model in this process."""
