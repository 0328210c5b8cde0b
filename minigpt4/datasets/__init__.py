"""Training and evaluation data: builders (config → datasets), datasets, and the loaders that make batches of them."""
