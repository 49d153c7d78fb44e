"""`phloem bench`: measuring servers."""
