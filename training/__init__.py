"""ONLINE half: from latent shards to pictures. See docs of each module; none is imported here."""
