"""What everything else stands on: registry, config, checkpoints, logging, process groups. Imports nothing above it."""
