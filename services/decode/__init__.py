"""A decode worker: the shared engine, with the role that receives KV and generates."""
