"""The measuring side: HTTP/1.1 streams, the load loop, its own lag, and the process around them."""
