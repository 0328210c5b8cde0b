"""The foundation of all other packages: registry, config, contracts, facts, logging, process groups."""
