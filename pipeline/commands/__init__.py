"""What the commands of `pipeline` do: one file a command."""
