"""pdtrim-deploy: prune a model for prefill-decode disaggregation and serve it with sparse KV transfer."""

__version__ = "0.1.0"
