"""Pictures behind links: a client that is polite, and lets nobody in."""
