"""The protocols that plugins fulfil, one file a role."""
