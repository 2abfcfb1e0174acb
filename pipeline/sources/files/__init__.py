"""Large files of upstream, and what is packed into them: transfers, the hub, archives, lookups."""
