"""Measuring a server as its users see it: load, figures, comparison. No torch, no numpy.

`datasets` make sessions, `client` (in processes of its own) sends them and stamps what comes back,
`figures` turns the records into numbers, `controller` steers a run from its plan to its report.
"""
