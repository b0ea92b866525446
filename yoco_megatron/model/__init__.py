"""The network, and nothing about how it is spread over processes."""
