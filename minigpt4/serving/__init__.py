"""An OpenAI-compatible endpoint: `app` has the routes, `batching` the queue and the one thread that owns the model."""
