"""What a training is told: a YAML file and arguments, as typed settings. No torch here."""
