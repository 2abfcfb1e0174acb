"""The network: a MicroDiT, its blocks, its shape. Knows neither data nor trainer."""
