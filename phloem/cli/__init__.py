"""The command line: `phloem up`, `serve`, `pull`, `chat`, `bench`, `doctor`."""
