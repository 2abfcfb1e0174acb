"""Captions from a server that speaks OpenAI's API."""
