"""An OpenAI-compatible endpoint: `app` holds the routes, `batching` the queue and the thread that runs the model."""
