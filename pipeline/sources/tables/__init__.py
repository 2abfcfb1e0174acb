"""Tables that name pictures or hold them: lists of links, sidecar tables, parquets."""
