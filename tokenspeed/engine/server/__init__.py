"""The HTTP server: one process speaks HTTP, another runs the engine, and a unix-domain socket joins them."""
